"""Tokenizers from the files that checkpoints come with: `tokenizer.json`, sentencepiece, tiktoken, vocabulary + merges.

All become one kind of tokenizer, which also gives the place in the text where each token ends.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from csp_jax.errors import UserError

# How Qwen's text is cut before bytes are merged: contractions, words, single digits, punctuation, line ends, spaces.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    for name, read in READERS.items():
        file = directory / name
        if file.exists():
            try:
                return read(file)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"cannot be read ({error})", file=file, mend="Download the file again") from None
    raise UserError(
        f"there is no {next(iter(READERS))} (nor {', '.join(list(READERS)[1:])})",
        file=directory,
        mend="Add the checkpoint's tokenizer files",
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}


def _added_tokens(directory: Path) -> dict[int, str]:
    """The tokens that `tokenizer_config.json` and `added_tokens.json` add, by the ids that they name."""
    entries = _json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    added = {int(number): value["content"] for number, value in entries.items()}
    added |= {number: text for text, number in _json(directory / "added_tokens.json").items()}
    return dict(sorted(added.items()))


def _add_special(tokenizer: Tokenizer, text: str, number: int) -> None:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    if tokenizer.token_to_id(text) != number:
        raise ValueError(f"{text} becomes {tokenizer.token_to_id(text)}, not {number}")


# --- bytes as characters: tiktoken, vocabulary + merges --------------------------------------------------------


def byte_characters() -> dict[int, str]:
    """The visible character that stands for each byte in byte-level vocabularies."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def pair_merges(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a token of the vocabulary, by the rank of what they make, then of their parts."""
    pairs = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(first, second) for *_, first, second in sorted(pairs)]


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tiktoken(file: Path) -> Tokenizer:
    """Qwen's `qwen.tiktoken`: a token in base64 and its rank a line; special tokens follow in a fixed order."""
    character = byte_characters()
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks["".join(character[byte] for byte in base64.b64decode(token, validate=True))] = int(rank)
    tokenizer = _byte_level(ranks, pair_merges(ranks))
    for number, text in enumerate(TIKTOKEN_SPECIAL, len(ranks)):
        _add_special(tokenizer, text, number)
    return tokenizer


def read_vocabulary(file: Path) -> Tokenizer:
    """Qwen2's `vocab.json` and `merges.txt`."""
    lines = (file.parent / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = _byte_level(_json(file), pairs)  # type: ignore[arg-type]
    for number, text in _added_tokens(file.parent).items():
        _add_special(tokenizer, text, number)
    return tokenizer


# --- sentencepiece -----------------------------------------------------------------------------------------------

NORMAL, BYTE_PAIRS = 1, 2  # a piece's type, a model's type


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and raw value of each field of a protobuf message: an integer or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        if kind not in (1, 2, 5) or place + size > len(data):
            raise ValueError("not a sentencepiece model")
        yield tag >> 3, data[place : place + size]
        place += size


def _sentencepiece(file: Path) -> tuple[list[tuple[str, float, int]], bool]:
    """Pieces (text, score, type) in the order of their ids, and whether a space is put before a text."""
    pieces: list[tuple[str, float, int]] = []
    kind, prefix = 0, True
    for number, value in _fields(file.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number == 2:
            kind = dict(_fields(value)).get(3, 1)
        elif number == 3:
            prefix = bool(dict(_fields(value)).get(3, 1))
    if kind != BYTE_PAIRS:
        raise ValueError("not a byte-pair model")
    return pieces, prefix


def read_sentencepiece(file: Path) -> Tokenizer:
    """A byte-pair `tokenizer.model` of sentencepiece, with bytes for what it does not know."""
    pieces, prefix = _sentencepiece(file)
    added = _added_tokens(file.parent)
    texts = [added.get(number, text) for number, (text, *_) in enumerate(pieces)]
    mergeable = sorted((-score, text) for text, score, kind in pieces if kind == NORMAL)
    merges = pair_merges({text: place for place, (_, text) in enumerate(mergeable)})
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=texts[0], fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    for number, text in ({number: texts[number] for number in range(3)} | added).items():
        _add_special(tokenizer, text, number)
    if _json(file.parent / "tokenizer_config.json").get("add_bos_token", True):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{texts[1]} $A", special_tokens=[(texts[1], 1)]
        )
    return tokenizer


READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": lambda file: Tokenizer.from_file(str(file)),
    "tokenizer.model": read_sentencepiece,
    "qwen.tiktoken": read_tiktoken,
    "vocab.json": read_vocabulary,
}
