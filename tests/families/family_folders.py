"""A folder of every family as its host reads it: the golden configuration with a small tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path

from golden_folders import FAMILIES
from tiny import GOLDEN
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = {  # the tokens of the prompt, at the ids that the golden configuration names
    "llava": {"<s>": 1, "</s>": 2, "<image>": 300},
    "qwen2_vl": {
        "<|im_start|>": 300,
        "<|im_end|>": 301,
        "<|vision_start|>": 302,
        "<|vision_end|>": 303,
        "<|image_pad|>": 305,
    },
    "internvl2": {"<s>": 1, "<|im_start|>": 300, "<|im_end|>": 301, "<img>": 302, "</img>": 303, "<IMG_CONTEXT>": 304},
    "phi3_vision": {"<s>": 1, "<|user|>": 300, "<|end|>": 301, "<|assistant|>": 302},
    "qwen_vl": {"<|im_start|>": 300, "<|im_end|>": 301, "<img>": 310, "</img>": 311, "<imgpad>": 312},
}
FIRST = {"llava": "<s>", "internvl2": "<s>", "phi3_vision": "<s>"}


def byte_tokenizer(special: dict[str, int], first: str | None) -> Tokenizer:
    """A token for every byte (from 3 on), and the special ones at their ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<a>": 0, "<b>": 1, "<c>": 2, **{letter: 3 + place for place, letter in enumerate(alphabet)}}
    names = {number: text for text, number in special.items()}
    for number in range(max(names) + 1):
        taken = set(vocabulary.values())
        if number in names:
            vocabulary = {text: value for text, value in vocabulary.items() if value != number}
            vocabulary[names[number]] = number
        elif number not in taken:
            vocabulary[f"<unused{number}>"] = number
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 1)])
    return tokenizer


def family_folder(family: str, target: Path, **changes: object) -> Path:
    """Configuration (with changes to its top level), limits of pictures and tokenizer; no weights."""
    folder, source = target / family, GOLDEN / FAMILIES[family]
    folder.mkdir(parents=True)
    values = {**json.loads((source / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    if (source / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text((source / "preprocessor_config.json").read_text())
    byte_tokenizer(SPECIAL[family], FIRST.get(family)).save(str(folder / "tokenizer.json"))
    return folder
