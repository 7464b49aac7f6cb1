"""From a record to what a model is shown and taught: which region is buried, who is asked what, with which label.

Every recipe is a callable `(record, generator) -> Drawn`; it runs in data workers (no jax).

`answers`   ordinary questions and answers (trains a base); with taught confidence if asked for.
`paper`     [A] as printed: right responses about the buried object, label c.
`evidence`  ours: right and wrong responses, label = probability of being right given what is still visible.
`materialized`  `paper` on pictures that were noised when the data set was made, each with its label.
`questions`  a question without an answer: a policy is to answer it (GRPO).
`original`  plain chosen / rejected answers without the confidence query ([A] 4.3.2, "original RLAIF").
"""

from __future__ import annotations

from csp_jax.data.recipes.answers import AnswerRecipe
from csp_jax.data.recipes.base import Recipe
from csp_jax.data.recipes.evidence import EvidenceRecipe
from csp_jax.data.recipes.paper import MaterializedRecipe, OriginalRecipe, PaperRecipe
from csp_jax.data.recipes.questions import QuestionRecipe

RECIPES: dict[str, type[Recipe]] = {
    "answers": AnswerRecipe,
    "paper": PaperRecipe,
    "evidence": EvidenceRecipe,
    "materialized": MaterializedRecipe,
    "original": OriginalRecipe,
    "questions": QuestionRecipe,
}
