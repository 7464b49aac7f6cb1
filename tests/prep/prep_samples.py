"""Small data sets in the real layouts of every source, with pictures in which something can be found."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 72
BOX = (24, 16, 64, 56)  # of the disc in every picture


def picture(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth ground with grain and a disc of another colour."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 60, size[0])[None, :, None] + generator.integers(0, 90, 3)
    pixels = (ramp + generator.integers(0, 20, (size[1], size[0], 3))).astype(np.uint8)
    image = Image.fromarray(pixels)
    x0, y0, x1, y1 = (edge * size[0] // WIDTH for edge in BOX)
    ImageDraw.Draw(image).ellipse((x0, y0, x1 - 1, y1 - 1), fill=tuple(int(c) for c in generator.integers(150, 255, 3)))
    return image


def disc() -> np.ndarray:
    """The disc's mask."""
    mask = Image.new("1", (WIDTH, HEIGHT))
    x0, y0, x1, y1 = BOX
    ImageDraw.Draw(mask).ellipse((x0, y0, x1 - 1, y1 - 1), fill=1)
    return np.array(mask)


def jpeg_bytes(seed: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_bytes(seed))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rlaifv(root: Path) -> None:
    """Two parquet files of three rows; two rows share a picture, one has no preferred answer."""
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True)
    for part in range(2):
        rows = [
            {
                "ds_name": "RLAIF-V",
                "image": {"bytes": jpeg_bytes(part), "path": f"{part}.jpg"},
                "question": f"What is on the table, number {row}?",
                "chosen": "" if (part, row) == (1, 2) else "A red plate with a cake lies on the table.",
                "rejected": "A dog sits on the table.",
                "origin_dataset": "VQAv2",
                "origin_split": '{"model": "any", "type": "question_answering"}',
                "idx": part * 3 + row,
                "image_path": f"images/{part}-{min(row, 1)}.jpg",
            }
            for row in range(3)
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, root / f"RLAIF-V-Dataset_{part:03d}.parquet", row_group_size=2)


def pope(root: Path) -> None:
    """Two pictures in three files of four questions each; the positive ones are the same in all of them."""
    for image in range(2):
        write_picture(root / "val2014" / f"COCO_val2014_{image:012d}.jpg", image)
    negatives = {"random": "car", "popular": "person", "adversarial": "fork"}
    for kind, noun in negatives.items():
        rows = []
        for image in range(2):
            for truth, asked in (("yes", "plate"), ("no", noun)):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": f"COCO_val2014_{image:012d}.jpg",
                        "text": f"Is there a {asked} in the image?",
                        "label": truth,
                    }
                )
        if kind == "popular":  # published as an array, too
            write_json(root / f"coco_pope_{kind}.json", rows)
        else:
            write_lines(root / f"coco_pope_{kind}.json", rows)


def amber(root: Path) -> None:
    """One picture with a question of every type, and a generative query."""
    write_picture(root / "image" / "AMBER_1.jpg", 5)
    asked = [
        (1, "Describe this image.", "generative", ["sky", "ball"]),
        (1005, "Is the ball yellow in this image?", "discriminative-attribute-state", "yes"),
        (5769, "Are there two balls in this image?", "discriminative-attribute-number", "no"),
        (7841, "Does the ball roll in this image?", "discriminative-attribute-action", "no"),
        (8633, "Is there a cloud in this image?", "discriminative-hallucination", "no"),
        (13557, "Is there direct contact between the ball and grass?", "discriminative-relation", "yes"),
        (14600, "Is there direct contact between the ball and sky?", "relation", "no"),
    ]
    queries = [{"id": i, "image": "AMBER_1.jpg", "query": text} for i, text, _, _ in asked]
    write_json(root / "query" / "query_all.json", queries)
    write_json(root / "annotations.json", [{"id": i, "type": kind, "truth": truth} for i, _, kind, truth in asked])


def coco(root: Path) -> None:
    """Three pictures: an outline, plain run lengths of a crowd, and nothing."""
    mask = disc()
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outline = np.stack([44 + 20 * np.cos(angles), 36 + 20 * np.sin(angles)], 1).reshape(-1).round(2).tolist()
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "height": HEIGHT, "width": WIDTH} for n in (7, 8, 9)]
    for image in images:
        write_picture(root / "val2014" / str(image["file_name"]), int(str(image["id"])))
    common = {"bbox": [24.0, 16.0, 40.0, 40.0], "area": 1256.0}
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 37, "iscrowd": 0, "segmentation": [outline], **common},
        {
            "id": 2,
            "image_id": 8,
            "category_id": 1,
            "iscrowd": 1,
            "segmentation": {"counts": runs, "size": [HEIGHT, WIDTH]},
            **common,
        },
        {"id": 3, "image_id": 8, "category_id": 37, "iscrowd": 0, "segmentation": [outline], **common},
    ]
    categories = [{"id": n, "name": name} for n, name in ((1, "person"), (37, "sports ball"), (53, "apple"))]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "instances_val2014.json", whole)


def vqa(root: Path, name: str = "v2_OpenEnded_mscoco_val2014_questions.json") -> None:
    """VQAv2's pair of files: yes/no, a number, and a question without an annotation."""
    write_picture(root / "val2014" / "COCO_val2014_000000262148.jpg", 11)
    questions = [
        {"image_id": 262148, "question": "Is the ball round?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many balls are there?", "question_id": 262148001},
        {"image_id": 262148, "question": "Where is the ball?", "question_id": 262148002},
    ]
    write_json(root / name, {"info": {}, "questions": questions})
    annotations = [
        vqa_annotation(262148000, "yes/no", ["yes"] * 9 + ["no"], "yes"),
        vqa_annotation(262148001, "number", ["1"] * 10, "1"),
    ]
    write_json(root / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})


