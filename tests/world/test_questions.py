"""Every answer, derived again from the question's text and the record's masks; and the balance of answers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import ndimage

from csp_jax.records import Item, Record, decode_mask

SQUARE = np.ones((3, 3), bool)
WORDS = {"only one": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {"fish": "fish", "sheep": "sheep", "bus": "buses", "butterfly": "butterflies"}
PLURALS |= {"octopus": "octopuses", "cactus": "cactuses"}
FORMS = {
    "existence": r"Is there (an?) (?P<a>.+) in the image\?",
    "number": r"(Is there (?P<one>only one)|Are there (?P<many>two|three|four)) (?P<a>.+) in the image\?",
    "size": r"Is the (?P<a>.+) (?P<size>large|small) in this image\?",
    "contact": r"Is there direct contact between the (?P<a>.+) and the (?P<b>.+)\?",
    "left_of": r"Is the (?P<a>.+) to the (?P<side>left|right) of the (?P<b>.+)\?",
    "above": r"Is the (?P<a>.+) (?P<side>above|below) the (?P<b>.+)\?",
    "where": r"Where is the (?P<a>.+)\?",
    "list": r"What is in the image\?",
    "count": r"How many (?P<a>.+) are there\?",
    "neighbour": r"What is (?P<side>to the left of|to the right of|above|below) the (?P<a>.+)\?",
    "size_word": r"What size is the (?P<a>.+)\?",
    "half": r"(?P<side>Left or right|Above or below): where is the (?P<a>.+)\?",
    "touch": r"What touches the (?P<a>.+)\?",
}
DENSE = {"where", "list", "count", "neighbour", "size_word", "touch", "half"}


class Seen:
    """What the masks of a record show."""

    def __init__(self, record: Record):
        self.masks: dict[str, list[np.ndarray]] = defaultdict(list)
        self.regions: dict[str, list[int]] = defaultdict(list)
        for number, region in enumerate(record.regions):
            self.masks[region.keyword].append(decode_mask(region.mask, 80, 80))
            self.regions[region.keyword].append(number)

    def of_plural(self, plural: str) -> str:
        (name,) = [name for name in self.masks if PLURALS.get(name, f"{name}s") == plural]
        return name

    def only(self, name: str) -> np.ndarray:
        (mask,) = self.masks[name]
        return mask

    def centroid(self, name: str) -> tuple[float, float]:
        y, x = ndimage.center_of_mass(self.only(name))
        return x, y

    def side(self, name: str) -> int:
        rows, columns = ndimage.find_objects(self.only(name).astype(int))[0]
        return max(rows.stop - rows.start, columns.stop - columns.start)

    def distance(self, first: str, second: str) -> float:
        """Chessboard distance in pixels between two masks; 1: neighbouring pixels."""
        far = ndimage.distance_transform_cdt(~self.only(first), metric="chessboard")
        return float(far[self.only(second)].min())


def true_answer(item: Item, seen: Seen) -> str:
    match = re.fullmatch(FORMS[item.category], item.question)
    assert match, item.question
    part = match.groupdict()

    def yes(truth: bool) -> str:
        return "yes" if truth else "no"

    match item.category:
        case "existence":
            assert (match[1] == "an") == (part["a"][0] in "aeiou")
            return yes(part["a"] in seen.masks)
        case "number":
            name = part["a"] if part["one"] else seen.of_plural(part["a"])
            asked = WORDS[part["one"] or part["many"]]
            assert abs(len(seen.masks[name]) - asked) <= 1
            return yes(len(seen.masks[name]) == asked)
        case "size":
            assert not 17 < seen.side(part["a"]) < 26
            return yes((seen.side(part["a"]) >= 26) == (part["size"] == "large"))
        case "contact":
            distance = seen.distance(part["a"], part["b"])
            assert distance <= 2 or distance > 6
            return yes(distance <= 2)
        case "left_of" | "above":
            axis = int(item.category == "above")
            difference = seen.centroid(part["b"])[axis] - seen.centroid(part["a"])[axis]
            assert abs(difference) >= 10
            return yes((difference > 0) == (part["side"] in ("left", "above")))
        case "where":
            rows, columns = ndimage.find_objects(seen.only(part["a"]).astype(int))[0]
            centre = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
            return " ".join(str(math.floor(100 * value / 80)) for value in centre)
        case "list":
            return ", ".join(sorted(seen.masks, key=lambda name: min(map(leftness, seen.masks[name]))))
        case "count":
            number = len(seen.masks[seen.of_plural(part["a"])])
            return next(word for word, value in WORDS.items() if value == number and " " not in word)
        case "size_word":
            return "large" if seen.side(part["a"]) >= 26 else "small"
        case "half":
            across = part["side"] == "Left or right"
            rows, columns = ndimage.find_objects(seen.only(part["a"]).astype(int))[0]
            beyond = (columns.start + columns.stop - 80) if across else (rows.start + rows.stop - 80)
            assert abs(beyond) >= 10
            return ("left", "right", "above", "below")[2 * (not across) + (beyond > 0)]
        case "touch":
            others = [name for name in seen.masks if name != part["a"] and len(seen.masks[name]) == 1]
            touching = [name for name in others if seen.distance(part["a"], name) <= 2]
            assert item.truth in touching
            return item.truth
        case "neighbour":
            return nearest(part["a"], part["side"], seen)
    raise AssertionError(item.category)


def leftness(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    return (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2


def nearest(anchor: str, side: str, seen: Seen) -> str:
    axis = int(side in ("above", "below"))
    sign = -1 if side in ("above", "to the left of") else 1
    here = seen.centroid(anchor)[axis]
    away = [
        (sign * (ndimage.center_of_mass(mask)[1 - axis] - here), name)
        for name, masks in seen.masks.items()
        for mask in masks
        if name != anchor
    ]
    return min(pair for pair in away if pair[0] > 0)[1]


@pytest.mark.parametrize("split", ["base", "test"])
def test_every_answer_follows_from_the_masks(records, split):
    asked: Counter[str] = Counter()
    for record in records[split]:
        seen = Seen(record)
        for item in record.items:
            assert item.truth == item.response == true_answer(item, seen), (record.id, item.question)
            assert item.right == 1
            asked[item.category] += 1
    assert set(asked) == set(FORMS) - (DENSE if split == "test" else set())
    assert min(asked.values()) > 100


@pytest.mark.parametrize("split", ["base", "test"])
def test_items_carry_their_regions_candidates_and_subsets(records, split):
    subset = {
        "existence": {"random", "popular", "adversarial"},
        "number": {"attribute"},
        "size": {"attribute"},
    }
    for record in records[split]:
        seen = Seen(record)
        for item in record.items:
            match = re.fullmatch(FORMS[item.category], item.question)
            assert match
            names = [match.groupdict().get(key) for key in "ab"]
            if item.category == "list":
                names = list(seen.masks)
            if item.category == "neighbour":
                names[1] = item.truth
            if item.category == "count" or match.groupdict().get("many"):
                names[0] = seen.of_plural(str(names[0]))
            mentioned = [n for n in names if n is not None]
            assert item.keyword == ("" if item.category == "list" else mentioned[0])
            expected = {number for name in mentioned for number in seen.regions.get(name, [])}
            if item.category == "neighbour":  # one of several instances
                assert set(item.regions) <= expected
                assert len(item.regions) == 2
            else:
                assert sorted(item.regions) == sorted(expected)
            if item.category in DENSE:
                assert (item.candidates, item.rejected, item.subsets) == ((), "", ("dense",))
            else:
                assert item.candidates == ("yes", "no")
                assert {item.response, item.rejected} == {"yes", "no"}
                assert item.subsets
                assert set(item.subsets) <= subset.get(item.category, {"relation"})


def form_of(item: Item) -> str:
    """The question without the names of its objects."""
    match = re.fullmatch(FORMS[item.category], item.question)
    assert match
    part = match.groupdict()
    chosen = (part.get(key) for key in ("one", "many", "size", "side"))
    return item.category + " " + next((value for value in chosen if value), "")


@pytest.mark.parametrize("split", ["base", "test"])
def test_yes_and_no_are_balanced_within_each_form(records, split):
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records[split]:
        for item in record.items:
            if item.candidates and item.category != "existence":
                answers[form_of(item)][item.truth] += 1
    assert len(answers) == 11
    for form, counts in answers.items():
        total = counts.total()
        assert total >= 60, form
        assert abs(counts["yes"] - total / 2) <= 3.5 * math.sqrt(total) / 2, (form, counts)


def test_existence_is_balanced_in_every_scene_and_subset(records):
    for record in records["base"]:
        for subset in ("random", "popular", "adversarial"):
            answers = [i.truth for i in record.items if subset in i.subsets]
            assert answers.count("yes") == answers.count("no") <= 1
    for record in records["test"]:
        number = min(2, len({region.keyword for region in record.regions}))
        for subset in ("random", "popular", "adversarial"):
            answers = [i.truth for i in record.items if subset in i.subsets]
            assert answers.count("yes") == answers.count("no") == number


def test_popular_and_adversarial_negatives_follow_the_statistics(world, records):
    names = [item.name for item in world.classes]
    statistics = world.statistics("test")
    for record in records["test"]:
        present = {names.index(region.keyword) for region in record.regions}
        absent = [index for index in range(len(names)) if index not in present]
        together = statistics.together[sorted(present)].sum(0)
        pools = {
            "popular": (statistics.frequency, 12),
            "adversarial": (together, 6),
            "random": (together * 0, 60),
        }
        for item in record.items:
            if item.category != "existence" or item.truth == "yes":
                continue
            index = names.index(item.keyword)
            for subset in item.subsets:
                score, pool = pools[subset]
                assert sum(score[other] > score[index] for other in absent) < pool, (record.id, item.question)


def test_statistics_are_those_of_the_scenes(world):
    """Counted again in scenes that the statistics never saw."""
    number = 3000
    planner_scenes = np.zeros((number, 60))
    for index in range(number):
        planner_scenes[index, list(world.plan("train", index).classes)] = 1
    statistics = world.statistics("train")
    frequency = planner_scenes.mean(0)
    error = np.sqrt(statistics.frequency * (1 - statistics.frequency) * (1 / number + 1 / statistics.scenes))
    assert (np.abs(frequency - statistics.frequency) <= 4.5 * error).all()
    together = planner_scenes.T @ planner_scenes / number
    np.fill_diagonal(together, 0)
    upper = np.triu_indices(60, 1)
    assert np.corrcoef(together[upper], statistics.together[upper])[0, 1] > 0.9
    assert frequency.max() > 4 * frequency.min()  # unequal, as in photographs


def test_text_alone_predicts_random_existence_no_better_than_popularity_does(world):
    """A predictor that knows only how often each class was asked with yes and with no, against its bound.

    The bound: half the questions fall on classes by frequency (yes), half evenly on absent ones (no).
    """
    frequency = world.statistics("test").frequency.astype(float)
    yes, no = frequency / frequency.sum(), (1 - frequency) / (1 - frequency).sum()
    bound = float(np.maximum(yes, no).sum() / 2)
    assert bound < 0.62
    votes: Counter[str] = Counter()
    right = []
    for index in range(1500):
        for item in world.record("test", index).items:
            if "random" not in item.subsets:
                continue
            if index < 900:
                votes[item.question] += 1 if item.truth == "yes" else -1
            else:
                right.append((votes[item.question] > 0) == (item.truth == "yes"))
    assert np.mean(right) <= bound + 3 * math.sqrt(0.25 / len(right))


def test_text_alone_predicts_attributes_and_relations_at_chance(records):
    votes: Counter[str] = Counter()
    right = []
    for number, record in enumerate(records["base"]):
        for item in record.items:
            if item.category in DENSE | {"existence"}:
                continue
            for key in (form_of(item), f"{form_of(item)} {item.keyword}"):
                if number < 300:
                    votes[key] += 1 if item.truth == "yes" else -1
            if number >= 300:
                guess = votes[f"{form_of(item)} {item.keyword}"] or votes[form_of(item)]
                right.append((guess > 0) == (item.truth == "yes"))
    assert abs(np.mean(right) - 0.5) <= 3.5 * math.sqrt(0.25 / len(right))
