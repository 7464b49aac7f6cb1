"""How a confidence is read from a model: questions as trees of tokens, and what their scores mean.

A question has a tree for each candidate answer: the third-person confidence query about it, followed by the prefix
tree of all 101 answers 0%..100% in the tokenizer's own encodings. The first tree holds the ordinary question with its
candidates as answers, too. A tree attends to itself and the prompt, so one of all candidates would cost more. One pass
scores every edge, with the vocabulary's logits once a node; from the edges follow, exactly, the probability of each
percentage, the text that greedy decoding would say, and the probability of each answer.

In words, which costs less: one tree of the same queries without answers, and what the model says to each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from csp_jax.data.batch import Tree
from csp_jax.data.recipes.base import Asker
from csp_jax.records import Item
from csp_jax.text import CONFIDENCE_ANSWERS, parse_confidence, plain

Shots = tuple[tuple[str, str, int], ...]


Edge = tuple[int, int]  # a target of a tree, and the number of the choice there


class EdgeTree:
    """A token tree with a target at each node where answers part or go on: the model's state there is needed once, the
    tokens that follow are choices of one softmax."""

    def __init__(self) -> None:
        self.tree = Tree()
        self._children: dict[tuple[int, int], int] = {}
        self._targets: dict[int, int] = {}

    def _feed(self, node: int, token: int) -> int:
        if (node, token) not in self._children:
            self._children[node, token] = len(self.tree.tokens)
            self.tree.tokens.append(token)
            self.tree.parents.append(node)
        return self._children[node, token]

    def _weigh(self, node: int, token: int) -> Edge:
        if node not in self._targets:
            self._targets[node] = len(self.tree.targets)
            self.tree.targets.append((token, node, 1.0, 0))
            self.tree.choices.append([])
        choices = self.tree.choices[self._targets[node]]
        if token not in choices:
            choices.append(token)
        return self._targets[node], choices.index(token)

    def add(self, tokens: tuple[int, ...], scored_from: int, scored_to: int | None = None) -> list[Edge]:
        """Insert a sequence; returns the edges of `tokens[scored_from:scored_to]`. Its last scored token is not fed."""
        stop = len(tokens) if scored_to is None else scored_to
        node, path = -1, []
        for position, token in enumerate(tokens[:stop]):
            if position >= scored_from:
                path.append(self._weigh(node, token))
            if position < stop - 1:
                node = self._feed(node, token)
        return path


@dataclasses.dataclass(frozen=True)
class Choice:
    """Alternative answers at one place of a tree: their texts and the edges that spell each."""

    texts: tuple[str, ...]
    paths: tuple[tuple[Edge, ...], ...]

    def log_probs(self, scores: Float[np.ndarray, "targets choices"]) -> Float[np.ndarray, " answers"]:
        """Log-probability of each answer."""
        return np.array([scores[tuple(zip(*path))].sum() for path in self.paths])

    def greedy(self, choices: Sequence[Sequence[int]], top: Int[np.ndarray, " targets"]) -> int | None:
        """The answer that greedy decoding spells, None if it leaves the alternatives.

        `choices`: the tokens that are weighed at each target; `top`: the model's own there.
        """
        alive = list(range(len(self.paths)))
        depth = 0

        def said(target: int, choice: int) -> bool:
            return choices[target][choice] == top[target]

        while alive:
            alive = [number for number in alive if said(*self.paths[number][depth])]
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
    tail: ClassVar[int] = 0  # tokens that may be said behind the trees


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model says to one question.

    `expected[a]`: mean confidence in [0, 1] in candidate a; `greedy[a]`: the confidence that it says, nan if it says
    none. `direct`: the candidate that it answers, -1 if another; `direct_log_probs`: of each candidate, nan where only
    texts are known.
    """

    expected: Float[np.ndarray, " candidates"]
    greedy: Float[np.ndarray, " candidates"]
    direct: int
    direct_log_probs: Float[np.ndarray, " candidates"]


def expected_confidence(distribution: Float[np.ndarray, "... 101"]) -> Float[np.ndarray, "..."]:
    """Mean of a distribution over the answers 0%..100%, in [0, 1], given that one of them is said.

    `distribution[..., p]`: probability of p percent; it sums to less than 1 where a model says other things too.
    """
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


def _confidences(texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The confidence that each text states, nan where it states none."""
    values = [parse_confidence(text) for text in texts]
    return np.array([np.nan if value is None else value for value in values])


def read_question(
    question: QuestionTrees,
    log_probs: Float[np.ndarray, "trees targets choices"],
    top: Int[np.ndarray, "trees targets"],
) -> Reading:
    """The scores of a question's trees (padded behind) as what the model says."""
    choices = [tree.choices for tree in question.trees]
    said = [choice.greedy(*own) for choice, *own in zip(question.confidence, choices, top)]
    texts = ["" if number is None else choice.texts[number] for number, choice in zip(said, question.confidence)]
    direct = question.direct.greedy(choices[0], top[0])
    return Reading(
        expected=expected_confidence(
            np.exp([choice.log_probs(own) for choice, own in zip(question.confidence, log_probs)])
        ),
        greedy=_confidences(texts),
        direct=-1 if direct is None else direct,
        direct_log_probs=question.direct.log_probs(log_probs[0]),
    )


# --- by words alone --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuestionTexts:
    """One question as a tree of what is asked, the ordinary question first, then about each candidate; `tail` tokens
    of text continue each target."""

    trees: tuple[Tree, ...]
    candidates: tuple[str, ...]
    tail: int


Question = QuestionTrees | QuestionTexts
AskItem = Callable[[Asker, Item, int, Shots], Question]  # how an item is asked about; see `question_trees`


def question_texts(asker: Asker, item: Item, shared: int, shots: Shots = ()) -> QuestionTexts:
    """The same questions as in `question_trees`, to be answered in words."""
    prompts, tree, tail = asker.prompts, EdgeTree(), 0
    asked = [(prompts.ask(item.question), answer) for answer in item.candidates]
    for candidate in item.candidates:
        asked.append((prompts.ask_confidence(item.question, candidate, shots), CONFIDENCE_ANSWERS[-1]))
    for text, answer in asked:
        encoded = asker.family.encode(text, answer, asker.slots)
        begin = encoded.answer.index(True)
        tree.add(encoded.tokens[shared : begin + 1], begin - shared)
        tail = max(tail, len(encoded.tokens) - begin)
    return QuestionTexts((dataclasses.replace(tree.tree, choices=[]),), item.candidates, tail)


def read_texts(question: QuestionTexts, texts: Sequence[str]) -> Reading:
    """What a model said to the questions of a tree, the ordinary one first; answers are candidates but for case, blanks
    and a final period."""
    said = _confidences(texts[1:])
    answers = [plain(candidate) for candidate in question.candidates]
    direct = answers.index(plain(texts[0])) if plain(texts[0]) in answers else -1
    return Reading(said, said, direct, np.full(len(answers), np.nan))
