"""Places the objects of a plan on a canvas and renders them with exact masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from csp_jax.errors import UserError
from csp_jax.world.catalogue import LEAST_AREA, ObjectClass, crop_to_alpha
from csp_jax.world.config import WorldConfig
from csp_jax.world.plan import Plan, draw

ANGLE_STEPS = 6  # rotations to either side that are prepared once per cut-out
SIZES = ("small", "medium", "large")
CROWDED_AFTER, SMALL_AFTER, ATTEMPTS = 6, 16, 80
FULLEST = 0.62  # boxes with their gaps never cover more than this share of the canvas


@dataclass(frozen=True)
class Sprite:
    """One object at its final size: colours uint8 [h, w, 3], alpha uint8 [h, w]."""

    place: int  # of its class in the plan
    size: str  # one of SIZES
    colours: np.ndarray
    alpha: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Bool [h, w]: more than half opaque."""
        return self.alpha > 127


@dataclass(frozen=True)
class Placed:
    """A sprite and its upper left corner on the canvas."""

    sprite: Sprite
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.sprite.alpha.shape
        return self.x, self.y, self.x + width, self.y + height


@dataclass(frozen=True)
class Scene:
    """A background and objects in drawing order (later ones lie on top)."""

    plan: Plan
    background: np.ndarray  # uint8 [canvas, canvas, 3]
    objects: tuple[Placed, ...]

    def render(self, without: int = -1) -> np.ndarray:
        """The picture, uint8 [canvas, canvas, 3]; object number `without` is left out."""
        picture = self.background.copy()
        for number, placed in enumerate(self.objects):
            if number == without:
                continue
            x0, y0, x1, y1 = placed.box
            alpha = placed.sprite.alpha[..., None].astype(np.uint16)
            under = picture[y0:y1, x0:x1]
            under[:] = (placed.sprite.colours * alpha + under * (255 - alpha) + 127) // 255
        return picture

    def visible_masks(self) -> list[np.ndarray]:
        """Bool [canvas, canvas] per object: more than half opaque and not below a later one's."""
        size = self.background.shape[0]
        hidden = np.zeros((size, size), bool)
        masks = []
        for placed in reversed(self.objects):
            x0, y0, x1, y1 = placed.box
            mask = np.zeros_like(hidden)
            mask[y0:y1, x0:x1] = placed.sprite.mask & ~hidden[y0:y1, x0:x1]
            hidden |= mask
            masks.append(mask)
        return masks[::-1]


def dilate(mask: np.ndarray) -> np.ndarray:
    """Bool [h, w] -> [h + 2, w + 2]: the mask grown by one pixel in all eight directions."""
    padded = np.pad(mask, 2)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


class SpriteMaker:
    """Turns cut-outs into sprites: flip, rotation, size, brightness. Rotated cut-outs are kept."""

    def __init__(self, config: WorldConfig, classes: Sequence[ObjectClass], held_out: bool):
        self.config = config
        self._cutouts = [item.cutouts(held_out) for item in classes]
        self._rotated: dict[tuple[int, int, bool, int], Image.Image] = {}

    def _cutout(self, index: int, variant: int, flip: bool, step: int) -> Image.Image:
        key = (index, variant, flip, step)
        if key not in self._rotated:
            image = self._cutouts[index][variant]
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            angle = step * self.config.rotation / ANGLE_STEPS
            image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            self._rotated[key] = crop_to_alpha(image)
        return self._rotated[key]

    def sprite(self, rng: np.random.Generator, index: int, place: int, size: int) -> Sprite:
        """A random appearance of class `index` in size class number `size`."""
        variant, flip, turn, length, light = rng.random(5)
        image = self._cutout(
            index,
            int(variant * len(self._cutouts[index])),
            self.config.flip and flip < 0.5,
            int(turn * (2 * ANGLE_STEPS + 1)) - ANGLE_STEPS,
        )
        low, high = (self.config.small, self.config.medium, self.config.large)[size]
        scale = (low + int(length * (high - low + 1))) / max(image.size)
        shape = max(2, round(image.width * scale)), max(2, round(image.height * scale))
        pixels = np.asarray(image.resize(shape, Image.Resampling.LANCZOS))
        factor = np.float32(1 + self.config.brightness * (2 * light - 1))
        colours = np.minimum(pixels[..., :3] * factor, 255).astype(np.uint8)
        return Sprite(place, SIZES[size], colours, pixels[..., 3])


