"""A world from folders: cut-outs with alpha and captions, background pictures; some of each held out."""

from __future__ import annotations

import fnmatch
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from csp_jax.errors import UserError
from csp_jax.world.captions import head_noun, plural_of
from csp_jax.world.catalogue import LEAST_AREA, ObjectClass, crop_to_alpha

CUTOUTS, PICTURES = (".png", ".webp"), (".png", ".webp", ".jpg", ".jpeg")
HELD_OUT_SHARE = 0.3
LEAST_CROP = 0.6  # of a picture's shorter side
SAME = 12.0  # mean absolute difference of two fingerprints (0..255) below which they show the same thing


@dataclass(frozen=True)
class FolderObjects:
    """What was found: classes, and the files that gave none (file -> why)."""

    classes: tuple[ObjectClass, ...]
    skipped: dict[str, str]


def folder_objects(
    directory: str | Path,
    *,
    sides: tuple[int, int],
    seed: int = 0,
    classes: str | Path | None = None,
    exclude: Sequence[str] = (),
) -> FolderObjects:
    """Every cut-out (PNG or WebP with alpha) below a folder, grouped by noun.

    The noun is the head noun of the caption (first line of the .txt file of the same name, else the file
    name), or what the JSON file `classes` says: path below the folder -> noun, or null to leave the file out.
    `exclude` holds patterns of paths to leave out. Cut-outs are scaled down to `sides[1]` pixels; those that
    nearly vanish at `sides[0]` are skipped. About a third of each class's cut-outs is held out; look-alikes
    (also mirrored ones) stay on one side, and a class whose cut-outs are all alike is for training only.
    Themes are the folders directly below `directory`. UserError names the file and the mend: no folder,
    nothing usable, no alpha, a file that cannot be read.
    """
    root = _folder(directory, "objects")
    mapping = _mapping(classes)
    skipped: dict[str, str] = {}
    found: dict[str, list[tuple[str, Image.Image]]] = defaultdict(list)
    for path, name in _files(root, CUTOUTS, exclude):
        noun = mapping[name] if name in mapping else head_noun(_caption(path))
        if noun is None:
            skipped[name] = "left out by the class file" if name in mapping else "the caption names no one thing"
            continue
        cutout = _cutout(path, sides[1])
        if _opaque_area(cutout, sides[0]) < LEAST_AREA:
            skipped[name] = f"too thin to be seen at {sides[0]} pixels"
            continue
        found[noun].append((name, cutout))
    if not found:
        raise UserError(
            "no cut-outs with a name found",
            file=root,
            field="objects",
            mend="Give a folder of PNG or WebP files with alpha, each with its caption in a .txt file",
        )
    return FolderObjects(tuple(_class(noun, found[noun], seed) for noun in sorted(found)), skipped)


