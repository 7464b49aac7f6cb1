"""How a confidence is read from a model: questions as trees of tokens, and what their scores mean.

A question has a tree for each candidate answer: the third-person confidence query about it, followed by the prefix
tree of all 101 answers 0%..100% in the tokenizer's own encodings. The first tree holds the ordinary question with its
candidates as answers, too. A tree attends to itself and the prompt, so one of all candidates would cost more. One pass
scores every edge; from the edges follow, exactly, the probability of each percentage, the text that greedy decoding
would say, and the probability of each answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from csp_jax.data.batch import Tree
from csp_jax.data.recipes.base import Asker
from csp_jax.records import Item
from csp_jax.text import CONFIDENCE_ANSWERS, parse_confidence

Shots = tuple[tuple[str, str, int], ...]


class EdgeTree:
    """A token tree whose scored edges are kept once, however many answers run through them."""

    def __init__(self) -> None:
        self.tree = Tree()
        self._children: dict[tuple[int, int], int] = {}
        self._edges: dict[tuple[int, int], int] = {}

    def _feed(self, node: int, token: int) -> int:
        if (node, token) not in self._children:
            self._children[node, token] = len(self.tree.tokens)
            self.tree.tokens.append(token)
            self.tree.parents.append(node)
        return self._children[node, token]

    def add(self, tokens: tuple[int, ...], scored_from: int, scored_to: int | None = None) -> list[int]:
        """Insert a sequence; returns the edges of `tokens[scored_from:scored_to]`. Its last scored token is not fed."""
        stop = len(tokens) if scored_to is None else scored_to
        node, path = -1, []
        for position, token in enumerate(tokens[:stop]):
            if position >= scored_from:
                if (node, token) not in self._edges:
                    self._edges[node, token] = len(self.tree.targets)
                    self.tree.targets.append((token, node, 1.0, 0))
                path.append(self._edges[node, token])
            if position < stop - 1:
                node = self._feed(node, token)
        return path


@dataclasses.dataclass(frozen=True)
class Choice:
    """Alternative answers at one place of a tree: their texts and the edges that spell each."""

    texts: tuple[str, ...]
    paths: tuple[tuple[int, ...], ...]

    def log_probs(self, edges: Float[np.ndarray, " edges"]) -> Float[np.ndarray, " answers"]:
        """Log-probability of each answer."""
        return np.array([edges[list(path)].sum() for path in self.paths])

    def greedy(self, tokens: Int[np.ndarray, " edges"], top: Int[np.ndarray, " edges"]) -> int | None:
        """The answer that greedy decoding spells, None if it leaves the alternatives."""
        alive = list(range(len(self.paths)))
        depth = 0
        while alive:
            at = self.paths[alive[0]][depth]
            alive = [number for number in alive if tokens[self.paths[number][depth]] == top[at]]
            depth += 1
            done = [number for number in alive if len(self.paths[number]) == depth]
            if done:
                return done[0]
        return None


@dataclasses.dataclass(frozen=True)
class QuestionTrees:
    """One question's trees, a candidate's confidence choice in each, and the ordinary answers in the first."""

    trees: tuple[Tree, ...]
    direct: Choice
    confidence: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model says to one question.

    `distribution[a, p]`: probability that the confidence asked about candidate a is answered by p percent, in
    [0, 1]; rows sum to less than 1 where the model says other things too. `greedy[a]`: the percentage it says, nan
    if it says none. `direct`: the candidate that it answers, -1 if another; `direct_log_probs`: of each candidate.
    """

    distribution: Float[np.ndarray, "candidates 101"]
    greedy: Float[np.ndarray, " candidates"]
    direct: int
    direct_log_probs: Float[np.ndarray, " candidates"]

    def expected(self) -> Float[np.ndarray, " candidates"]:
        """Mean confidence in [0, 1] in each candidate."""
        return expected_confidence(self.distribution)


def expected_confidence(distribution: Float[np.ndarray, "... 101"]) -> Float[np.ndarray, "..."]:
    """Mean of a distribution over the answers 0%..100%, in [0, 1], given that one of them is said."""
    return distribution @ np.arange(101) / 100 / np.maximum(distribution.sum(axis=-1), 1e-30)


def _choice(
    tree: EdgeTree, asker: Asker, question: str, answers: tuple[str, ...], shared: int, *, end_scored: bool
) -> Choice:
    paths = []
    for answer in answers:
        encoded = asker.family.encode(question, answer, asker.slots)
        tokens = encoded.tokens[shared:]
        begin = encoded.answer.index(True) - shared
        paths.append(tuple(tree.add(tokens, begin, None if end_scored else len(tokens) - 1)))
    return Choice(answers, tuple(paths))


def confidence_choice(
    tree: EdgeTree, asker: Asker, question: str, response: str, shared: int, shots: Shots = ()
) -> Choice:
    """Insert the confidence query about a response and its 101 answers, without the end mark."""
    query = asker.prompts.ask_confidence(question, response, shots)
    return _choice(tree, asker, query, CONFIDENCE_ANSWERS, shared, end_scored=False)


def question_trees(asker: Asker, item: Item, shared: int, shots: Shots = ()) -> QuestionTrees:
    """The trees of an item; `shared` tokens of every sequence are the prompt's and are cut off."""
    trees = tuple(EdgeTree() for _ in item.candidates)
    direct = _choice(trees[0], asker, asker.prompts.ask(item.question), item.candidates, shared, end_scored=True)
    confidence = tuple(
        confidence_choice(tree, asker, item.question, candidate, shared, shots)
        for tree, candidate in zip(trees, item.candidates)
    )
    return QuestionTrees(tuple(tree.tree for tree in trees), direct, confidence)


def read_question(
    question: QuestionTrees,
    log_probs: Float[np.ndarray, "trees edges"],
    top: Int[np.ndarray, "trees edges"],
) -> Reading:
    """The scores of the edges of a question's trees (padded behind) as what the model says."""
    tokens = [np.array([target[0] for target in tree.targets]) for tree in question.trees]
    said = [choice.greedy(*edges) for choice, *edges in zip(question.confidence, tokens, top)]
    texts = ["" if number is None else choice.texts[number] for number, choice in zip(said, question.confidence)]
    values = [parse_confidence(text) for text in texts]
    direct = question.direct.greedy(tokens[0], top[0])
    return Reading(
        distribution=np.exp([choice.log_probs(edges) for choice, edges in zip(question.confidence, log_probs)]),
        greedy=np.array([np.nan if value is None else value for value in values]),
        direct=-1 if direct is None else direct,
        direct_log_probs=question.direct.log_probs(log_probs[0]),
    )
