"""What each recipe shows and teaches, read back from its samples and held against the formulas of the design."""

from __future__ import annotations

import collections
import dataclasses
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from recipe_reader import Reader, box_mask, items_of, object_masks, only_picture, pixels

from csp_jax.data.batch import CHOSEN, PLAIN, REJECTED
from csp_jax.data.recipes import base
from csp_jax.data.recipes.evidence import evidence_label, responses
from csp_jax.errors import UserError
from csp_jax.records import Item, Record, decode_mask

SCENES = 60


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("recipes"))


# --- evidence --------------------------------------------------------------------------------------------------


def test_evidence_label_is_the_formula():
    for percent in range(101):
        for prior in (Fraction(1, 2), Fraction(1, 4), Fraction(0)):
            for right in (True, False):
                exact = Fraction(percent) * right + (100 - percent) * prior
                assert abs(evidence_label(percent, right, float(prior)) - exact) <= Fraction(1, 2)
        # yes and no cannot both be likely: the two labels are one probability
        assert evidence_label(percent, True, 0.5) + evidence_label(percent, False, 0.5) == 100


@pytest.mark.parametrize("region", ["box", "mask"])
def test_evidence_asks_both_answers_with_the_labels_of_what_is_visible(reader, region):
    recipe = reader.recipe("evidence", region=region)
    kinds: collections.Counter[str] = collections.Counter()
    for index in range(SCENES):
        record, drawn = reader.record(index), reader.draw(recipe, index)
        picture, items = only_picture(drawn.sample), items_of(record)
        percent = int(picture.confidence)
        masks = object_masks(record) if region == "mask" else [box_mask(record, i) for i in range(len(record.regions))]
        labels = collections.defaultdict(dict)
        for asked in reader.asked(recipe, drawn.sample):
            assert asked.taught.strip() == f"{asked.percent}%</s>"
            assert asked.role == PLAIN
            labels[asked.question][asked.response] = asked.percent
        for question, by_response in labels.items():
            item = items[question]
            assert set(by_response) == set(item.candidates)
            right, wrong = by_response.pop(item.truth), *by_response.values()
            hidden = [(masks[i] & picture.mask).sum() / masks[i].sum() for i in item.regions]
            visible = (100, 0)
            buried = (evidence_label(percent, True, 0.5), evidence_label(percent, False, 0.5))
            if not hidden:
                assert (right, wrong) in (visible, buried)
                kinds["absent"] += 1
                kinds["absent, unmoved"] += (right, wrong) == visible and visible != buried
            elif max(hidden) >= 0.9:
                assert (right, wrong) == buried
                kinds["buried"] += 1
            else:
                assert max(hidden) <= 0.1, "half covered: must not be asked"
                assert (right, wrong) == visible
                kinds["visible"] += 1
    assert min(kinds.values()) > 20, kinds


def test_evidence_leaves_shares_clean_and_elsewhere(reader):
    recipe = reader.recipe("evidence", region="box", items=1, clean=0.3, elsewhere=0.5)
    clean = elsewhere = noised = 0
    for index in range(400):
        record = reader.record(index)
        picture = only_picture(reader.draw(recipe, index).sample)
        if not picture.mask.any():
            clean += 1
            assert picture.confidence == 100
            continue
        noised += 1
        # a region of an object, or the same kind of region where (nearly) no object is
        boxes = [box_mask(record, i) for i in range(len(record.regions))]
        over = [(box & picture.mask).sum() / box.sum() for box in boxes]
        occupied = (np.any(boxes, axis=0) & picture.mask).sum() / picture.mask.sum()
        assert max(over) == 1 or occupied <= 0.1
        elsewhere += max(over) < 1
    assert scipy.stats.binomtest(clean, 400, 0.3).pvalue > 1e-4
    assert 0.1 < elsewhere / noised <= 0.5 + 4 * (0.25 / noised) ** 0.5  # crowded scenes leave no room


