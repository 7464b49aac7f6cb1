"""Trees, packing and grouping: whatever went in can be read back from the arrays by walking the parents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csp_jax.data.batch import (
    CHOSEN,
    PLAIN,
    REJECTED,
    Batch,
    Branch,
    Packer,
    Picture,
    Place,
    Sample,
    Shape,
    Tree,
    empty_batch,
    merge_branches,
    split_prefix,
)
from csp_jax.data.recipes.base import group_bundles
from csp_jax.errors import UserError

quick = settings(deadline=None, max_examples=100)

SHAPE = Shape(rows=3, prompt=14, groups=4, length=30, targets=30, responses=12, pictures=3, canvas=(2, 3))
# few words, so that branches begin alike
sequences = st.lists(st.integers(1, 3), min_size=1, max_size=7).map(tuple)
weight = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    tokens = draw(sequences)
    weights = draw(st.lists(weight, min_size=len(tokens), max_size=len(tokens)))
    return Branch(tokens, tuple(weights), draw(st.sampled_from([PLAIN, CHOSEN, REJECTED])))


groups = st.lists(branches(), min_size=1, max_size=4).map(tuple)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    count = draw(st.integers(0, 2))
    prompt = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=7)))
    pictures = tuple(
        Picture(
            np.full((2, 3, 3), draw(st.integers(0, 255)), np.uint8),
            np.full((2, 3), draw(st.booleans())),
            float(draw(st.integers(0, 100))),
            draw(st.integers(0, 2**32 - 1)),
        )
        for _ in range(count)
    )
    words = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
    names = draw(st.lists(st.tuples(st.integers(0, len(prompt) - 1), words), max_size=3))
    return Sample(prompt, pictures, tuple(draw(st.lists(groups, max_size=3))), tuple(dict(names).items()))


def wanted_targets(branch: Branch) -> list[tuple[tuple[int, ...], float]]:
    """Each scored token with all that comes before it, and its weight."""
    return [(branch.tokens[: i + 1], w) for i, w in enumerate(branch.weights) if w]


def walk(tree: Tree, node: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while node >= 0:
        tokens.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(tokens))


@quick
@given(groups)
def test_a_tree_holds_every_branch_once(group):
    tree = merge_branches(group)
    for number, branch in enumerate(group):
        found = [((*walk(tree, parent), token), w) for token, parent, w, of in tree.targets if of == number]
        assert found == wanted_targets(branch)
    # exactly the beginnings of the branches, each once: what nothing follows is not fed
    wanted = {branch.tokens[:end] for branch in group for end in range(1, len(branch.tokens))}
    nodes = [walk(tree, node) for node in range(len(tree.tokens))]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == wanted
    assert all(parent < node for node, parent in enumerate(tree.parents))


def read_back(batch: Batch, shape: Shape, row: int, slot: int, count: int) -> tuple[tuple[int, ...], int]:
    """The tokens from a target up to the prompt, and the prompt index from which they hang."""
    assert slot < batch.target_token.shape[1]
    tokens, at = [int(batch.target_token[row, slot])], int(batch.target_parent[row, slot])
    group = slot // shape.targets
    for _ in range(count):
        if at < shape.prompt:
            break
        assert group == (at - shape.prompt) // shape.length  # a target sees its own group alone
        tokens.append(int(batch.tokens[row, at - shape.prompt]))
        at = int(batch.parent[row, at - shape.prompt])
    assert at < shape.prompt
    return tuple(reversed(tokens)), at


def check_sample(batch: Batch, shape: Shape, sample: Sample, place: Place, start: int, picture: int) -> None:
    row, end = place.row, start + len(sample.prompt)
    np.testing.assert_array_equal(batch.prompt_tokens[row, start:end], sample.prompt)
    segment = set(batch.prompt_segment[row, start:end].tolist())
    assert len(segment) == 1
    assert segment != {0}
    slots = batch.slot_name[row, start:end].tolist()
    names = {i: tuple(t for t in tokens if t >= 0) for i, tokens in enumerate(slots) if tokens[0] >= 0}
    assert names == dict(sample.slot_names)
    for number, item in enumerate(sample.pictures):
        at = (row, picture + number)
        np.testing.assert_array_equal(batch.canvas[at], item.canvas)
        np.testing.assert_array_equal(batch.mask[at], item.mask)
        assert (batch.confidence[at], batch.noise_id[at]) == (item.confidence, item.noise_id)
    for number, branch in enumerate(branch for group in sample.groups for branch in group):
        response = place.response + number
        assert batch.role[row, response] == branch.role
        slots = np.flatnonzero((batch.target_response[row] == response) & (batch.target_weight[row] != 0))
        found = []
        for slot in slots:
            tokens, root = read_back(batch, shape, row, int(slot), len(branch.tokens))
            assert root == end - 1  # the prompt's last token
            found.append((tokens, float(batch.target_weight[row, slot])))
        assert found == wanted_targets(branch)


@quick
@given(st.lists(samples(), max_size=7), st.booleans())
def test_packed_samples_can_be_read_back(many, share):
    packer = Packer(SHAPE)
    places = [packer.add(sample, share_rows=share) for sample in many]
    used = [(0, 0)] * SHAPE.rows  # prompt tokens and pictures
    weights = 0.0
    for sample, place in zip(many, places, strict=True):
        if place is None:
            continue
        start, picture = used[place.row]
        check_sample(packer.batch, SHAPE, sample, place, start, picture)
        used[place.row] = (start + len(sample.prompt), picture + len(sample.pictures))
        weights += sum(sum(branch.weights) for group in sample.groups for branch in group)
    # and nothing else is in the batch
    assert packer.batch.target_weight.sum() == pytest.approx(weights)
    for row, (tokens, pictures) in enumerate(used):
        assert not packer.batch.prompt_segment[row, tokens:].any()
        assert not packer.batch.mask[row, pictures:].any()
        assert (packer.batch.confidence[row, pictures:] == 100).all()
    if not share:
        rows = [place.row for place in places if place is not None]
        assert rows == list(range(len(rows)))


@quick
@given(st.lists(samples(), max_size=7))
def test_segments_of_a_row_differ(many):
    packer = Packer(SHAPE)
    rows = [place.row for place in map(packer.add, many) if place is not None]
    for row in range(SHAPE.rows):
        segments = set(packer.batch.prompt_segment[row].tolist()) - {0}
        assert segments == set(range(1, rows.count(row) + 1))


def test_a_full_batch_takes_no_more():
    sample = Sample((1,) * 8, (), ())
    packer = Packer(dataclasses.replace(SHAPE, rows=2))
    assert [packer.add(sample) for _ in range(3)] == [Place(0, 0, 0), Place(1, 0, 0), None]


LONG = Branch((1,) * 40, (1.0,) * 40)
PICTURE = Picture(np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), bool))


@pytest.mark.parametrize(
    ("sample", "field", "needed"),
    [
        (Sample((1,) * 15, (), ()), "prompt", 15),
        (Sample((1,), (PICTURE,) * 4, ()), "pictures", 4),
        (Sample((1,), (), ((LONG,),)), "length", 39),
        (Sample((1,), (), ((Branch((1,), (1.0,)),),) * 5), "groups", 5),
        (Sample((1,), (), ((Branch((1,), (1.0,)),) * 13,)), "responses", 13),
        (Sample((1,), (), ((Branch((1,) * 16, (1.0,) * 16),) * 2,)), "targets", 32),
    ],
)
def test_what_never_fits_is_refused(sample, field, needed):
    with pytest.raises(UserError, match=f"needs {needed}") as caught:
        Packer(SHAPE).add(sample)
    assert (caught.value.field, caught.value.value) == (f"shape.{field}", getattr(SHAPE, field))


def test_a_batch_without_pictures():
    batch = empty_batch(dataclasses.replace(SHAPE, canvas=None))
    assert batch.canvas is None
    assert batch.mask is None
    assert batch.confidence.shape == (3, 0)


@quick
@given(
    st.lists(st.lists(branches(), min_size=1, max_size=2).map(tuple), max_size=12),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(1, 12),
)
def test_grouped_bundles_are_all_there_or_counted(bundles, count, length, targets):
    bundles = [tuple(dataclasses.replace(branch) for branch in bundle) for bundle in bundles]  # no two the same object
    owner = {id(branch): number for number, bundle in enumerate(bundles) for branch in bundle}
    groups, left = group_bundles(bundles, count, length, targets)
    assert len(groups) <= count
    placed: list[int] = []
    for group in groups:
        tree = merge_branches(group)
        assert len(tree.tokens) <= length
        assert len(tree.targets) <= targets
        numbers = list(dict.fromkeys(owner[id(branch)] for branch in group))
        # bundles stay whole and in order: a rejected response follows its chosen one
        assert [id(branch) for branch in group] == [id(branch) for n in numbers for branch in bundles[n]]
        placed += numbers
    assert len(set(placed)) == len(placed) == len(bundles) - left
    # what is left over fits no group even alone, or the groups are all in use
    alone = [merge_branches(bundle) for bundle in bundles]
    fits = sum(len(tree.tokens) <= length and len(tree.targets) <= targets for tree in alone)
    assert left >= len(bundles) - fits
    assert left == len(bundles) - fits or len(groups) == count


@quick
@given(st.lists(sequences, min_size=1, max_size=5), st.integers(0, 4))
def test_the_shared_prefix_is_the_longest(many, at_least):
    def common(length: int) -> bool:
        return all(s[:length] == many[0][:length] and len(s) > length for s in many)

    wanted = max(length for length in range(len(many[0])) if common(length))
    if wanted < at_least:
        with pytest.raises(ValueError, match="share"):
            split_prefix(many, at_least)
    else:
        assert split_prefix(many, at_least) == wanted
