"""`csp sample`: several answers to every question of a data set or a file, with their tokens and log-probabilities.

One JSON object a line and question. Lines go to `OUT.partial` as they are made; the file appears under its own name
when every question has its line. The same command goes on from the lines that are there.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from csp_jax.config import ParallelConfig
from csp_jax.data.batch import Packer, Sample, Shape
from csp_jax.data.buckets import bucket
from csp_jax.data.pictures import check_slots, show
from csp_jax.data.shards import ShardSource
from csp_jax.errors import UserError, full_disk_named
from csp_jax.families.interface import HostFamily, open_image
from csp_jax.families.registry import open_family
from csp_jax.models.registry import load_model
from csp_jax.rollout import Samples, Sampling, end_token, make_sampler
from csp_jax.sharding import make_mesh, put_batch
from csp_jax.text import Prompts

Line = dict[str, Any]
_EXAMPLE = '{"id": "q1", "image": "photo.jpg", "question": "Is there a dog?"}'


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one picture; `image_id` is the record's, or the path as the file gives it."""

    id: str
    question: str
    image: bytes | Path
    image_id: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides the answers, and is written beside them."""

    model: str
    samples: int
    seed: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    prompt: str
    dtype: str


def questions(source: Path, split: str) -> Iterator[Question]:
    """The questions of a split of a data set, or of a file of `id`, `image` (a path beside the file) and `question`."""
    if source.is_dir():
        shards = ShardSource(source, split)
        for record in (shards[index] for index in range(len(shards))):
            for item in record.items:
                yield Question(item.id, item.question, record.images[0], record.image_id)
        return
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", file=source, mend="Give shards or a JSON Lines file") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _question(line, f"{source}:{number}", source.parent)


def _question(line: str, place: str, folder: Path) -> Question:
    mend = f"Write one object a line, as {_EXAMPLE}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error})", file=place, mend=mend) from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object", file=place, value=row, mend=mend)
    for field in ("id", "image", "question"):
        if not isinstance(row.get(field), str) or not row[field]:
            raise UserError("must be a text", file=place, field=field, value=row.get(field), mend=mend)
    return Question(row["id"], row["question"], folder / row["image"], row["image"])


def sample_seed(seed: int, question: str, number: int) -> int:
    """The seed of a question's sample `number`: it depends on nothing else, so neither does what is said."""
    return zlib.crc32(json.dumps([seed, question, number]).encode())


