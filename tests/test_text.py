"""What models are asked, and how their words are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csp_jax.errors import UserError
from csp_jax.text import (
    CONFIDENCE_ANSWERS,
    Prompts,
    existence_question,
    parse_confidence,
    percent_text,
    with_article,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("73%", 0.73),
        ("about 90 %", 0.9),
        ("I am 85% sure", 0.85),
        ("I have 2 cats and am 90% sure of it", 0.9),
        ("0.9", 0.9),
        ("Confidence: 0.85.", 0.85),
        ("90", 0.9),
        ("90.", 0.9),
        ("1.0", 1.0),
        ("1", 0.01),
        ("0", 0.0),
        ("0%", 0.0),
        ("100 percent", 1.0),
        ("Sixty? No: 40 Per Cent", 0.4),
        ("between 70% and 80%", 0.7),
        ("1.5%", 0.015),
        ("99,5 %", 0.995),
        ("100.0%", 1.0),
        ("150%", None),
        ("1000%", None),
        ("101", None),
        ("3 of 4", None),
        ("90/100", None),
        ("", None),
        ("%", None),
        ("no idea", None),
        ("yes", None),
    ],
)
def test_confidence_is_read(text, value):
    found = parse_confidence(text)
    assert found is value if value is None else found == pytest.approx(value, abs=1e-12)


def test_every_answer_is_read_back():
    assert [round(100 * parse_confidence(answer)) for answer in CONFIDENCE_ANSWERS] == list(range(101))
    assert CONFIDENCE_ANSWERS[7] == percent_text(7) == "7%"


@given(st.text(max_size=60))
def test_reading_confidence_never_fails(text):
    value = parse_confidence(text)
    assert value is None or 0 <= value <= 1


def official_pope(text: str) -> str:
    """The published rule: the first sentence, commas dropped, split at spaces."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


words = st.sampled_from(
    ["yes", "Yes", "no", "No", "not", "NO", "none", "nothing", "a", "cat", "no.", "not,", "Yes,", "."]
)


@given(st.lists(words, max_size=8).map(" ".join))
def test_yes_or_no_is_popes(text):
    assert yes_or_no(text) == official_pope(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("No, there is no cat.", "no"),
        ("There is not a cat in the image.", "no"),
        ("Yes. There is no dog.", "yes"),
        ("I do not know", "no"),
        ("nobody", "yes"),
        ("", "yes"),
    ],
)
def test_yes_or_no(text, value):
    assert yes_or_no(text) == value


def test_prompts_are_filled_in():
    prompts = Prompts(
        answer="Q: {question}", confidence="{response} for {question}: how sure?", shot="{query} {confidence};"
    )
    assert prompts.ask("Is it {odd}?") == "Q: Is it {odd}?"
    assert prompts.ask_confidence("Why?", "Because {x}.") == "Because {x} for Why?: how sure?"
    shots = (("A?", "no.", 30), ("B?", "yes", 5))
    assert prompts.ask_confidence("C?", "yes", shots) == (
        "no for A?: how sure? 30%; yes for B?: how sure? 5%; yes for C?: how sure?"
    )


def test_the_packages_own_prompts_ask_for_a_percentage_about_another():
    query = Prompts().ask_confidence("Is there a cat in the image?", "yes.")
    assert "Is there a cat in the image?" in query
    assert "answered: yes." in query
    assert "1% to 100%" in query
    assert Prompts.from_mapping({}) == Prompts()


@pytest.mark.parametrize(
    ("values", "field", "problem"),
    [
        ({"anwser": "{question}"}, "prompts.anwser", "no such prompt"),
        ({"answer": "Say something"}, "prompts.answer", "lacks {question}"),
        ({"answer": "{{question}}"}, "prompts.answer", "lacks {question}"),
        ({"confidence": "{question}?"}, "prompts.confidence", "lacks {response}"),
        ({"verify": "{response}?"}, "prompts.verify", "lacks {question}"),
        ({"shot": "{query}"}, "prompts.shot", "lacks {confidence}"),
        ({"answer": "{question} {image}"}, "prompts.answer", "fill in for {image}"),
        ({"answer": "{question} {"}, "prompts.answer", "cannot be filled in"),
        ({"answer": 3}, "prompts.answer", "cannot be filled in"),
    ],
)
def test_mistakes_in_prompts_are_named(values, field, problem):
    with pytest.raises(UserError) as caught:
        Prompts.from_mapping(values)
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert caught.value.mend


@pytest.mark.parametrize(
    ("noun", "text"),
    [("cat", "a cat"), ("octopus", "an octopus"), ("umbrella", "an umbrella"), ("bus", "a bus")],
)
def test_articles(noun, text):
    assert with_article(noun) == text
    assert existence_question(noun) == f"Is there {text} in the image?"
