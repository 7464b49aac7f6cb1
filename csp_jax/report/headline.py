"""The sentence at the top of the page and the few figures under it, computed from this run's results."""

from __future__ import annotations

from dataclasses import dataclass

from csp_jax.report.book import ResultBook
from csp_jax.report.series import LABELS, Key, colour_class, label
from csp_jax.report.tables import number

BASE = Key("base", "")
# Which model the headline is about: the first of these in the run, whatever its figures are.
SUBJECTS = (
    Key("sft+simpo", "evidence"),
    Key("sft+simpo", "paper"),
    Key("sft", "evidence"),
    Key("sft", "paper"),
)
FACTS = (
    ("ece", "ECE"),
    ("brier", "Brier"),
    ("auc_correctness", "AUC"),
    ("accuracy", "Accuracy by higher confidence"),
    ("direct_accuracy", "Direct-answer accuracy"),
)
COUNT_WORDS = {1: "the one split", 2: "both splits", 3: "three splits", 4: "four splits", 5: "five splits"}


@dataclass(frozen=True)
class Fact:
    """A mean over the splits, before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Headline:
    """The sentence, and the means that stand under it."""

    sentence: str
    subject: str
    colour: str
    facts: list[Fact]


def headline(book: ResultBook) -> Headline:
    """What happened to the mean ECE between the base and the trained model, or that it cannot be said."""
    over = "over " + COUNT_WORDS.get(len(book.splits), f"{len(book.splits)} splits")
    before = book.mean(BASE, "ece")
    for subject in SUBJECTS:
        after = book.mean(subject, "ece")
        if before is None or after is None:
            continue
        start, end = number(before.value), number(after.value)
        moves = "falls" if after.value < before.value else "rises"
        change = f"stays at {end}" if start == end else f"{moves} from {start} to {end}"
        name = f"{LABELS[subject.model]} with the {subject.recipe} recipe"
        sentence = f"Mean calibration error (ECE) {over} {change} after {name}."
        return Headline(sentence, label(subject), colour_class(subject), _facts(book, subject))
    if before is not None:
        return Headline(f"The base model's mean calibration error (ECE) {over} is {number(before.value)}.", "", "", [])
    return Headline("This run has no base model with an ECE on every split, so there is no headline.", "", "", [])


def _facts(book: ResultBook, subject: Key) -> list[Fact]:
    pairs = [(name, book.mean(BASE, metric), book.mean(subject, metric)) for metric, name in FACTS]
    return [Fact(name, number(a.value), number(b.value)) for name, a, b in pairs if a and b]