class Answerer:
    """A model that answers batches of questions, on all local devices."""

    def __init__(self, folder: Path, setting: Setting, rows: int):
        self.setting, self.prompts = setting, Prompts(answer=setting.prompt)
        self.family: HostFamily = open_family(folder)
        self.mesh = make_mesh(ParallelConfig(), jax.local_devices())
        self.rows = -(-rows // self.mesh.size) * self.mesh.size
        self.end = end_token(self.family)
        sampling = Sampling(setting.max_tokens, setting.temperature, setting.top_k, setting.top_p, (self.end,))
        graphdef, self._state = nnx.split(load_model(folder, mesh=self.mesh))
        self._sampler = make_sampler(graphdef, sampling, dtype=jnp.dtype(setting.dtype))

    def prompt(self, question: Question) -> Sample:
        """The question as the model is asked it."""
        name = str(question.image) if isinstance(question.image, Path) else question.image_id
        picture = show(self.family, open_image(question.image, name))
        slots = (self.family.image_tokens(picture.canvas),)
        encoded = self.family.encode(self.prompts.ask(question.question), None, slots)
        return check_slots(self.family, Sample(encoded.tokens, (picture,), ()))

    def start(self, asked: Sequence[Question]) -> Samples:
        """The samples of up to `rows` questions, on their way."""
        prompts = [self.prompt(question) for question in asked]
        length, cells = max(len(p.prompt) for p in prompts), max(p.pictures[0].cells for p in prompts)
        packer = Packer(Shape(self.rows, bucket(length), 0, 0, 0, 0, 1, self.family.cell, bucket(cells)))
        seeds = np.zeros((self.rows, self.setting.samples), np.uint32)
        for row, (question, prompt) in enumerate(zip(asked, prompts)):
            packer.add(prompt, share_rows=False)
            seeds[row] = [sample_seed(self.setting.seed, question.id, n) for n in range(self.setting.samples)]
        batch, seeds = put_batch(packer.batch, self.mesh, leading=0), put_batch(seeds, self.mesh, leading=0)
        return self._sampler(self._state, batch, seeds)

    def lines(self, questions: Sequence[Question], samples: Samples) -> Iterator[Line]:
        """What is written for each question."""
        said: Samples = jax.device_get(samples)
        for row, question in enumerate(questions):
            answers = []
            for number, length in enumerate(said.length[row].tolist()):
                tokens = said.tokens[row, number, :length].tolist()
                words = tokens[:-1] if said.stopped[row, number] else tokens
                answers.append(
                    {
                        "text": self.family.tokenizer.decode(words).strip(),
                        "tokens": tokens,
                        "log_probs": [round(float(x), 6) for x in said.log_probs[row, number, :length]],
                        "ended": bool(said.stopped[row, number]),
                    }
                )
            asked = {"id": question.id, "image_id": question.image_id, "question": question.question}
            yield {**asked, "answers": answers, "sampling": dataclasses.asdict(self.setting)}


def sample_file(
    answerer: Answerer, asked: Sequence[Question], out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Answer what has no line yet and write the file; returns how many questions were answered now.

    Several processes answer a part each, into a file beside `out` from which as many processes go on; the first one
    joins them. UserError: an id that stands twice, or lines that were made with another setting.
    """
    twice = [id_ for id_, count in Counter(question.id for question in asked).items() if count > 1]
    if twice:
        raise UserError("two questions have this id", field="id", value=twice[0], mend="Give each its own")
    count, number = jax.process_count(), jax.process_index()
    if count == 1 or out.exists():
        return sample_part(answerer, asked, out, progress)
    parts = [out.with_name(f"{out.name}.part-{other + 1}-of-{count}") for other in range(count)]
    own = asked[len(asked) * number // count : len(asked) * (number + 1) // count]
    answered = sample_part(answerer, own, parts[number], progress)
    everywhere = int(multihost_utils.process_allgather(np.array(answered)).sum())  # all parts are there behind it
    if number == 0:
        whole = out.with_name(out.name + ".partial")
        with full_disk_named(whole), whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        whole.rename(out)
        for part in out.parent.glob(f"{glob.escape(out.name)}.part-*"):
            part.unlink()
    return everywhere


def sample_part(
    answerer: Answerer, asked: Sequence[Question], out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """`sample_file` in one process."""
    partial = out.with_name(out.name + ".partial")
    done = lines_there(out if out.exists() else partial, dataclasses.asdict(answerer.setting))
    left = [question for question in asked if question.id not in done]
    if out.exists() and left:
        raise UserError("is there already, without these questions", file=out, mend="Choose another file or delete it")
    if out.exists():
        return 0
    chunks = [left[start : start + answerer.rows] for start in range(0, len(left), answerer.rows)]
    waiting: tuple[Sequence[Question], Samples] | None = None
    out.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(partial), partial.open("a", encoding="utf-8") as file:

        def write(chunk: Sequence[Question], samples: Samples) -> None:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in answerer.lines(chunk, samples))
            file.flush()

        for number, chunk in enumerate(chunks):
            samples = answerer.start(chunk)
            if waiting is not None:
                write(*waiting)
            waiting = (chunk, samples)
            if progress:
                progress(number + 1, len(chunks))
        if waiting is not None:
            write(*waiting)
    partial.rename(out)
    return len(left)


def lines_there(file: Path, setting: Line) -> set[str]:
    """The ids that have a line; a line that was cut off is removed, one of another setting is an error."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as cut:
            cut.truncate(len(whole))
    done = set()
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found, id_ = row["sampling"], row["id"]
        except (ValueError, TypeError, KeyError):
            raise UserError("is no line of answers", file=f"{file}:{number}", mend="Choose another file") from None
        for field, value in setting.items():
            if found.get(field) != value:
                raise UserError(
                    f"these lines were made with {found.get(field)!r}",
                    file=file,
                    field=field,
                    value=value,
                    mend="Choose another file or delete it",
                )
        done.add(id_)
    return done