def test_evidence_distractor_share(reader):
    """Of the questions about what is not there, the given share keeps its full label beside a buried region."""
    recipe = reader.recipe("evidence", clean=0.0, distractor=0.7, labels="grid", grid=25)
    full = total = 0
    for index in range(100):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        if only_picture(drawn.sample).confidence == 100:
            continue
        for asked in reader.asked(recipe, drawn.sample):
            item = items[asked.question]
            if not item.regions and asked.response == item.truth:
                total, full = total + 1, full + (asked.percent == 100)
    assert total > 100
    assert scipy.stats.binomtest(full, total, 0.7).pvalue > 1e-4


def test_evidence_under_simpo_mirrors_every_label_but_50(reader):
    recipe = reader.recipe("evidence", "simpo", labels="grid", grid=50 // 2)
    plain = reader.recipe("evidence", "sft", labels="grid", grid=25)
    dropped = 0
    for index in range(SCENES):
        drawn, labels = reader.draw(recipe, index), reader.draw(plain, index)
        asked = reader.asked(recipe, drawn.sample) if drawn.sample else []
        chosen, rejected = asked[::2], asked[1::2]
        assert [a.role for a in asked] == [CHOSEN, REJECTED] * (len(asked) // 2)
        for one, other in zip(chosen, rejected, strict=True):
            assert (one.question, one.response) == (other.question, other.response)
            assert one.percent + other.percent == 100
            assert one.percent != 50
        wanted = [(a.question, a.response, a.percent) for a in reader.asked(plain, labels.sample)]
        assert [(a.question, a.response, a.percent) for a in chosen] == [w for w in wanted if w[2] != 50]
        fifty = sum(percent == 50 for *_, percent in wanted)
        assert drawn.counts["no_mirror"] == fifty
        dropped += fifty
    assert dropped > 20


def preferences(record: Record, **changes: object) -> Record:
    """The record with its yes/no items as pairs of a preferred and a rejected answer: no candidates, no truth."""
    asked = [item for item in record.items if item.candidates]
    items = [dataclasses.replace(item, truth="", candidates=(), **changes) for item in asked]
    return dataclasses.replace(record, items=tuple(items))


def test_evidence_about_free_answers_has_no_prior(reader):
    """c for the preferred answer, 0 for the rejected one; an item without a known object has no label."""
    recipe = reader.recipe("evidence", region="box", free_form=True)
    kinds: collections.Counter[str] = collections.Counter()
    for index in range(SCENES):
        record = preferences(reader.record(index))
        drawn = recipe(record, np.random.default_rng(index))
        picture, items = only_picture(drawn.sample), items_of(record)
        percent = int(picture.confidence)
        labels = collections.defaultdict(dict)
        for asked in reader.asked(recipe, drawn.sample):
            labels[asked.question][asked.response] = asked.percent
        assert drawn.counts["skipped_without_object"] == sum(not item.regions for item in record.items)
        for question, by_response in labels.items():
            item = items[question]
            masks = [box_mask(record, i) for i in item.regions]
            hidden = max((mask & picture.mask).sum() / mask.sum() for mask in masks)
            assert hidden >= 0.9 or hidden <= 0.1
            kept = percent if hidden >= 0.9 else 100
            assert by_response == {item.response: evidence_label(kept, True, 0.0), item.rejected: 0}
            assert by_response[item.response] == kept
            kinds["buried" if hidden >= 0.9 else "visible"] += 1
    assert min(kinds.values()) > 20, kinds


def test_evidence_takes_free_answers_only_on_request_and_where_it_knows_them(reader):
    generator = np.random.default_rng(0)
    record = preferences(reader.record(0))
    drawn = reader.recipe("evidence")(record, generator)
    assert (drawn.sample, drawn.counts) == (None, {"skipped_without_candidates": 1})
    unverified = preferences(reader.record(0), right=-1)
    drawn = reader.recipe("evidence", free_form=True)(unverified, generator)
    assert (drawn.sample, drawn.counts) == (None, {"skipped_without_truth": len(record.items)})


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Item("a", "?", "a cat", right=1, rejected="a dog"), {"a cat": True, "a dog": False}),
        (Item("a", "?", "a cat", right=1, rejected="a cat"), {"a cat": True}),
        (Item("a", "?", "a cat", right=0, rejected="a dog"), {"a cat": False}),
        (Item("a", "?", "a cat", right=0, truth="a dog"), {"a dog": True, "a cat": False}),
        (Item("a", "?", "a cat", right=1, truth="cat"), {"cat": True, "a cat": True}),
        (Item("a", "?", "a cat", right=-1, rejected="a dog"), {}),
        (Item("a", "?", "yes", right=1, candidates=("yes", "no")), {}),
    ],
)
def test_which_responses_are_known_to_be_right_or_wrong(item, expected):
    assert responses(item)[0] == expected


