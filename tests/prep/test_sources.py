"""Every source on a small copy of its real layout: what each row becomes, and what no row may do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import prep_samples
import pytest
from prep_runs import SOURCES, config_of, prepared, records, rejects

from csp_jax.errors import UserError
from csp_jax.records import decode_mask
from data_prep.run import prepare
from data_prep.sources.base import units
from data_prep.sources.registry import open_source


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_files_give_the_same_units(source, tmp_path):
    """Also in another process: ray's reader opens what was opened here, and its units go on to ray's workers."""
    prep_samples.BUILDERS[source](tmp_path / source)
    config = config_of(source, tmp_path / source, tmp_path / "out")
    for group in (False, True):
        opened = open_source(config)
        first, second, sent = (
            [(u.number, u.key, u.image_id, u.items, u.rejects) for u in found]
            for found in (
                units(opened, group=group),
                units(open_source(config), group=group),
                pickle.loads(pickle.dumps(list(units(pickle.loads(pickle.dumps(opened)), group=group)))),
            )
        )
        assert sent == first
        assert first == second
        numbers = [number for number, *_ in first]
        assert numbers == list(range(len(numbers)))
        ids = [item.id for _, _, _, items, _ in first for item in items]
        assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("group", [False, True])
def test_every_row_is_packed_rejected_or_merged(source, group, tmp_path):
    done = prepared(source, tmp_path, pack={"group": group})
    totals = done.totals
    assert open_source(config_of(source, tmp_path / source, tmp_path / "out")).count() == totals["rows"]
    assert totals["rows"] == totals["questions"] + totals["rejected"] + totals["merged"]
    stored = records(done.directory)
    assert len(stored) == totals["records"]
    assert sum(len(record.items) for record in stored) == totals["items"] == totals["questions"]
    assert len(rejects(done.directory)) == totals["rejected"]
    if group:
        assert len({record.image_id for record in stored}) == len(stored)


def test_rlaifv_keeps_the_pair_and_the_picture_byte_for_byte(tmp_path):
    import pyarrow.parquet

    done = prepared("rlaifv", tmp_path)
    raw = [
        row
        for path in sorted((tmp_path / "rlaifv").glob("*.parquet"))
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    kept = [row for row in raw if row["chosen"]]
    stored = records(done.directory)
    assert [record.images[0] for record in stored] == [row["image"]["bytes"] for row in kept]
    for record, row in zip(stored, kept, strict=True):
        (item,) = record.items
        assert (item.question, item.response, item.rejected) == (row["question"], row["chosen"], row["rejected"])
        assert item.coefficient_dataset == row["origin_dataset"]
        assert (item.right, item.truth, item.candidates) == (1, "", ())
        assert row["image_path"] in record.image_id
    assert [reject["reason"] for reject in rejects(done.directory)] == ["no_answer"]


def test_rlaifv_without_trust_does_not_say_that_the_preferred_answer_is_right(tmp_path):
    done = prepared("rlaifv", tmp_path, source={"name": "rlaifv", "root": str(tmp_path / "rlaifv"), "trust": False})
    assert {item.right for record in records(done.directory) for item in record.items} == {-1}


def test_rlaifv_groups_questions_of_a_picture_over_row_groups(tmp_path):
    done = prepared("rlaifv", tmp_path, pack={"group": True})
    # rows 1 and 2 of each file share a picture; they lie in different row groups, and one row is rejected
    assert [len(record.items) for record in records(done.directory)] == [1, 2, 1, 1]


def test_pope_merges_what_several_files_ask(tmp_path):
    done = prepared("pope", tmp_path, pack={"group": True})
    assert done.totals["rows"] == 12
    assert done.totals["merged"] == 4
    for record in records(done.directory):
        subsets = {item.question: set(item.subsets) for item in record.items}
        assert subsets == {
            "Is there a plate in the image?": {"random", "popular", "adversarial"},
            "Is there a car in the image?": {"random"},
            "Is there a person in the image?": {"popular"},
            "Is there a fork in the image?": {"adversarial"},
        }
        for item in record.items:
            assert item.truth == item.response == ("yes" if "plate" in item.question else "no")
            assert (item.candidates, item.right) == (("yes", "no"), 1)
            assert item.keyword in item.question
            assert bool(item.regions) == (item.truth == "yes")


def test_amber_knows_its_types_and_rejects_generative_queries(tmp_path):
    done = prepared("amber", tmp_path)
    items = [item for record in records(done.directory) for item in record.items]
    assert [(item.subsets, item.category, item.truth) for item in items] == [
        (("attribute",), "state", "yes"),
        (("attribute",), "number", "no"),
        (("attribute",), "action", "no"),
        (("existence",), "existence", "no"),
        (("relation",), "relation", "yes"),
        (("relation",), "relation", "no"),
    ]
    assert [(r["id"], r["reason"]) for r in rejects(done.directory)] == [("amber-1", "no_answer")]


def test_coco_asks_about_what_is_there_and_as_often_about_what_is_not(tmp_path):
    done = prepared(
        "coco",
        tmp_path,
        pack={"group": True},
        source={**SOURCES["coco"], "root": str(tmp_path / "coco"), "absent": "random"},
    )
    stored = {record.image_id: record for record in records(done.directory)}
    assert set(stored) == {f"coco-COCO_val2014_{n:012d}.jpg" for n in (7, 8)}
    for record in stored.values():
        present = [item for item in record.items if item.truth == "yes"]
        absent = [item for item in record.items if item.truth == "no"]
        assert [item.keyword for item in present] == ["sports ball"]
        assert len(absent) == 1
        assert absent[0].keyword in (("person", "apple") if "07." in record.image_id else ("apple",))
        (region,) = record.regions
        mask = decode_mask(region.mask, prep_samples.HEIGHT, prep_samples.WIDTH)
        truth = prep_samples.disc()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.95
        assert region.box == tuple(map(float, prep_samples.BOX))


def test_coco_crowds_are_asked_about_only_on_request(tmp_path):
    source = {**SOURCES["coco"], "root": str(tmp_path / "coco"), "crowds": True, "absent": "none"}
    done = prepared("coco", tmp_path, source=source)
    items = {item.keyword: record for record in records(done.directory) for item in record.items}
    assert set(items) == {"sports ball", "person"}
    mask = decode_mask(items["person"].regions[0].mask, prep_samples.HEIGHT, prep_samples.WIDTH)
    np.testing.assert_array_equal(mask, prep_samples.disc())


def test_vqa_takes_the_published_answer_or_the_most_common_one(tmp_path):
    done = prepared("vqav2", tmp_path)
    yes_no, number = (record.items[0] for record in records(done.directory))
    assert (yes_no.truth, yes_no.candidates, yes_no.rejected) == ("yes", ("yes", "no"), "no")
    assert (number.truth, number.response, number.candidates, number.right) == ("1", "1", (), 1)
    assert [reject["reason"] for reject in rejects(done.directory)] == ["no_answer"]
    (record,) = records(prepared("okvqa", tmp_path / "ok").directory)
    assert record.items[0].truth == "football"
    assert record.items[0].coefficient_dataset == "OK-VQA"


def test_gqa_boxes_come_from_the_scene_graph(tmp_path):
    material, fork = records(prepared("gqa", tmp_path).directory)
    assert (material.items[0].keyword, material.items[0].truth) == ("plate", "ceramic")
    assert material.regions[0].box == tuple(map(float, prep_samples.BOX))
    assert fork.items[0].candidates == ("yes", "no")


def test_textvqa_ocrvqa_and_conversations(tmp_path):
    (record,) = records(prepared("textvqa", tmp_path / "text").directory)
    assert (record.items[0].truth, record.items[0].coefficient_dataset) == ("dako", "TextVQA")
    books = records(prepared("ocrvqa", tmp_path / "ocr").directory)
    assert [record.items[0].truth for record in books] == ["Mizuki Takehana", "The Blue Ball", "yes"]
    assert books[2].items[0].candidates == ("yes", "no")
    turns = records(prepared("sharegpt4v", tmp_path / "share").directory)
    assert [record.items[0].question for record in turns] == [
        "What do you see in this photo?",
        "What colour is the ball?",
    ]
    assert {record.items[0].right for record in turns} == {-1}


def test_a_folder_brings_masks_boxes_and_words_of_any_script(tmp_path):
    mug, cup, dog = records(prepared("folder", tmp_path).directory)
    mask = decode_mask(mug.regions[0].mask, prep_samples.HEIGHT, prep_samples.WIDTH)
    np.testing.assert_array_equal(mask, prep_samples.disc())
    assert cup.items[0].question == "Welche Farbe hat die Tasse? ☕"
    assert cup.items[0].right == 1
    box = decode_mask(cup.regions[0].mask, prep_samples.HEIGHT, prep_samples.WIDTH)
    x0, y0, x1, y1 = prep_samples.BOX
    assert box.sum() == box[y0:y1, x0:x1].sum() == (x1 - x0) * (y1 - y0)
    assert dog.items[0].keyword == "dog"
    assert dog.regions == ()


def test_a_finished_data_set_is_a_source_again(tmp_path):
    first = prepared("folder", tmp_path)
    for masks, whole in ((True, prep_samples.disc().sum()), (False, 40 * 40)):
        out = tmp_path / f"again-{masks}"
        source = {"name": "shards", "root": str(first.directory), "masks": masks}
        done = prepare(config_of("folder", tmp_path, out, dataset="again", source=source))
        before, after = records(first.directory), records(done.directory)
        assert [record.items for record in after] == [record.items for record in before]
        assert [record.images for record in after] == [record.images for record in before]
        mask = decode_mask(after[0].regions[0].mask, prep_samples.HEIGHT, prep_samples.WIDTH)
        assert mask.sum() == whole


def test_a_limit_counts_rows(tmp_path):
    assert prepared("amber", tmp_path, limit=3).totals["rows"] == 3


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("questions.jsonl", '{"image": "0.jpg"}\n', "bad_row"),
        ("questions.jsonl", '{"image": "0.jpg", "question": 3}\n', "bad_row"),
        ("questions.jsonl", '{"image": "0.jpg", "question": "Why?", "colour": 3}\n', "bad_row"),
        ("questions.jsonl", '{"image": "0.jpg", "question": "Why?", "regions": [{"box": [5, 5, 5, 9]}]}\n', "bad_row"),
        ("questions.jsonl", "[1, 2]\n", "bad_row"),
        ("questions.jsonl", '{"image": "0.jpg", "ques\n', "bad_row"),
    ],
)
def test_a_bad_line_is_rejected_and_the_next_one_read(name, text, reason, tmp_path):
    prep_samples.folder(tmp_path / "folder")
    file = tmp_path / "folder" / name
    good = file.read_text()
    file.write_text(text + good)
    done = prepared("folder", tmp_path)
    assert [(r["where"], r["reason"]) for r in rejects(done.directory)] == [(f"{name}:1", reason)]
    assert done.totals["questions"] == 3


def test_ids_that_come_twice_are_rejected(tmp_path):
    prep_samples.folder(tmp_path / "folder")
    file = tmp_path / "folder" / "questions.jsonl"
    rows = [{**json.loads(line), "id": "same"} for line in file.read_text().splitlines()]
    prep_samples.write_lines(file, rows)
    done = prepared("folder", tmp_path)
    assert [reject["reason"] for reject in rejects(done.directory)] == ["duplicate_id"] * 2


def damage(path: Path) -> None:
    """Zeros over all pages; the footer stays whole."""
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    path.write_bytes(data[:4] + bytes(len(data) - footer - 4) + data[-footer:])


@pytest.mark.parametrize(
    ("source", "break_it", "field"),
    [
        ("pope", lambda root: [p.unlink() for p in root.glob("*.json")], "source.files"),
        ("amber", lambda root: (root / "annotations.json").write_text("{"), "annotations.json"),
        ("coco", lambda root: (root / "annotations/instances_val2014.json").write_text("[]"), "instances"),
        ("rlaifv", lambda root: (root / "RLAIF-V-Dataset_001.parquet").write_bytes(b"PAR1"), "_001.parquet"),
        ("rlaifv", lambda root: damage(root / "RLAIF-V-Dataset_001.parquet"), "_001.parquet"),
        ("textvqa", lambda root: (root / "TextVQA_0.5.1_val.json").write_text("[]"), "TextVQA"),
    ],
)
def test_what_breaks_a_whole_source_is_one_clear_line(source, break_it, field, tmp_path):
    prep_samples.BUILDERS[source](tmp_path / source)
    break_it(tmp_path / source)
    with pytest.raises(UserError, match=field):
        prepared(source, tmp_path)
