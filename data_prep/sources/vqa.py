"""VQAv2 and OK-VQA: {"questions": [...]} and {"annotations": [...]}, joined by question_id; ten answers each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from csp_jax.errors import UserError
from csp_jax.records import Item
from data_prep.config import VqaConfig
from data_prep.sources.base import YES_NO, AnyRow, Source, by_id, checked, read_json, resolve, text, yes_no_fields
from data_prep.unit import BadRow, ImageFile, Row


def most_common(answers: list[Any]) -> str:
    """The answer that most annotators gave, the first of equals; ValueError without any."""
    texts = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    if not texts:
        raise ValueError("there are no answers")
    return Counter(texts).most_common(1)[0][0]


class Vqa(Source):
    """Questions answered by ten people; the truth is `multiple_choice_answer`, or what most of them said."""

    dataset = "vqa"

    def __init__(self, config: VqaConfig):
        self.config = config
        root = Path(config.root)
        self._images = root / config.images
        self._questions = resolve(root, config.questions, "questions")[0]
        self._annotations = resolve(root, config.annotations, "annotations")[0]

    def files(self) -> list[Path]:
        return [self._questions, self._annotations]

    def rows(self) -> Iterator[AnyRow]:
        questions, annotations = read_json(self._questions), read_json(self._annotations)
        for path, raw, name in (
            (self._questions, questions, "questions"),
            (self._annotations, annotations, "annotations"),
        ):
            if not isinstance(raw, dict) or not isinstance(raw.get(name), list):
                raise UserError(f"has no list of {name}", file=path, mend="Use VQA's own files")
        of_question = by_id(annotations["annotations"], "question_id")
        for number, row in enumerate(questions["questions"], start=1):
            where = f"{self._questions.name}:{number}"
            yield checked(where, row, partial(self._row, where, of_question))

    def _row(self, where: str, of_question: dict[int, dict[str, Any]], row: dict[str, Any]) -> AnyRow:
        identifier = f"{self.dataset}-{row['question_id']}"
        annotation = of_question.get(row["question_id"])
        if annotation is None:
            return BadRow(where, "no_answer", "no annotation has this question_id", identifier)
        answer = annotation.get("multiple_choice_answer") or most_common(annotation["answers"])
        kind = annotation.get("answer_type", "")
        truth: dict[str, Any] = {"response": answer, "truth": answer, "right": 1}
        item = Item(
            id=identifier,
            question=text(row, "question"),
            category=kind,
            coefficient_dataset=self.config.coefficients,
            **(yes_no_fields(answer) if kind == "yes/no" and answer in YES_NO else truth),
        )
        file = self.config.pattern.format(image_id=row["image_id"])
        return Row(where, f"{self.dataset}-{file}", ImageFile(self._images / file), item)