class PhotoBackgrounds:
    """Random square crops of the pictures below a folder; about a third of the pictures is held out."""

    def __init__(self, directory: str | Path, canvas: int, *, seed: int = 0, exclude: Sequence[str] = ()):
        """Reads every picture. UserError: fewer than two pictures, or one that cannot be read."""
        root = _folder(directory, "backgrounds")
        self.canvas = canvas
        files = list(_files(root, PICTURES, exclude))
        if len(files) < 2:
            raise UserError(
                "a world needs at least two background pictures, one of them for held-out scenes",
                file=root,
                field="backgrounds",
                mend="Give a folder with more PNG, JPEG or WebP pictures",
            )
        self.names: dict[bool, list[str]] = {False: [], True: []}
        self._pictures: dict[bool, list[Image.Image]] = {False: [], True: []}
        order = np.random.default_rng((seed, zlib.crc32(b"backgrounds"))).permutation(len(files))
        held_out_number = max(1, round(HELD_OUT_SHARE * len(files)))
        for rank, number in enumerate(order):
            path, name = files[number]
            picture = _open(path).convert("RGB")
            shorter = min(picture.size)
            if shorter > 3 * canvas:
                scale = 3 * canvas / shorter
                size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            self.names[rank < held_out_number].append(name)
            self._pictures[rank < held_out_number].append(picture)

    def paint(self, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """A uint8 [canvas, canvas, 3] crop of a random picture, mirrored half of the time."""
        pictures = self._pictures[held_out]
        which, share, u, v, flip = rng.random(5)
        picture = pictures[int(which * len(pictures))]
        side = max(1.0, min(picture.size) * (LEAST_CROP + (1 - LEAST_CROP) * share))
        left, top = u * (picture.width - side), v * (picture.height - side)
        crop = picture.resize(
            (self.canvas, self.canvas), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        pixels = np.asarray(crop)
        return np.ascontiguousarray(pixels[:, ::-1]) if flip < 0.5 else pixels


def _folder(directory: str | Path, field: str) -> Path:
    root = Path(directory)
    if not root.is_dir():
        raise UserError("no such folder", field=field, value=str(root), mend="Give the path of a folder")
    return root


def _files(root: Path, suffixes: tuple[str, ...], exclude: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """(file, its path below the root with /), sorted, less what a pattern excludes."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in suffixes and not any(fnmatch.fnmatch(name, p) for p in exclude):
            yield path, name


def _mapping(path: str | Path | None) -> dict[str, str | None]:
    if path is None:
        return {}
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the class file: {error}", file=path, field="classes", mend="Give a JSON object"
        ) from error
    if not isinstance(mapping, dict) or not all(_is_noun_or_null(value) for value in mapping.values()):
        raise UserError(
            "the class file must map each file to a noun or null",
            file=path,
            field="classes",
            mend='Write {"animals/cat-1.png": "cat", "letters/a.png": null}',
        )
    return mapping


def _is_noun_or_null(value: object) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


def _caption(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.exists():
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[0] if lines else ""
    return "".join(c if c.isalpha() else " " for c in path.stem)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(
            f"cannot read the picture: {error}", file=path, mend="Replace the file, or exclude it"
        ) from error
    return image


def _cutout(path: Path, side: int) -> Image.Image:
    image = _open(path).convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    low, high = int(alpha.min()), int(alpha.max())
    if low > 127 or high <= 127:
        raise UserError(
            "the picture is opaque everywhere" if low > 127 else "nothing in the picture is more than half opaque",
            file=path,
            mend="Give it an alpha channel that cuts the object out, or exclude the file",
        )
    image = crop_to_alpha(image)
    scale = side / max(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def _opaque_area(image: Image.Image, side: int) -> int:
    """Pixels that are more than half opaque where the larger side is `side`."""
    scale = side / max(image.size)
    size = max(2, round(image.width * scale)), max(2, round(image.height * scale))
    return int((np.asarray(image.getchannel("A").resize(size, Image.Resampling.LANCZOS)) > 127).sum())


def _class(noun: str, members: list[tuple[str, Image.Image]], seed: int) -> ObjectClass:
    groups = _look_alikes([image for _, image in members])
    order = np.random.default_rng((seed, zlib.crc32(noun.encode()))).permutation(len(groups))
    held_out_groups = 0 if len(groups) < 2 else max(1, round(HELD_OUT_SHARE * len(groups)))
    held_out = [i for rank in order[:held_out_groups] for i in groups[rank]]
    train = [i for rank in order[held_out_groups:] for i in groups[rank]]
    theme = Counter(name.split("/")[0] if "/" in name else "" for name, _ in members).most_common(1)[0][0]
    return ObjectClass(
        noun,
        plural_of(noun),
        theme,
        train=tuple(members[i][1] for i in sorted(train)),
        held_out=tuple(members[i][1] for i in sorted(held_out)),
    )


def _look_alikes(images: Sequence[Image.Image]) -> list[list[int]]:
    """Groups of pictures that are the same thing up to small changes, size and mirroring."""
    prints = [_fingerprint(image) for image in images]
    groups: list[list[int]] = []
    for number, mine in enumerate(prints):
        alike = [
            group
            for group in groups
            if any(min(_distance(mine, prints[i]), _distance(mine[:, ::-1], prints[i])) < SAME for i in group)
        ]
        merged = sorted(i for group in alike for i in group)
        groups = [group for group in groups if group not in alike]
        groups.append([*merged, number])
    return groups


def _fingerprint(image: Image.Image) -> np.ndarray:
    small = np.asarray(image.resize((12, 12), Image.Resampling.BOX), np.float32)
    return np.concatenate([small[..., :3] * small[..., 3:] / 255, small[..., 3:]], -1)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())