def test_evidence_draws_where_no_asked_item_has_an_object(reader):
    """A region that belongs to none of the questions is still something to bury beside them."""
    record = reader.record(0)
    absent = tuple(item for item in record.items if item.candidates and not item.regions)
    assert absent
    assert record.regions
    drawn = reader.recipe("evidence", clean=0.0)(dataclasses.replace(record, items=absent), np.random.default_rng(0))
    assert only_picture(drawn.sample).mask.any()


def test_evidence_decodes_a_region_once(reader, monkeypatch):
    decoded = []

    def counting(mask: np.ndarray, height: int, width: int) -> np.ndarray:
        decoded.append(id(mask))
        return decode_mask(mask, height, width)

    monkeypatch.setattr(base, "decode_mask", counting)
    recipe = reader.recipe("evidence", clean=0.0, region="mask", elsewhere=1.0)
    for index in range(10):
        decoded.clear()
        reader.draw(recipe, index)
        assert len(decoded) == len(set(decoded)) == len(reader.record(index).regions)


# --- paper -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["mask", "box", "global"])
def test_paper_labels_right_responses_with_c(reader, region):
    recipe = reader.recipe("paper", region=region)
    seen = set()
    for index in range(SCENES):
        record, drawn = reader.record(index), reader.draw(recipe, index)
        picture, items = only_picture(drawn.sample), items_of(record)
        seen.add(picture.confidence)
        masks = object_masks(record) if region == "mask" else [box_mask(record, i) for i in range(len(record.regions))]
        hidden = [not (mask & ~picture.mask).any() for mask in masks]
        buried = set()
        for asked in reader.asked(recipe, drawn.sample):
            item = items[asked.question]
            assert asked.percent == picture.confidence
            assert asked.response == item.truth == item.response
            assert item.regions  # never about what is not there
            if region != "global":
                assert any(hidden[i] for i in item.regions)
            buried |= set(item.regions)
        without = sum(not item.regions and bool(item.candidates) for item in record.items)
        assert drawn.counts["skipped_without_object"] == without
        if region == "global":
            assert picture.mask.all() or picture.confidence == 100
            continue
        parts = [mask for i, mask in enumerate(masks) if i in buried and hidden[i]]
        np.testing.assert_array_equal(np.any(parts, axis=0), picture.mask)
    assert len(seen) > 30


def test_paper_under_simpo_drops_fifty_and_mirrors_the_rest(reader):
    recipe = reader.recipe("paper", "simpo", labels="grid", grid=25)
    fifty = 0
    for index in range(SCENES):
        drawn = reader.draw(recipe, index)
        if drawn.sample is None or not drawn.sample.groups:
            assert drawn.counts["no_mirror"] > 0
            fifty += 1
            continue
        percent = int(only_picture(drawn.sample).confidence)
        assert percent != 50
        assert drawn.counts["no_mirror"] == 0
        asked = reader.asked(recipe, drawn.sample)
        assert [(a.role, a.percent) for a in asked] == [(CHOSEN, percent), (REJECTED, 100 - percent)] * (
            len(asked) // 2
        )
    assert scipy.stats.binomtest(fifty, SCENES, 1 / 5).pvalue > 1e-4


