"""What models are asked, and how their words are read. Prompts can be replaced from a file."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping

from csp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The questions put to a model; the names in braces are filled in.

    `confidence` asks about somebody else's answer (the third-person perspective of the paper, appendix A.2)
    and must be answered by a percentage alone.
    """

    answer: str = "{question}"
    confidence: str = (
        "A model was asked: {question} It answered: {response}. How sure are you that this is right, from 1% to 100%?"
    )
    verify: str = "A model was asked: {question} It answered: {response}. Is this right?"
    shot: str = "{query} {confidence}"
    keyword: str = "Question: {question}\nAnswer: {response}\nObject:"

    def __post_init__(self) -> None:
        self._check("answer", {"question"})
        self._check("confidence", {"question", "response"})
        self._check("verify", {"question", "response"})
        self._check("shot", {"query", "confidence"})
        self._check("keyword", {"question", "response"})

    def _check(self, field: str, names: set[str]) -> None:
        where, text = f"prompts.{field}", getattr(self, field)
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except (TypeError, ValueError) as error:
            mend = "A prompt is text; a brace that is meant is written twice: {{"
            raise UserError(f"cannot be filled in ({error})", field=where, value=text, mend=mend) from None
        for name in sorted(names - found):
            raise UserError(f"the prompt lacks {{{name}}}", field=where, mend=f"Write {{{name}}} where it belongs")
        for name in sorted(found - names):
            mend = f"Only {', '.join(sorted(names))} can be filled in; a brace that is meant is written twice"
            raise UserError(f"nothing is known to fill in for {{{name}}}", field=where, mend=mend)

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> Prompts:
        """Prompts from a file's mapping; unknown names are errors."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UserError("no such prompt", field=f"prompts.{name}", mend=f"Known: {', '.join(sorted(known))}")
        return cls(**values)

    def ask(self, question: str) -> str:
        """The ordinary question."""
        return self.answer.format(question=question)

    def ask_verify(self, question: str, response: str) -> str:
        """The yes/no question whether a response is right."""
        return self.verify.format(question=question, response=response.rstrip("."))

    def ask_keyword(self, question: str, response: str) -> list[tuple[str, str]]:
        """A conversation of (speaker, words) that ends where the key object of a question about a photo is to be named.

        The instruction and examples of the task come first; a small model needs them.
        """
        turns = [("system", KEYWORD_TASK)]
        for asked, answered, keyword in KEYWORD_SHOTS:
            turns += [("user", self.keyword.format(question=asked, response=answered)), ("assistant", keyword)]
        shortened = response if len(response) <= KEYWORD_RESPONSE else response[:KEYWORD_RESPONSE].rsplit(" ", 1)[0]
        return [*turns, ("user", self.keyword.format(question=question.strip(), response=shortened.strip()))]

    def ask_confidence(self, question: str, response: str, shots: tuple[tuple[str, str, int], ...] = ()) -> str:
        """The confidence query about a response, after `shots`: (question, response, percent) examples."""
        query = self.confidence.format(question=question, response=response.rstrip("."))
        examples = [
            self.shot.format(
                query=self.confidence.format(question=asked, response=answered.rstrip(".")),
                confidence=percent_text(percent),
            )
            for asked, answered, percent in shots
        ]
        return " ".join([*examples, query])


KEYWORD_TASK = (
    "You read a question about a photo and its answer. Name the one thing in the photo that one has to look at to "
    "answer the question. Use a word or two from the question or the answer, and nothing else."
)
KEYWORD_SHOTS = (
    ("Is there a kettle in the image?", "yes", "kettle"),
    ("What is lying on the carpet next to the boy?", "A pair of boots.", "boots"),
    ("Are the curtains striped?", "No, they are plain.", "curtains"),
    ("Which town does the bus go to?", "Harwich", "bus"),
    ("Please tell me what you notice in this photo.", "A heron stands at the edge of a pond, quite still.", "heron"),
    ("How many candles are burning on the shelf?", "3", "candles"),
)
KEYWORD_RESPONSE = 400  # characters of a long answer that are shown: its first sentences name what it is about


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def existence_question(noun: str) -> str:
    """`Is there a dog in the image?`, as POPE asks."""
    return f"Is there {with_article(noun)} in the image?"


def percent_text(percent: int) -> str:
    """How a confidence is written: `73%`."""
    return f"{percent}%"


CONFIDENCE_ANSWERS = tuple(percent_text(percent) for percent in range(101))

_PERCENT = re.compile(r"(?<![\d.,])(\d{1,3}(?:[.,]\d+)?)\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
_NUMBER_ALONE = re.compile(r"^\D{0,40}?(?<![\d.,])(\d{1,3}(?:\.\d+)?)(?![\d.,]*\d)\D*$")


def parse_confidence(text: str) -> float | None:
    """The confidence in [0, 1] that a text states, or None if it states none or an impossible one.

    The first percentage counts; without any, a number that stands alone does: above 1 it is read as percent,
    at most 1 with a decimal point as a probability.
    """
    match = _PERCENT.search(text)
    if match:
        value = float(match.group(1).replace(",", ".")) / 100
    else:
        match = _NUMBER_ALONE.match(text.strip())
        if not match:
            return None
        number = float(match.group(1))
        value = number if "." in match.group(1) and number <= 1 else number / 100
    return value if 0 <= value <= 1 else None


def plain(text: str) -> str:
    """Words without case, surrounding blanks and a final period."""
    return " ".join(text.split()).removesuffix(".").casefold()


def yes_or_no(text: str) -> str:
    """POPE's reading: text before the first period, commas dropped; `no` or `not` means no, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if {"No", "not", "no"} & set(words) else "yes"
