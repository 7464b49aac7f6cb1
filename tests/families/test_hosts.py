"""Every family on the host: prompts as the originals write them, slots as many as features, canvases of any picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from family_folders import SPECIAL, family_folder
from golden_folders import FAMILIES
from PIL import Image
from tiny import GOLDEN
from tiny_families import family_config, family_model
from transformers import Qwen2VLImageProcessorPil

from csp_jax.data.batch import Sample
from csp_jax.data.pictures import check_slots, show
from csp_jax.errors import UserError
from csp_jax.families.interface import HostFamily
from csp_jax.families.internvl2 import InternVL2Host, grids
from csp_jax.families.registry import open_family

PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HostFamily]:
    folder = tmp_path_factory.mktemp("hosts")
    return {name: open_family(family_folder(name, folder)) for name in FAMILIES}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- prompts -------------------------------------------------------------------------------------------------------


def test_conversations_are_the_originals(hosts):
    """Texts that the originals' own code made."""
    intern = PROMPTS["internvl2"]["text_before_image_expansion"].replace("<image>", "<img><IMG_CONTEXT></img>")
    assert hosts["internvl2"].conversation("Please describe the image shortly.", 1) == intern
    assert hosts["phi3_vision"].conversation("What is shown in this image?", 1) == PROMPTS["phi35"]["text"]
    qwen = PROMPTS["qwen_vl_chat"]["text"].replace("a/b.jpg", "<imgpad>")
    assert hosts["qwen_vl"].conversation("What is this?", 1) == qwen


def test_prompt_and_answer_tokens(hosts, family):
    """Slots are expanded in their order, the answer and its end are marked, and nothing else is."""
    host = hosts[family]
    encoded = host.encode("Which is larger?", "The 2nd.", (3, 5))
    tokens, marks = np.array(encoded.tokens), np.array(encoded.answer)
    slots = tokens == host.image_token
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], slots, [0]]))))[::2]
    assert runs.tolist() == [3, 5]
    assert not (slots & marks).any()
    answer = host.tokenizer.decode(tokens[marks].tolist(), skip_special_tokens=False)
    assert answer.strip() == f"The 2nd.{host.end_of_answer}"
    assert marks[-1]
    assert np.all(np.diff(marks.astype(int)) >= 0)
    asked = host.encode("Which is larger?", None, (3, 5))
    assert asked.tokens == tuple(tokens[~marks].tolist())
    joined = host.tokenizer.decode(tokens[~slots & ~marks].tolist(), skip_special_tokens=False)
    wanted = host.conversation("Which is larger?", 2)
    for mark in (host.image_mark, "<|image_1|>", "<|image_2|>"):
        wanted = wanted.replace(mark, "")
    assert joined.replace("<s>", "") == wanted
    assert joined.count("<s>") == {"llava": 1, "internvl2": 1, "phi3_vision": 3}.get(family, 0)


def test_a_mark_of_a_picture_in_a_question_is_refused(hosts, family):
    host = hosts[family]
    mark = "<|image_1|>" if family == "phi3_vision" else host.image_mark
    with pytest.raises(UserError, match="image mark"):
        host.encode(f"What does {mark} mean?", "nothing", (2,))


def test_a_tokenizer_of_another_checkpoint_is_refused(family, tmp_path):
    folder = family_folder(family, tmp_path)
    for other in FAMILIES:
        if not set(SPECIAL[family]) <= set(SPECIAL[other]) and other != "llava":
            target = family_folder(other, tmp_path / other)
            (folder / "tokenizer.json").write_text((target / "tokenizer.json").read_text())
            with pytest.raises(UserError, match="the tokenizer"):
                open_family(folder)
            open_family(folder, words=False)


TOKENIZERS = os.environ.get("CSP_TOKENIZERS", "")


@pytest.mark.skipif(not TOKENIZERS, reason="CSP_TOKENIZERS names no folder of published tokenizer files")
@pytest.mark.parametrize(
    ("family", "key", "question", "slots"),
    [
        ("internvl2", "internvl2", "Please describe the image shortly.", 768),
        ("phi3_vision", "phi35", "What is shown in this image?", 457),
        ("qwen_vl", "qwen_vl_chat", "What is this?", 256),
    ],
)
def test_token_ids_are_the_originals(family, key, question, slots, tmp_path):
    """With the published tokenizers; what fills the slots is ours (the originals overwrite it with features)."""
    folder = family_folder(family, tmp_path)
    (folder / "tokenizer.json").unlink()
    for file in (Path(TOKENIZERS) / family).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    values.get("visual", {}).update(image_start_id=151857)
    (folder / "config.json").write_text(json.dumps(values))
    host = open_family(folder)
    found = np.array(host.encode(question, None, (slots,)).tokens)
    wanted = []
    for token in PROMPTS[key]["ids_rle"]:
        number, count = map(int, token.split("x")) if isinstance(token, str) else (token, 1)
        wanted += [number] * count
    filled = found == host.image_token
    assert filled.sum() == slots
    np.testing.assert_array_equal(found[~filled], np.array(wanted)[~filled])


# --- canvases ------------------------------------------------------------------------------------------------------