def test_a_record_without_objects_is_skipped_and_counted(reader):
    record = reader.record(0)
    absent = tuple(item for item in record.items if not item.regions)
    bare = Record(record.id, record.dataset, record.image_id, record.images, (), absent)
    drawn = reader.recipe("paper")(bare, np.random.default_rng(0))
    assert drawn.sample is None
    assert drawn.counts == {"skipped_without_object": len(absent)}
    free = Record(record.id, record.dataset, record.image_id, record.images, (), (Item("a", "What is it?", "a cat"),))
    drawn = reader.recipe("evidence")(free, np.random.default_rng(0))
    assert drawn.sample is None
    assert drawn.counts == {"skipped_without_candidates": 1}


# --- what all share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "evidence"])
@pytest.mark.parametrize("objective", ["sft", "simpo"])
def test_retention_questions_come_beside(reader, name, objective):
    recipe = reader.recipe(name, objective, items=2, retention_items=3, clean=1.0)
    for index in range(20):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        ordinary = [a for a in reader.asked(recipe, drawn.sample) if a.percent is None]
        assert len({a.question for a in ordinary}) == len(ordinary) == 3
        for asked in ordinary:
            assert asked.role == PLAIN
            assert asked.response == items[asked.question].truth
            assert asked.taught.strip() == f"{asked.response}</s>"


def test_retention_asks_about_what_can_be_seen(reader):
    """Under `evidence` no ordinary question is about an object under noise; there are buried ones to ask about."""
    recipe = reader.recipe("evidence", items=2, retention_items=3, clean=0.0, elsewhere=0.0, region="mask")
    hidden = 0
    for index in range(SCENES):
        drawn, record = reader.draw(recipe, index), reader.record(index)
        buried, items, masks = only_picture(drawn.sample).mask, items_of(record), object_masks(record)
        covered = {i for i, mask in enumerate(masks) if (mask & buried).sum() > 0.1 * mask.sum()}
        hidden += sum(not covered.isdisjoint(item.regions) for item in record.items)
        for asked in reader.asked(recipe, drawn.sample):
            if asked.percent is None:
                assert covered.isdisjoint(items[asked.question].regions)
    assert hidden > SCENES


def test_categories_take_turns():
    """However many are taken, no category has two more than another that still has items; the first one is any."""
    items = [
        Item(f"{kind}{i}", "?", "a", category=kind) for kind, n in (("a", 9), ("b", 3), ("c", 1)) for i in range(n)
    ]
    firsts: collections.Counter[str] = collections.Counter()
    for seed in range(600):
        turns = base.in_turns(items, np.random.default_rng(seed))
        assert sorted(item.id for item in turns) == sorted(item.id for item in items)
        firsts[turns[0].id] += 1
        for count in range(len(items)):
            taken = collections.Counter(item.category for item in turns[:count])
            left = {item.category for item in turns[count:]}
            assert all(taken[more] - taken[less] < 2 for more in taken for less in left)
    assert scipy.stats.chisquare([firsts[item.id] for item in items]).pvalue > 1e-4


@pytest.mark.parametrize("name", ["paper", "evidence", "answers", "original"])
def test_samples_are_the_picture_and_one_shared_prompt(reader, name):
    recipe = reader.recipe(name)
    for index in range(5):
        drawn, record = reader.draw(recipe, index), reader.record(index)
        np.testing.assert_array_equal(only_picture(drawn.sample).canvas, pixels(record))
        text = recipe.family.tokenizer.decode(list(drawn.sample.prompt), skip_special_tokens=False)
        assert text == "<s>USER: " + "<image>" * 64 + "\n"
        again = reader.draw(pickle.loads(pickle.dumps(recipe)), index)
        assert (again.sample.prompt, again.sample.groups, again.counts) == (
            drawn.sample.prompt,
            drawn.sample.groups,
            drawn.counts,
        )