class Layouter:
    """Finds positions: planned pairs touch, all other boxes keep their distance."""

    def __init__(self, config: WorldConfig, maker: SpriteMaker):
        self.config, self.maker = config, maker
        self._shares = np.cumsum(config.size_shares)

    def lay_out(self, rng: np.random.Generator, plan: Plan) -> tuple[Placed, ...]:
        """Objects in drawing order. Raises UserError where the canvas is too small for the sizes."""
        for attempt in range(ATTEMPTS):
            sprites = self._sprites(rng, plan, attempt)
            gap = self.config.min_gap
            if plan.touching is None and len(plan.singles) == 2:
                gap = self.config.clear_gap  # the one pair must be a clear "no contact"
            if min(int(sprite.mask.sum()) for sprite in sprites) < LEAST_AREA:
                continue
            room = sum((s.alpha.shape[0] + gap) * (s.alpha.shape[1] + gap) for s in sprites)
            if room > FULLEST * self.config.canvas**2:
                continue
            placed = self._place(rng, plan, sprites, gap)
            if placed is not None:
                return tuple(placed)
        raise UserError(
            "objects do not fit on the canvas",
            field="canvas",
            value=self.config.canvas,
            mend="Choose a larger canvas or smaller sizes",
        )

    def _sprites(self, rng: np.random.Generator, plan: Plan, attempt: int) -> list[Sprite]:
        sprites = []
        for place, (index, count) in enumerate(zip(plan.classes, plan.counts)):
            for _ in range(count):
                size = draw(rng, self._shares)
                if attempt >= SMALL_AFTER or (attempt >= CROWDED_AFTER and rng.random() < 0.5):
                    size = 0
                sprites.append(self.maker.sprite(rng, index, place, size))
        return sprites

    def _place(self, rng: np.random.Generator, plan: Plan, sprites: list[Sprite], gap: int) -> list[Placed] | None:
        placed: list[Placed] = []
        if plan.touching is not None:
            pair = [sprite for sprite in sprites if sprite.place in plan.touching]
            sprites = [sprite for sprite in sprites if sprite.place not in plan.touching]
            touching = self._touching_pair(rng, pair[0], pair[1])
            if touching is None:
                return None
            placed += touching
        for sprite in sorted(sprites, key=lambda s: -s.alpha.size):
            corner = self._free_corner(rng, sprite, placed, gap)
            if corner is None:
                return None
            placed.append(Placed(sprite, *corner))
        return placed

    def _free_corner(
        self, rng: np.random.Generator, sprite: Sprite, placed: list[Placed], gap: int
    ) -> tuple[int, int] | None:
        height, width = sprite.alpha.shape
        room_x, room_y = self.config.canvas - width + 1, self.config.canvas - height + 1
        boxes = [other.box for other in placed]
        for u, v in rng.random((40, 2)).tolist():
            x, y = int(u * room_x), int(v * room_y)
            if all(
                x - x1 >= gap or x0 - x - width >= gap or y - y1 >= gap or y0 - y - height >= gap
                for x0, y0, x1, y1 in boxes
            ):
                return x, y
        return None

    def _touching_pair(self, rng: np.random.Generator, under: Sprite, over: Sprite) -> list[Placed] | None:
        """The first sprite anywhere, the second pushed against it from any side, up to 3 pixels into it."""
        for _ in range(8):
            corner = self._free_corner(rng, under, [], 0)
            if corner is None:
                return None
            offset = self._push(rng, under, over)
            if offset is None:
                continue
            x, y = corner[0] + offset[0], corner[1] + offset[1]
            height, width = over.alpha.shape
            if 0 <= x <= self.config.canvas - width and 0 <= y <= self.config.canvas - height:
                return [Placed(under, *corner), Placed(over, x, y)]
        return None

    def _push(self, rng: np.random.Generator, under: Sprite, over: Sprite) -> tuple[int, int] | None:
        """Offset of the second sprite's corner from the first's such that the two visible masks touch."""
        angle, extra = 2 * np.pi * rng.random(), int(4 * rng.random())
        (h, w), (oh, ow) = under.alpha.shape, over.alpha.shape
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        field = np.pad(dilate(under.mask), ((oh, oh), (ow, ow)))  # its corner lies at (-ow - 1, -oh - 1)
        mask, best = over.mask, None
        for distance in range(int(0.71 * (h + w + oh + ow)) // 1 + 1, 0, -1):
            x = round(w / 2 + distance * cos - ow / 2)
            y = round(h / 2 + distance * sin - oh / 2)
            left, top = x + ow + 1, y + oh + 1
            if not (0 <= left <= field.shape[1] - ow and 0 <= top <= field.shape[0] - oh):
                continue
            if not (field[top : top + oh, left : left + ow] & mask).any():
                continue
            if not self._touches(under.mask, mask, x, y):
                break
            best = x, y
            if extra == 0:
                break
            extra -= 1
        return best

    def _touches(self, under: np.ndarray, over: np.ndarray, x: int, y: int) -> bool:
        """Whether enough of the lower mask stays visible and that part still touches the upper mask."""
        (h, w), (oh, ow) = under.shape, over.shape
        canvas = np.zeros((h + 2 * oh + 2, w + 2 * ow + 2), bool)
        left, top = x + ow + 1, y + oh + 1
        canvas[top : top + oh, left : left + ow] = over
        seen = under & ~canvas[oh + 1 : oh + 1 + h, ow + 1 : ow + 1 + w]
        if seen.sum() < self.config.visible * under.sum():
            return False
        canvas[oh : oh + h + 2, ow : ow + w + 2] &= dilate(seen)
        return bool(canvas[oh : oh + h + 2, ow : ow + w + 2].any())
