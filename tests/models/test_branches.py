"""One prompt and its branches against every sequence alone: the same log-probabilities and gradients; and isolation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import IMAGE_TOKEN, SIDE, SLOTS, change, difference, tiny_model

from csp_jax.data.batch import PLAIN, Batch, Branch, Packer, Picture, Place, Sample, Shape, empty_batch, merge_branches
from csp_jax.data.packing import pack
from csp_jax.losses.logprobs import score
from csp_jax.models.attention import LIBRARIES
from csp_jax.models.interface import segment_positions
from csp_jax.perturb import to_canvas

pytestmark = pytest.mark.usefixtures("exact")

PROMPT, FED, SCORED, GROUPS, PICTURES = 40, 24, 28, 4, 4
SHARED = Shape(2, PROMPT, GROUPS, FED, SCORED, 24, PICTURES, (SIDE, SIDE))
ALONE = Shape(48, 48, 1, 0, 40, 1, 2, (SIDE, SIDE))  # a sequence a row, all of it prompt


class Draw:
    """Random prompts, branches and trees over few words, so that branches often begin alike."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def words(self, low: int, high: int, vocabulary: tuple[int, int] = (4, 96)) -> tuple[int, ...]:
        count = int(self.generator.integers(low, high + 1))
        return tuple(int(token) for token in self.generator.integers(*vocabulary, count))

    def weights(self, count: int, share: float) -> tuple[float, ...]:
        kept = self.generator.random(count) < share
        kept[-1] = True
        return tuple(float(w) for w in self.generator.uniform(-1, 1, count) * kept)

    def branch(self, tokens: Sequence[int], share: float = 0.7) -> Branch:
        return Branch(tuple(tokens), self.weights(len(tokens), share), PLAIN)

    def picture(self) -> Picture:
        canvas = self.generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Picture(canvas, np.zeros((SIDE, SIDE), bool))

    def prompt(self, pictures: int) -> tuple[int, ...]:
        tokens = (1, *self.words(0, 2))
        for _ in range(pictures):
            tokens += (IMAGE_TOKEN,) * SLOTS + self.words(1, 2)
        return tokens

    def sample(self, groups: Sequence[Sequence[Branch]], pictures: int = 1) -> Sample:
        prompt, images = self.prompt(pictures), tuple(self.picture() for _ in range(pictures))
        return Sample(prompt, images, tuple(tuple(group) for group in groups))

    def tree(self, branches: int) -> list[Branch]:
        """Branches that fork anywhere: each takes up an earlier one's beginning."""
        grown: list[tuple[int, ...]] = [self.words(2, 6)]
        for _ in range(branches - 1):
            stem = grown[int(self.generator.integers(len(grown)))]
            grown.append(stem[: int(self.generator.integers(1, len(stem) + 1))] + self.words(1, 4, (4, 9)))
        return [self.branch(tokens) for tokens in grown]


def flat(draw: Draw) -> list[Sample]:
    return [draw.sample([[draw.branch(draw.words(2, 8))] for _ in range(4)]) for _ in range(2)]


def deep(draw: Draw) -> list[Sample]:
    """As deep as a group allows, with a fork near the end: ancestors far away are ancestors too."""
    stem = draw.words(FED - 2, FED - 2)
    return [draw.sample([[draw.branch((*stem, 5, 6), 0.3), draw.branch((*stem, 7), 0.3)]]) for _ in range(2)]


def trees(draw: Draw) -> list[Sample]:
    return [draw.sample([draw.tree(5)]) for _ in range(2)]


def candidates_in_the_query(draw: Draw) -> list[Sample]:
    """Query, one of two candidates (scored too), the query's end, one of two answers."""
    head, tail = draw.words(3, 3), draw.words(2, 2)
    words, answers = ((10, 11), (12,)), ((20, 21), (20, 22))
    branches = [
        Branch(
            (*head, *word, *tail, *answer),
            (0.0,) * 3 + (0.5,) * len(word) + (0.0,) * 2 + draw.weights(2, 1.0),
        )
        for word in words
        for answer in answers
    ]
    return [draw.sample([branches])]


def packed(draw: Draw) -> list[Sample]:
    """Five samples over two rows, of one, two or no pictures."""
    return [draw.sample([draw.tree(3)], pictures) for pictures in (1, 2, 1, 0, 1)]


def bundles(draw: Draw) -> list[Sample]:
    """Several unrelated questions in each group, as the recipes fill them."""
    return [draw.sample([[*draw.tree(2), *draw.tree(2)], [*draw.tree(2), *draw.tree(1)]]) for _ in range(2)]