def vqa_annotation(question: int, kind: str, answers: list[str], common: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question_id": question,
        "image_id": 262148,
        "answer_type": kind,
        "question_type": "none of the above",
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)],
    }
    return row | ({"multiple_choice_answer": common} if common else {})


def okvqa(root: Path) -> None:
    """OK-VQA: the same layout without `multiple_choice_answer`."""
    write_picture(root / "val2014" / "COCO_val2014_000000262148.jpg", 12)
    questions = [{"image_id": 262148, "question": "What sport uses this ball?", "question_id": 2971475}]
    write_json(root / "OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    answers = ["soccer"] * 4 + ["football"] * 6
    rows = [vqa_annotation(2971475, "other", answers, None)]
    write_json(root / "mscoco_val2014_annotations.json", {"annotations": rows})


def gqa(root: Path) -> None:
    """Two questions about one picture; the scene graph knows the box of one."""
    write_picture(root / "images" / "2405722.jpg", 13)
    questions = {
        "05451384": {
            "imageId": "2405722",
            "question": "What is the plate made of?",
            "answer": "ceramic",
            "fullAnswer": "The plate is made of ceramic.",
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": "material"},
            "annotations": {"question": {"3": "681267"}, "answer": {}, "fullAnswer": {}},
        },
        "05451385": {
            "imageId": "2405722",
            "question": "Is there a fork in the picture?",
            "answer": "no",
            "fullAnswer": "No, there is no fork.",
            "isBalanced": True,
            "types": {"structural": "verify", "semantic": "obj", "detailed": "exist"},
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        },
    }
    write_json(root / "val_balanced_questions.json", questions)
    thing = {"name": "plate", "x": 24, "y": 16, "w": 40, "h": 40, "attributes": [], "relations": []}
    graph = {"2405722": {"width": WIDTH, "height": HEIGHT, "objects": {"681267": thing}}}
    write_json(root / "val_sceneGraphs.json", graph)


def textvqa(root: Path) -> None:
    """One question with ten answers, and one of a split that is published without."""
    write_picture(root / "train_images" / "003a8ae2ef43b901.jpg", 14)
    common = {"image_id": "003a8ae2ef43b901", "image_classes": ["Ball"], "set_name": "val"}
    rows = [
        {"question": "What brand is the ball?", "question_id": 34602, "answers": ["dako"] * 6 + ["nous"] * 4, **common},
        {"question": "Who made the ball?", "question_id": 34603, **common},
    ]
    write_json(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def ocrvqa(root: Path) -> None:
    """One book with three questions, and one of another split."""
    write_picture(root / "images" / "1421556308.jpg", 15)
    book = {
        "imageURL": "http://images.amazon.com/images/P/1421556308.01.L.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?", "Is this a children's book?"],
        "answers": ["Mizuki Takehana", "The Blue Ball", "Yes"],
        "title": "The Blue Ball",
        "authorName": "Mizuki Takehana",
        "genre": "Comics",
        "split": 1,
    }
    write_json(root / "dataset.json", {"1421556308": book, "0000000000": {**book, "split": 3}})


def conversations(root: Path) -> None:
    """ShareGPT4V: one picture with two turns, one without an answer."""
    write_picture(root / "coco" / "train2017" / "000000000009.jpg", 16)
    turns = [
        {"from": "human", "value": "<image>\nWhat do you see in this photo?"},
        {"from": "gpt", "value": "The ball lies on a smooth ground and throws no shadow."},
        {"from": "human", "value": "What colour is the ball?"},
        {"from": "gpt", "value": "It is bright."},
    ]
    image = "coco/train2017/000000000009.jpg"
    rows = [
        {"id": "000000000009", "image": image, "conversations": turns},
        {"id": "000000000010", "image": image, "conversations": turns[:1]},
    ]
    write_json(root / "sharegpt4v_instruct_gpt4-vision_cap100k.json", rows)


def folder(root: Path) -> None:
    """Own pictures: one with its mask, one with its box, one about an absent object."""
    for number in range(2):
        write_picture(root / f"{number}.jpg", 17 + number)
    Image.fromarray(disc()).save(root / "0-mask.png")
    rows = [
        {
            "image": "0.jpg",
            "question": "Is there a mug in the image?",
            "answer": "yes",
            "candidates": ["yes", "no"],
            "rejected": "no",
            "keyword": "mug",
            "category": "existence",
            "regions": [{"box": list(BOX), "mask": "0-mask.png"}],
        },
        {
            "image": "1.jpg",
            "question": "Welche Farbe hat die Tasse? ☕",
            "answer": "blau",
            "keyword": "Tasse",
            "regions": [{"box": list(BOX)}],
        },
        {
            "image": "1.jpg",
            "question": "Is there a dog in the image?",
            "answer": "no",
            "candidates": ["yes", "no"],
            "category": "existence",
        },
    ]
    write_lines(root / "questions.jsonl", rows)


BUILDERS = {
    "rlaifv": rlaifv,
    "pope": pope,
    "amber": amber,
    "coco": coco,
    "vqav2": vqa,
    "okvqa": okvqa,
    "gqa": gqa,
    "textvqa": textvqa,
    "ocrvqa": ocrvqa,
    "sharegpt4v": conversations,
    "folder": folder,
}
