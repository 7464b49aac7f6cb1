"""What there is to measure where nothing is given: models from numbers, pictures and questions of stated lengths."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from csp_jax.errors import UserError
from csp_jax.families.interface import IMAGE_MARK, HostFamily
from csp_jax.families.registry import open_family
from csp_jax.models.hub import HubConfig
from csp_jax.models.registry import new_model, save_model
from csp_jax.records import Item, Record, Region, ShardWriter, encode_mask, read_manifest
from csp_jax.text import existence_question
from csp_jax.world import BASE

OBJECTS = ("dog", "cat", "chair", "car", "bottle", "cup")  # as many questions a picture as POPE asks
FILLER = " the"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A LLaVA in numbers: square pictures, their patches, and (layers, width, ffn, heads) of both parts."""

    pixels: int
    patch: int
    tower: tuple[int, int, int, int] = (12, 384, 1536, 6)
    decoder: tuple[int, int, int, int] = (8, 512, 1408, 8)
    vocabulary: int = 32000

    def config(self) -> dict[str, Any]:
        """`config.json` in the hub's layout; special tokens are those of the embedded world's tokenizer."""
        layers, width, ffn, heads = self.decoder
        text: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn}
        text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": self.vocabulary}
        text |= {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4, "tie_word_embeddings": False}
        layers, width, ffn, heads = self.tower
        vision: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn}
        vision |= {"num_attention_heads": heads, "image_size": self.pixels, "patch_size": self.patch}
        vision |= {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": width}
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": Tokenizer.from_file(str(BASE / "tokenizer.json")).token_to_id(IMAGE_MARK),
            "image_seq_length": (self.pixels // self.patch) ** 2,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "text_config": text,
            "vision_config": vision,
        }


# By what they are called on the command line: 80.5M parameters and 64, 196 or 576 picture tokens; a decoder of the
# shape that large ones have, with next to no tower.
MODELS: dict[str, Sizes] = {
    "llava-112": Sizes(112, 14),
    "llava-224": Sizes(224, 16),
    "llava-336": Sizes(336, 14),
    "decoder": Sizes(28, 14, tower=(2, 64, 128, 2), decoder=(8, 1024, 2816, 16)),
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the made data: tokens of a prompt (picture slots included; 0: the question alone), records, and pixels of a
    picture's side."""

    prompt: int = 0
    records: int = 64
    pixels: int = 336


def write_model(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    """A checkpoint folder in the hub's layout with random weights; one that is there stays."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", sizes.vocabulary)
    save_model(folder, new_model(HubConfig(sizes.config(), folder / "config.json"), seed, jnp.dtype("float32")))
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=1) + "\n")
    return folder


def write_tokenizer(file: Path, vocabulary: int) -> None:
    """The embedded world's tokenizer; tokens that no text is cut into fill the vocabulary."""
    values = json.loads((BASE / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words |= {f"#{number}": number for number in range(max(words.values()) + 1, vocabulary)}
    file.write_text(json.dumps(values))


def question_of(family: HostFamily, pixels: int, length: int, noun: str = OBJECTS[0]) -> str:
    """A question whose prompt, with one picture, has `length` tokens (0: as short as it is).

    UserError where prompts cannot be so short.
    """
    slots = (family.image_tokens(family.canvas(Image.new("RGB", (pixels, pixels)))),)
    question = existence_question(noun)

    @functools.cache
    def tokens(words: int) -> int:
        return len(family.encode(question + FILLER * words, None, slots).tokens)

    if not length:
        return question
    if tokens(0) > length:
        problem = f"the picture and the shortest question take {tokens(0)} tokens"
        raise UserError(problem, field="--prompt", value=length, mend=f"Use {tokens(0)} or more")
    words = 0
    while tokens(words) < length:
        words += 1
    return question + FILLER * words


def made_record(number: int, questions: Sequence[str], pixels: int) -> Record:
    """Random colours, a rectangle that is the object, and questions about it; all that any recipe asks for."""
    generator = np.random.default_rng(number)
    image = Image.fromarray(generator.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))
    left, top = (int(x) for x in generator.integers(0, pixels // 2, 2))
    box = (left, top, left + pixels // 2, top + pixels // 2)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=tuple(generator.integers(0, 256, 3)))
    mask = np.zeros((pixels, pixels), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    items = tuple(
        Item(
            id=f"{number}-{place}",
            question=question,
            response="73%",
            rejected="27%",
            keyword=OBJECTS[0],
            regions=(0,),
            truth="yes",
            candidates=("yes", "no"),
            right=1,
            category="existence",
        )
        for place, question in enumerate(questions)
    )
    file = io.BytesIO()
    image.save(file, "png")
    name = f"made-{number}"
    region = Region(OBJECTS[0], box, encode_mask(mask))
    return Record(name, "made", name, (file.getvalue(),), (region,), items)


def write_shards(folder: Path, family: HostFamily, lengths: Lengths) -> Path:
    """Splits `train`, one question a record, and `test`, six as POPE has them; those that are there stay."""
    asked = [question_of(family, lengths.pixels, lengths.prompt, noun) for noun in OBJECTS]
    for split, questions in (("train", asked[:1]), ("test", asked)):
        if (folder / "manifest.json").exists() and split in read_manifest(folder).splits:
            continue
        with ShardWriter(folder, dataset="made", split=split) as writer:
            for number in range(lengths.records):
                writer.write(made_record(number, questions, lengths.pixels))
    return folder


def open_or_make(name: str, folder: Path) -> tuple[Path, int]:
    """The folder of a model, made in `folder` if it is one of `MODELS`, and the side of the pictures to show it."""
    if name in MODELS:
        return write_model(folder / name, MODELS[name]), MODELS[name].pixels
    if not (Path(name) / "config.json").exists():
        mend = f"Give a checkpoint's folder, or one of {', '.join(MODELS)}"
        raise UserError("no such model", field="--model", value=name, mend=mend)
    cell = max(open_family(name, words=False).cell)
    return Path(name), cell if cell >= 112 else Lengths.pixels


def made_ground(name: str, lengths: Lengths, folder: Path) -> tuple[Path, Path]:
    """The folder of a model (see `open_or_make`), and that of records with pictures of its size."""
    checkpoint, pixels = open_or_make(name, folder)
    shards = folder / f"{checkpoint.name}-{lengths.prompt}-records"
    return checkpoint, write_shards(shards, open_family(checkpoint), dataclasses.replace(lengths, pixels=pixels))