# width, height: ordinary ones, slivers, specks, exactly a canvas
SIZES = [(640, 480), (333, 500), (500, 499), (28, 28), (1, 1), (2, 3), (900, 31), (31, 900), (56, 56), (336, 336)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_picture_gives_whole_cells_and_as_many_slots(hosts, family, size):
    """The canvas is cut into cells without a rest, slots are as many as the family's arithmetic says."""
    host = hosts[family]
    shown = show(host, picture(*size))
    rows, columns = shown.grid
    assert shown.canvas.dtype == np.uint8
    assert shown.canvas.shape == (rows * host.cell[0], columns * host.cell[1], 3)
    assert shown.mask.shape == shown.canvas.shape[:2]
    slots = {
        "llava": 576,
        "qwen2_vl": rows * columns,
        "internvl2": 4 * (rows * columns + (rows * columns > 1)),
        "phi3_vision": (rows * columns + 1) * 144 + 1 + (rows + 1) * 12,
        "qwen_vl": 256,
    }[family]
    assert host.image_tokens(shown.canvas) == slots
    assert (shown.overview is not None) == (family == "phi3_vision" or (family == "internvl2" and rows * columns > 1))
    prompt = host.encode("What?", None, (slots,)).tokens
    check_slots(host, Sample(prompt, (shown,), ()))
    with pytest.raises(ValueError, match="picture slots"):
        check_slots(host, Sample((*prompt, host.image_token), (shown,), ()))


@pytest.mark.parametrize("size", [(20000, 20), (20, 20000)], ids=str)
def test_the_longest_slivers_are_right_or_refused(hosts, family, size):
    host, wide = hosts[family], size[0] > size[1]
    if family in ("llava", "qwen2_vl"):  # the originals refuse these as well, or would crop nearly all of them
        with pytest.raises(UserError, match="too narrow"):
            host.canvas(picture(*size))
        return
    grid = show(host, picture(*size)).grid
    assert grid == {"internvl2": (1, 12), "phi3_vision": (1, 4), "qwen_vl": (1, 1)}[family][:: 1 if wide else -1]


def test_a_hair_is_refused(hosts):
    with pytest.raises(UserError, match="too narrow"):
        hosts["phi3_vision"].canvas(picture(20000, 1))


@pytest.mark.parametrize("size", [*SIZES, (1000, 700), (150, 20), (3000, 16)], ids=str)
def test_qwen2_canvas_is_what_transformers_makes(hosts, size):
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    values = Qwen2VLImageProcessorPil(**limits, do_rescale=False, do_normalize=False)(
        picture(*size), return_tensors="np"
    )
    canvas = hosts["qwen2_vl"].canvas(picture(*size))
    _, rows, columns = values["image_grid_thw"][0]
    assert canvas.shape == (rows * 14, columns * 14, 3)
    patches = values["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    np.testing.assert_array_equal(canvas, patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(canvas.shape))


def test_tiles_have_the_nearest_shape(hosts):
    """Against every grid of 1 to 12 tiles, tried one by one."""
    host = hosts["internvl2"]
    assert isinstance(host, InternVL2Host)
    every = {(c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12}
    assert set(grids(1, 12)) == every
    for width, height in [(640, 480), (100, 37), (37, 100), (333, 333), (1000, 90), (8, 9)]:
        columns, rows = host.grid(width, height)
        best = min(abs(width / height - c / r) for c, r in every)
        assert abs(width / height - columns / rows) == best
    assert host.grid(60, 60) == (1, 1)  # not half of four tiles
    assert host.grid(80, 80) == (2, 2)
    assert host.grid(137, 137) == (3, 3)


def test_crops_are_as_many_as_allowed(hosts):
    host = hosts["phi3_vision"]
    for width, height in [(640, 480), (480, 640), (500, 200), (1000, 100), (336, 336)]:
        rows, columns = show(host, picture(width, height)).grid
        assert rows * columns <= 4
        assert (columns - rows) * (width - height) >= 0


def test_numbers_come_from_the_folder(tmp_path):
    folder = family_folder("phi3_vision", tmp_path)
    (folder / "preprocessor_config.json").write_text('{"num_crops": 16}')
    assert show(open_family(folder), picture(640, 640)).grid == (4, 4)
    folder = family_folder("internvl2", tmp_path, max_dynamic_patch=6, use_thumbnail=False)
    shown = show(open_family(folder), picture(900, 100))
    assert (shown.grid, shown.overview) == ((1, 6), None)
    folder = family_folder("qwen2_vl", tmp_path)
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136, "longest_edge": 9408}}')
    assert show(open_family(folder), picture(640, 640)).cells == 9


def test_sequences_that_share_keys_agree_in_their_regime(hosts):
    """Phi changes beyond 480 tokens, Qwen-VL beyond 300 and its doublings; the others do not."""
    lengths = [5, 300, 301, 480, 481, 600, 601, 1200, 1201]
    regimes = {name: [host.regime(length) for length in lengths] for name, host in hosts.items()}
    assert regimes["phi3_vision"] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert regimes["qwen_vl"] == [1, 1, 3, 3, 3, 3, 7, 7, 15]
    for name in ("llava", "qwen2_vl", "internvl2"):
        assert set(regimes[name]) == {0.0}
    assert hosts["internvl2"].regime(32769) == 1.0


def test_configurations_of_the_model_and_of_the_host_agree(hosts, family):
    """The model's slot mark is what the host writes."""
    assert family_model(family).image_token == hosts[family].image_token
    assert family_config(family).get("model_type", None) == hosts[family].config["model_type"]
