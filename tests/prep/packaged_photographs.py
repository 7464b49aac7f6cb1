"""Photographs that ship inside Python packages, as a folder for the preparation: questions, boxes, one true outline.

scikit-image: astronaut (NASA), cat and cup (public domain), motorcycle (Middlebury stereo data), rocket (SpaceX).
imgaug: quokka with an outline drawn by hand. Neither package is imported; only its files are read.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import prep_samples
from PIL import Image

from data_prep.masks import Polygons

# file, question, answer, names that are right (the last word of the keyword counts), the object's box
ASKED = (
    ("astronaut.png", "What is the woman holding in her lap?", "A white helmet.", "helmet", (280, 345, 512, 512)),
    ("astronaut.png", "What stands behind her?", "A model of a space shuttle.", "shuttle", (350, 0, 460, 285)),
    ("astronaut.png", "Is the astronaut smiling?", "yes", "astronaut", (20, 15, 370, 512)),
    ("chelsea.png", "What animal looks at the camera?", "A tabby cat.", "cat animal", (30, 0, 400, 300)),
    ("coffee.png", "What lies on the saucer?", "A small spoon.", "spoon", (325, 65, 425, 328)),
    ("coffee.png", "How much coffee is left in the cup?", "It is nearly half full.", "cup coffee", (172, 15, 410, 240)),
    ("coffee.png", "Is the saucer red?", "yes", "saucer", (78, 60, 478, 385)),
    (
        "motorcycle_left.png",
        "Which vehicle is in the garage?",
        "A red motorcycle.",
        "motorcycle vehicle",
        (90, 70, 690, 455),
    ),
    ("rocket.jpg", "What is standing on the launch pad?", "A tall white rocket.", "rocket", (305, 125, 335, 405)),
    ("quokka.jpg", "Who smiles at the camera?", "It is a quokka.", "quokka", None),
)


def folder_of(package: str) -> Path | None:
    """Where a package's files lie; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def quokka() -> tuple[tuple[float, float, float, float], np.ndarray]:
    """Box and mask of the quokka, as the package's annotation draws them."""
    folder = folder_of("imgaug")
    assert folder is not None
    annotation = json.loads((folder / "quokka_annotations.json").read_text())
    width, height = Image.open(folder / "quokka.jpg").size
    corners = annotation["polygons"][0]["keypoints"]
    outline = tuple(float(corner[axis]) for corner in corners for axis in ("x", "y"))
    mask = Polygons((outline,)).render(height, width)
    box = annotation["bounding_boxes"][0]
    return (box["x1"], box["y1"], box["x2"], box["y2"]), mask


def build(root: Path) -> None:
    """The pictures and questions.jsonl; the keywords are not given."""
    root.mkdir(parents=True)
    sources = {"quokka.jpg": folder_of("imgaug")}
    rows = []
    for name, question, answer, _, box in ASKED:
        folder = sources.get(name) or folder_of("skimage") / "data"  # type: ignore[operator]
        (root / name).write_bytes((folder / name).read_bytes())
        region = {"box": list(box or quokka()[0])}
        rows.append({"image": name, "question": question, "answer": answer, "regions": [region]})
    prep_samples.write_lines(root / "questions.jsonl", rows)