def test_items_limits_what_is_asked(reader):
    for name, each in (("paper", 1), ("evidence", 2), ("answers", 1), ("original", 1)):
        recipe = reader.recipe(name, items=2)
        for index in range(10):
            asked = reader.asked(recipe, reader.draw(recipe, index).sample)
            assert len({a.question for a in asked}) <= 2
            assert len(asked) <= 2 * each


def test_labels_are_uniform_over_their_grid(reader):
    for labels, grid, values in (("uniform", 10, np.arange(101)), ("grid", 10, np.arange(0, 101, 10))):
        recipe = reader.recipe("paper", items=1, labels=labels, grid=grid)
        generator = np.random.default_rng(3)
        found = collections.Counter(recipe.draw_percent(generator) for _ in range(5000))
        assert set(found) == set(values.tolist())
        assert scipy.stats.chisquare([found[v] for v in values.tolist()]).pvalue > 1e-4


def test_what_finds_no_room_is_counted(reader):
    small = {"prompt": 128, "groups": 1, "length": 60, "targets": 6, "responses": 8}
    recipe, roomy = reader.recipe("evidence", shape=small), reader.recipe("evidence")
    for index in range(10):
        drawn, whole = reader.draw(recipe, index), reader.draw(roomy, index)
        questions = {a.question for a in reader.asked(roomy, whole.sample)}
        kept = {a.question for a in reader.asked(recipe, drawn.sample)}
        assert drawn.counts["bundles_left_over"] == len(questions) - len(kept) > 0


def test_noise_identity_is_the_records(reader):
    recipe = reader.recipe("evidence")
    identities = [only_picture(reader.draw(recipe, index).sample).noise_id for index in range(50)]
    assert len(set(identities)) == 50
    again = only_picture(reader.draw(recipe, 3, seed=8).sample)
    assert again.noise_id == identities[3]
    assert all(0 <= identity < 2**32 for identity in identities)


def test_two_pictures_are_refused(reader):
    record = reader.record(0)
    double = Record(record.id, record.dataset, record.image_id, record.images * 2, record.regions, record.items)
    with pytest.raises(UserError, match="one picture"):
        reader.recipe("evidence")(double, np.random.default_rng(0))


# --- answers and original --------------------------------------------------------------------------------------


def test_answers_are_the_true_ones(reader):
    recipe = reader.recipe("answers")
    for index in range(20):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        picture = only_picture(drawn.sample)
        assert not picture.mask.any()
        assert picture.confidence == 100
        asked = reader.asked(recipe, drawn.sample)
        assert {(a.question, a.response) for a in asked} == {(q, item.response) for q, item in items.items()}


def test_early_answers_come_right_behind_the_deciding_word(reader):
    recipe = reader.recipe("answers", early_answers=True)
    decode, rests = recipe.family.tokenizer.decode, collections.Counter()
    for index in range(10):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        branches = [branch for group in drawn.sample.groups for branch in group]
        early = [branch for branch in branches if branch.tokens[-1] != branches[0].tokens[-1]]  # no end of answer
        assert len(early) == sum(bool(item.keyword) for item in items.values())
        for branch in early:
            fed = decode([t for t, weight in zip(branch.tokens, branch.weights) if not weight]).strip()
            said = decode([t for t, weight in zip(branch.tokens, branch.weights) if weight]).strip()
            whole = [q for q, item in items.items() if q.startswith(fed) and item.response == said]
            rests[min((q.removeprefix(fed) for q in whole), key=len)] += 1
    assert set(rests) == {"?", " in the image?", " in this image?", " are there?"}


