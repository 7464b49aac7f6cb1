"""Every parameter of a rendered world, validated."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SizeRange = tuple[Annotated[int, Field(ge=4)], Annotated[int, Field(ge=4)]]


class WorldConfig(BaseModel):
    """Parameters of a world; lengths are in pixels of the canvas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="world", pattern=r"^[a-z][a-z0-9_]*$", description="data set name written into every record"
    )
    seed: int = Field(default=0, ge=0)
    canvas: int = Field(default=80, ge=48, le=2048, description="side of the square image")

    small: SizeRange = Field(default=(12, 17), description="larger side of a small object, inclusive")
    medium: SizeRange = Field(default=(18, 25), description="sizes about which no size question is asked")
    large: SizeRange = Field(default=(26, 34), description="larger side of a large object, inclusive")
    size_shares: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.45, 0.1, 0.45), description="shares of small, medium and large objects"
    )
    rotation: float = Field(default=12.0, ge=0.0, le=90.0, description="degrees to either side")
    flip: bool = True
    brightness: float = Field(default=0.15, ge=0.0, lt=1.0, description="brightness factor is drawn from 1 +- this")

    theme_share: Fraction = Field(default=0.8, description="chance that an object comes from the scene's theme")
    zipf: float = Field(default=0.7, ge=0.0, description="class weight = 1 / rank ** zipf")
    several: Fraction = Field(default=0.6, description="share of scenes that a number question is asked about")
    contact: Fraction = Field(default=0.5, description="share of scenes with a deliberately touching pair")
    visible: Fraction = Field(default=0.7, description="least visible share of an occluded object")

    min_gap: int = Field(default=2, ge=1, description="least gap between the boxes of objects that do not touch")
    clear_gap: int = Field(default=6, ge=2, description="gap from which 'no contact' is a clear case")
    clear_offset: int = Field(default=10, ge=1, description="centre difference from which left/above is clear")

    popular_pool: int = Field(default=12, ge=1, description="popular negatives: drawn from this many classes")
    adversarial_pool: int = Field(default=6, ge=1, description="adversarial negatives: drawn from this many classes")
    statistics_scenes: int = Field(default=10_000, ge=100, description="simulated layouts behind the statistics")

    objects: str | None = Field(default=None, description="folder of cut-outs; unset: the embedded objects")
    backgrounds: str | None = Field(default=None, description="folder of pictures; unset: procedural backgrounds")
    classes: str | None = Field(default=None, description="JSON file: cut-out -> noun, or null to leave it out")
    shared_only: bool = Field(
        default=False, description="leave out classes of a folder that held-out scenes cannot show"
    )
    exclude: tuple[str, ...] = Field(default=(), description="patterns of files to leave out of both folders")

    @model_validator(mode="after")
    def _ordered(self) -> WorldConfig:
        ranges = (self.small, self.medium, self.large)
        if any(low > high for low, high in ranges):
            raise ValueError("small, medium and large must each be [least, most] with least <= most")
        if not (self.small[1] < self.medium[0] and self.medium[1] < self.large[0]):
            raise ValueError("size classes must not overlap: small < medium < large")
        if abs(sum(self.size_shares) - 1.0) > 1e-6:
            raise ValueError("size_shares must sum to 1")
        if self.classes is not None and self.objects is None:
            raise ValueError("classes names the cut-outs of the folder objects: set objects too")
        if self.large[1] > self.canvas // 2:
            raise ValueError("large objects must not exceed half of the canvas")
        return self