SCENES = {
    "flat": flat,
    "deep": deep,
    "trees": trees,
    "candidates": candidates_in_the_query,
    "packed": packed,
    "together": packed,  # and trees of several samples in a group
    "bundles": bundles,
}


def alone(samples: Sequence[Sample]) -> Batch:
    """Each branch as one chain of its own in a row of its own, targets at their places; no tree anywhere."""
    batch = empty_batch(ALONE)
    chains = [(sample, branch) for sample in samples for group in sample.groups for branch in group]
    for row, (sample, branch) in enumerate(chains):
        tokens = sample.prompt + branch.tokens[:-1]
        batch.prompt_tokens[row, : len(tokens)] = tokens
        batch.prompt_segment[row, : len(tokens)] = 1
        for number, picture in enumerate(sample.pictures):
            batch.canvas[row, number] = picture.canvas
        count = len(branch.tokens)
        batch.target_token[row, :count] = branch.tokens
        batch.target_weight[row, :count] = branch.weights
        batch.target_parent[row, :count] = np.arange(count) + len(sample.prompt) - 1
    return batch


Evaluate = Callable[[Batch], tuple[np.ndarray, nnx.State]]


@pytest.fixture(scope="module")
def evaluate() -> Evaluate:
    return evaluation("xla")


@pytest.fixture(scope="module", params=["pallas_interpret", "splash_interpret", "cudnn_by_xla"])
def evaluate_otherwise(request) -> tuple[str, Evaluate]:
    return request.param, evaluation(request.param)


def evaluation(attention: str) -> Evaluate:
    """Log-probabilities, and the gradient of their sum weighted by the targets' weights; compiled once a shape."""
    model = tiny_model(seed=1)
    model.attention = attention
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> tuple[jax.Array, nnx.State]:
        def weighted(state: nnx.State) -> tuple[jax.Array, jax.Array]:
            log_probs = score(nnx.merge(graphdef, state), batch, to_canvas(batch.canvas)).log_probs
            return (log_probs * batch.target_weight).sum(), log_probs

        (_, log_probs), gradient = jax.value_and_grad(weighted, has_aux=True)(state)
        return log_probs, gradient

    def call(batch: Batch) -> tuple[np.ndarray, nnx.State]:
        log_probs, gradient = run(state, batch)
        return np.asarray(log_probs), gradient

    return call


def place_all(shape: Shape, samples: Sequence[Sample], *, share_rows: bool) -> tuple[Batch, list[Place]]:
    packer = Packer(shape)
    places = [packer.add(sample, share_rows=share_rows) for sample in samples]
    assert None not in places
    return packer.batch, [place for place in places if place is not None]


def place_scene(scene: str, samples: Sequence[Sample]) -> tuple[Batch, list[Place]]:
    """A scene's samples in one batch."""
    if scene != "together":
        return place_all(SHARED, samples, share_rows=scene == "packed")
    shape = dataclasses.replace(SHARED, groups=2, length=2 * FED, targets=2 * SCORED)
    (batch,), places = pack(samples, shape, 1, whole=True)
    return batch, [place for place in places if place is not None]


def response(batch: Batch, log_probs: np.ndarray, row: int, number: int) -> np.ndarray:
    """The log-probabilities of a response's targets, in order."""
    used = (batch.target_weight[row] != 0) & (batch.target_response[row] == number)
    return log_probs[row][used]


def count_responses(sample: Sample) -> int:
    return sum(map(len, sample.groups))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scene", SCENES)
def test_branches_are_the_separate_sequences(evaluate, scene, seed):
    samples = SCENES[scene](Draw(seed))
    batch, places = place_scene(scene, samples)
    single = alone(samples)
    log_probs, gradient = evaluate(batch)
    wanted, wanted_gradient = evaluate(single)

    together = [
        response(batch, log_probs, place.row, place.response + number)
        for sample, place in zip(samples, places, strict=True)
        for number in range(count_responses(sample))
    ]
    assert not single.target_weight[len(together) :].any()
    for row, found in enumerate(together):
        want = response(single, wanted, row, 0)
        assert want.size > 0
        np.testing.assert_allclose(found, want, atol=1e-5, rtol=0)
    assert difference(gradient, wanted_gradient) < 1e-5
    assert log_probs[used_targets(batch)].std() > 0.3  # the model has opinions


@pytest.mark.parametrize("scene", SCENES)
def test_every_backend_attends_as_xla_does(evaluate, evaluate_otherwise, scene):
    """A library that is told lengths alone reads no packed row: its log-probabilities are not numbers."""
    batch, _ = place_scene(scene, SCENES[scene](Draw(2)))
    backend, otherwise = evaluate_otherwise
    (found, gradient), (wanted, wanted_gradient) = otherwise(batch), evaluate(batch)
    used = used_targets(batch)
    if scene in ("packed", "together") and backend in LIBRARIES:
        shared = batch.prompt_segment.max(axis=1) > 1
        assert shared.any()
        assert np.isnan(found[shared][used[shared]]).all()
        return
    np.testing.assert_allclose(found[used], wanted[used], atol=1e-5, rtol=0)
    assert difference(gradient, wanted_gradient) < 1e-5