@pytest.mark.parametrize("early", [False, True])
def test_verifications_say_whether_a_response_is_right(reader, early):
    recipe = reader.recipe("answers", items=1, verify_items=6, early_answers=early)
    decode, right = recipe.family.tokenizer.decode, collections.Counter()
    for index in range(30):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        for branch in (branch for group in drawn.sample.groups for branch in group):
            fed = decode([t for t, weight in zip(branch.tokens, branch.weights) if not weight])
            match = re.search(r"A model was asked: (.*\?) It answered: (yes|no)(\. Is this right\? ASSISTANT:)?$", fed)
            if match:
                said = decode([t for t, weight in zip(branch.tokens, branch.weights) if weight]).strip()
                assert said == ("yes" if items[match[1]].truth == match[2] else "no")
                right[said, match[2], match[3] is None] += 1
    assert len(right) == (8 if early else 4)
    assert sum(right.values()) == 30 * 6 * (1 + early)
    assert min(right.values()) > 20


def test_answers_of_some_categories(reader):
    recipe = reader.recipe("answers", categories=["existence", "where"])
    for index in range(5):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        found = {items[a.question].category for a in reader.asked(recipe, drawn.sample)}
        assert found == {item.category for item in items.values()} & {"existence", "where"}


def test_taught_confidence_has_its_levels_whatever_the_response(reader):
    levels = {80: 0.1, 95: 0.3, 100: 0.6}
    recipe = reader.recipe("answers", items=1, confidence_items=8, confidence_levels=levels)
    found: collections.Counter[int] = collections.Counter()
    right: collections.Counter[tuple[bool, int]] = collections.Counter()
    for index in range(SCENES):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        queries = [a for a in reader.asked(recipe, drawn.sample) if a.percent is not None]
        assert len(queries) == 8
        for asked in queries:
            found[asked.percent] += 1
            right[asked.response == items[asked.question].truth, asked.percent] += 1
    assert set(found) == set(levels)
    total = sum(found.values())
    assert scipy.stats.chisquare([found[v] for v in levels], [total * p for p in levels.values()]).pvalue > 1e-4
    table = [[right[truth, level] for level in levels] for truth in (True, False)]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4
    assert scipy.stats.binomtest(sum(table[0]), total, 0.5).pvalue > 1e-4


def test_slots_are_named_after_what_covers_them(reader):
    recipe = reader.recipe("answers", name_slots=True, slot_facts=("count", "size_word"))
    tokenizer = recipe.family.tokenizer
    named: collections.Counter[str] = collections.Counter()
    facts: collections.Counter[str] = collections.Counter()
    for index in range(20):
        record, drawn = reader.record(index), reader.draw(recipe, index)
        masks, keywords = object_masks(record), [region.keyword for region in record.regions]
        names = dict(drawn.sample.slot_names)
        slots = [i for i, token in enumerate(drawn.sample.prompt) if token == recipe.family.image_token]
        assert sorted(names) == slots
        for number, slot in enumerate(slots):
            row, column = 10 * (number // 8), 10 * (number % 8)
            cover = [mask[row : row + 10, column : column + 10].mean() for mask in masks]
            best = int(np.argmax(cover))
            words = ["scene"]
            if cover[best] > 0.25:
                count = ("one", "two", "three", "four")[keywords.count(keywords[best]) - 1]
                sizes = [i.response for i in record.items if i.category == "size_word" and i.regions == (best,)]
                words = [keywords[best], count, *sizes]
                facts.update(words[1:])
            ids = [tokenizer.encode(f" {word}", add_special_tokens=False).ids[0] for word in words]
            assert sorted(names[slot]) == sorted(ids), words
            named[words[0]] += 1
    assert len(named) > 10
    assert {"one", "two", "small", "large"} <= set(facts)


def test_original_pairs_the_answers_themselves(reader):
    recipe = reader.recipe("original", "simpo")
    for index in range(10):
        drawn, items = reader.draw(recipe, index), items_of(reader.record(index))
        asked = reader.asked(recipe, drawn.sample)
        assert [a.role for a in asked] == [CHOSEN, REJECTED] * (len(asked) // 2)
        for one, other in zip(asked[::2], asked[1::2], strict=True):
            item = items[one.question]
            assert (one.response, other.response, other.question) == (item.response, item.rejected, one.question)
        assert not only_picture(drawn.sample).mask.any()
