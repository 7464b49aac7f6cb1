"""Tokenizers from every kind of file, against the merge rules of their originals written out by hand."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from csp_jax.errors import UserError
from csp_jax.families.tokenizer_files import TIKTOKEN_SPECIAL, open_tokenizer

TEXT = (
    "The picture shows 2 dogs and 13 cats, isn't it? Die Hunde schlafen; the cats don't.\n\n  A naive café, 猫と犬。 "
    "How sure are you that there's a dog in the picture? I am 87% sure that the dogs are there, there, and there!\n"
) * 3
WORDS = st.text(alphabet="abcdeht sn'., \n0123é猫%?", max_size=40)


def learned(size: int) -> dict[bytes, int]:
    """A byte-level vocabulary in the order in which it was learned: bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    letters = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [bytes(letters[letter] for letter in text) for text, _ in vocabulary]
    return {word: rank for rank, word in enumerate(words)}


def byte_letters() -> dict[int, str]:
    """GPT-2's visible letters of bytes, by the rule that defines them."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in shown)}


def lowest_rank_first(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: merge the neighbours whose union has the lowest rank, until none has one."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    folder, ranks = tmp_path_factory.mktemp("qwen"), learned(420)
    lines = [base64.b64encode(word) + f" {rank}".encode() for word, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder, ranks


def test_tiktoken(tiktoken_folder):
    folder, ranks = tiktoken_folder
    tokenizer = open_tokenizer(folder)
    assert tokenizer.get_vocab_size() == len(ranks) + len(TIKTOKEN_SPECIAL)
    assert tokenizer.token_to_id("<imgpad>") - tokenizer.token_to_id("<|im_start|>") == 151859 - 151644
    split = pre_tokenizers.Sequence(list(tokenizer.pre_tokenizer)[:1])

    @settings(max_examples=60, deadline=None)
    @given(WORDS)
    def agree(text: str) -> None:
        wanted = [t for piece, _ in split.pre_tokenize_str(text) for t in lowest_rank_first(piece.encode(), ranks)]
        found = tokenizer.encode(text)
        assert found.ids == wanted
        assert tokenizer.decode(found.ids) == text

    agree()
    pieces = [piece for piece, _ in split.pre_tokenize_str("It isn't 123 dogs,  I'm sure!!\n\nOK")]
    assert pieces == ["It", " isn", "'t", " ", "1", "2", "3", " dogs", ",", " ", " I", "'m", " sure", "!!\n\n", "OK"]


def test_vocabulary_and_merges(tiktoken_folder, tmp_path):
    """The same vocabulary in Qwen2's form says the same."""
    folder, ranks = tiktoken_folder
    letters = byte_letters()
    vocabulary = {"".join(letters[b] for b in word): rank for word, rank in ranks.items()}
    merges = []
    by_rank = {rank: word for word, rank in vocabulary.items()}
    for word, rank in ranks.items():
        if len(word) > 1:
            first, second = lowest_rank_first(word, {w: r for w, r in ranks.items() if r < rank})
            merges.append(f"{by_rank[first]} {by_rank[second]}")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {"added_tokens_decoder": {str(len(vocabulary)): {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    theirs, ours = open_tokenizer(folder), open_tokenizer(tmp_path)
    assert ours.encode(TEXT).ids == theirs.encode(TEXT).ids
    assert ours.encode("dogs<|im_end|>").ids[-1] == len(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<x>"}}}))
    with pytest.raises(UserError, match="<x> becomes"):
        open_tokenizer(tmp_path)


# --- sentencepiece -------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append((value & 127) | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: list[tuple[str, float, int]], *, prefix: bool, kind: int = 2) -> bytes:
    """A ModelProto as sentencepiece writes it."""
    listed = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, t)) for text, score, t in pieces)
    return listed + field(2, field(3, kind)) + field(3, field(1, b"identity") + field(3, int(prefix)))


SPECIAL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
LEARNED = ["th", "▁th", "▁the", "re", "▁there", "▁a", "at", "▁c", "▁cat", "s▁", "es", "▁▁", "99"]
LETTERS = list("▁abcdehtrs'.,0123456789\né")


def pieces() -> list[tuple[str, float, int]]:
    texts = [*LEARNED, *LETTERS]
    return SPECIAL + BYTES + [(text, -float(place), 1) for place, text in enumerate(texts)]


def highest_score_first(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """sentencepiece's rule: merge the neighbours whose union scores highest, leftmost first; bytes for the rest."""
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in scores
        ]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [n for part in parts for n in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece(tmp_path, prefix):
    listed = pieces()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(listed, prefix=prefix))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": len(listed)}))
    tokenizer = open_tokenizer(tmp_path)
    scores = {text: score for text, score, kind in listed if kind == 1}
    ids = {text: number for number, (text, *_) in enumerate(listed)}

    @settings(max_examples=80, deadline=None)
    @given(WORDS.filter(bool))
    def agree(text: str) -> None:
        wanted = highest_score_first((" " if prefix else "") + text, scores, ids)
        assert tokenizer.encode(text).ids == [1, *wanted]
        assert tokenizer.decode(wanted) == text

    agree()
    a = ids["▁a" if prefix else "a"]
    assert tokenizer.encode("a<img>a").ids == [1, a, len(listed), a]


def test_names_of_pieces_may_be_changed(tmp_path):
    """A reserved piece that the configuration names is found under that name, and is no mere text."""
    listed = [*pieces(), ("[UNUSED_1]", 0.0, 4)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(listed, prefix=False))
    named = {"added_tokens_decoder": {str(len(listed) - 1): {"content": "<|im_end|>"}}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("a<|im_end|>").ids == [tokenizer.token_to_id("a"), len(listed) - 1]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer.model", b"\x0a\xff\x01", "not a sentencepiece"),
        ("tokenizer.model", sentencepiece_model(pieces(), prefix=True, kind=1), "byte-pair"),
        ("tokenizer.model", sentencepiece_model(pieces(), prefix=True)[:-9], "cannot be read"),
        ("qwen.tiktoken", b"IQ==", "cannot be read"),
        ("qwen.tiktoken", b"!!! 0", "cannot be read"),
        ("vocab.json", b"{}", "merges.txt"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=problem) as caught:
        open_tokenizer(tmp_path)
    assert caught.value.file == tmp_path / name


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json") as caught:
        open_tokenizer(tmp_path)
    assert caught.value.file == tmp_path
    assert np.all([name in str(caught.value) for name in ("tokenizer.model", "qwen.tiktoken", "vocab.json")])