def test_a_merged_tree_is_one_response(evaluate):
    """A group that comes as a tree is scored as its branches are, its targets in the same slots."""
    samples = candidates_in_the_query(Draw(5)) + trees(Draw(5))[:1]
    merged = [dataclasses.replace(sample, groups=tuple(map(merge_branches, sample.groups))) for sample in samples]
    batch, _ = place_all(SHARED, samples, share_rows=False)
    whole, _ = place_all(SHARED, merged, share_rows=False)
    np.testing.assert_array_equal(evaluate(whole)[0], evaluate(batch)[0])
    assert whole.role[:, 0].tolist() == [PLAIN, PLAIN]
    assert not whole.role[:, 1:].any()


def test_trees_are_smaller_than_their_branches():
    """What branches share is fed once: otherwise the comparison above would prove little."""
    samples = trees(Draw(0)) + trees(Draw(1)) + candidates_in_the_query(Draw(0))
    for group in (group for sample in samples for group in sample.groups):
        assert len(merge_branches(group).tokens) < sum(len(branch.tokens) - 1 for branch in group)
    batch, places = place_all(SHARED, packed(Draw(0)), share_rows=True)
    assert [place.row for place in places].count(0) > 1
    assert batch.prompt_segment.max() > 1


# --- isolation: bit for bit, since a masked key weighs exactly nothing ----------------------------------------


@pytest.fixture(scope="module")
def scene() -> tuple[Batch, list[Place], list[Sample]]:
    """Three samples in the first row, with groups to spare; one in the second."""
    draw = Draw(7)
    samples = [draw.sample([draw.tree(3)]), draw.sample([draw.tree(2), draw.tree(3)]), draw.sample([draw.tree(1)])]
    samples.append(draw.sample([draw.tree(4)], pictures=2))
    batch, places = place_all(SHARED, samples, share_rows=True)
    assert [place.row for place in places] == [0, 0, 0, 1]
    return batch, places, samples


def garbage(values: np.ndarray, where: np.ndarray, seed: int, low: int, high: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(low, high, values.shape).astype(values.dtype)
    return np.where(where, noise, values)


def used_targets(batch: Batch) -> np.ndarray:
    return batch.target_weight != 0


def test_padding_content_changes_nothing(evaluate, scene):
    batch, places, samples = scene
    log_probs, gradient = evaluate(batch)
    fed = np.zeros_like(batch.tokens, bool)
    for sample, place in zip(samples, places, strict=True):
        for number, group in enumerate(sample.groups):
            start = (place.group + number) * FED
            fed[place.row, start : start + len(merge_branches(group).tokens)] = True
    spare_pictures = np.array([[3], [2]]) <= np.arange(PICTURES)
    where = spare_pictures[..., None, None, None]
    for low, high in ((0, 4), (4, 96)):  # special tokens and picture slots; ordinary ones
        filled = change(
            batch,
            prompt_tokens=garbage(batch.prompt_tokens, batch.prompt_segment == 0, 0, low, high),
            tokens=garbage(batch.tokens, ~fed, 1, low, high),
            parent=garbage(batch.parent, ~fed, 2, 0, PROMPT),
            target_token=garbage(batch.target_token, ~used_targets(batch), 3, low, high),
            canvas=garbage(batch.canvas, where, 4, 0, 256),
            mask=np.where(spare_pictures[..., None, None], True, batch.mask),
            confidence=np.where(spare_pictures, np.float32(np.nan), batch.confidence),
        )
        assert not np.array_equal(filled.tokens, batch.tokens)
        found, changed = evaluate(filled)
        np.testing.assert_array_equal(found[used_targets(batch)], log_probs[used_targets(batch)])
        assert np.all(np.isfinite(found))
        # the gradient's sums have garbage times zero in them, in another order
        assert difference(changed, gradient) < 1e-6


def kept_targets(batch: Batch, row: int, numbers: range) -> np.ndarray:
    """Targets that belong to other responses than the given ones of a row."""
    mine = np.isin(batch.target_response, list(numbers)) & (np.arange(len(batch.role)) == row)[:, None]
    return used_targets(batch) & ~mine


def test_a_neighbour_changes_nothing(evaluate, scene):
    """Another prompt, other pictures, other branches of the second sample of a row."""
    batch, places, samples = scene
    log_probs, _ = evaluate(batch)
    neighbour, place = samples[1], places[1]
    slots = batch.prompt_tokens == IMAGE_TOKEN
    second = batch.prompt_segment == 2
    picture = np.zeros((2, PICTURES), bool)
    picture[0, 1] = True
    groups = np.zeros_like(batch.tokens, bool)
    groups[0, place.group * FED : (place.group + 2) * FED] = True
    others = kept_targets(batch, 0, range(place.response, place.response + count_responses(neighbour)))
    for name, values in {
        "prompt_tokens": garbage(batch.prompt_tokens, second & ~slots, 0, 4, 96),
        "tokens": garbage(batch.tokens, groups, 1, 4, 96),
        "canvas": garbage(batch.canvas, picture[..., None, None, None], 2, 0, 256),
    }.items():
        found, _ = evaluate(change(batch, **{name: values}))
        np.testing.assert_array_equal(found[others], log_probs[others], err_msg=name)
        mine = used_targets(batch) & ~others
        assert not np.array_equal(found[mine], log_probs[mine]), name


def test_a_neighbour_in_the_same_group_changes_nothing(evaluate):
    """Samples whose trees share groups: another prompt and other branches of one leave the others bit for bit."""
    samples = packed(Draw(4))
    batch, places = place_scene("together", samples)
    log_probs, _ = evaluate(batch)
    length = batch.tokens.shape[1] // batch.groups
    root = batch.parent.copy()
    for _ in range(length):  # up to the prompt
        above = np.take_along_axis(batch.parent, np.maximum(root - PROMPT, 0), axis=1)
        root = np.where(root >= PROMPT, above, root)
    fed = batch.tokens > 0
    owner = np.where(fed, np.take_along_axis(batch.prompt_segment, root, axis=1), 0)
    shared = [set(group[group > 0]) for row in owner for group in row.reshape(batch.groups, length)]
    assert any(len(segments) > 1 for segments in shared)
    slots = batch.prompt_tokens == IMAGE_TOKEN
    for sample, place in zip(samples, places, strict=True):
        row = np.arange(len(batch.prompt_tokens))[:, None] == place.row
        at = batch.target_parent[place.row][batch.target_response[place.row] == place.response]
        segment = owner[place.row, at[-1] - PROMPT] if at[-1] >= PROMPT else batch.prompt_segment[place.row, at[-1]]
        others = kept_targets(batch, place.row, range(place.response, place.response + count_responses(sample)))
        changed = {
            "prompt_tokens": garbage(batch.prompt_tokens, row & (batch.prompt_segment == segment) & ~slots, 0, 4, 96),
            "tokens": garbage(batch.tokens, row & (owner == segment), 1, 4, 96),
        }
        found, _ = evaluate(change(batch, **changed))
        np.testing.assert_array_equal(found[others], log_probs[others])
        mine = used_targets(batch) & ~others
        assert mine.any()
        assert not np.any(found[mine] == log_probs[mine])


def test_a_branch_changes_only_what_follows_it(evaluate):
    """In a tree, a token changes the targets that hang below it, and no others, in its group or the next."""
    draw = Draw(3)
    sample = draw.sample([draw.tree(5), draw.tree(3)])
    batch, _ = place_all(SHARED, [sample], share_rows=False)
    log_probs, _ = evaluate(batch)
    tree = merge_branches(sample.groups[0])
    for node in range(len(tree.tokens)):
        below = {node}
        below |= {n for n in range(len(tree.parents)) if any(p in below for p in path(tree.parents, n))}
        touched = np.zeros_like(used_targets(batch))
        for slot, (_, parent, _, _) in enumerate(tree.targets):
            touched[0, slot] = parent in below
        tokens = batch.tokens.copy()
        tokens[0, node] = (tokens[0, node] + 17 - 4) % 92 + 4
        found, _ = evaluate(change(batch, tokens=tokens))
        same = used_targets(batch) & ~touched
        np.testing.assert_array_equal(found[same], log_probs[same])
        assert not np.any(found[touched] == log_probs[touched])


def path(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found


def test_positions_restart_in_every_segment():
    """Rotary attention would not notice; position-dependent families would."""
    segment = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 3, 3]])
    wanted = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 1]]
    np.testing.assert_array_equal(segment_positions(segment), wanted)


def test_an_empty_row_is_harmless(evaluate, scene):
    """A row without a sample: finite everywhere, no gradient from it."""
    batch, _, samples = scene
    alone_batch, _ = place_all(SHARED, samples[:1], share_rows=True)
    log_probs, gradient = evaluate(alone_batch)
    assert np.all(np.isfinite(log_probs))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    first = used_targets(alone_batch)
    np.testing.assert_array_equal(log_probs[first], evaluate(batch)[0][first])
