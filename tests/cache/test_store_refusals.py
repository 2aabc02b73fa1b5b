"""What never gets into a store, and folders that are not built into."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import storekit

from ezsd.cache import Block, RaggedRows, Store, StoreError, StoreMismatch, info, write_block
from ezsd.cache.format.sealed_json import seal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def building(tmp_path_factory):
    """An unfinished store with nothing journaled; refused rows leave it so."""
    path = tmp_path_factory.mktemp("building") / "store"
    with storekit.open_writer(path) as writer:
        yield path, writer.blocks[0]
        assert len(writer.pending()) == 6
        assert list((path / "journal/tmp").iterdir()) == []


def changed(rows, product, field, change):
    """The block's products with one column changed by a function of a copy of it."""
    values = rows[product].fields[field].copy()
    result = change(values)
    fields = {**rows[product].fields, field: values if result is None else result}
    return {**rows, product: replace(rows[product], fields=fields)}


def put(place, value):
    def change(values):
        values[place] = value

    return change


@pytest.mark.parametrize(
    ("product", "field", "change", "message"),
    [
        ("regions", "embedding", put((3, 5), np.nan), r"block 0, regions.embedding: row 3 \(image 70\) is not finite"),
        ("regions", "embedding", put((3, 5), np.inf), r"embedding: row 3 \(image 70\) is not finite"),
        ("regions", "embedding", put(3, 0), "row 3 .* is not of unit length"),
        ("ground_truth", "embedding", lambda e: e * np.float16(1.01), "ground_truth.embedding: row 0 .* unit length"),
        ("regions", "embedding", lambda e: e.astype("f4"), "expected float16, found float32; convert it first"),
        ("regions", "embedding", lambda e: e[:, :-1], r"expected shape \(\d+, 32\) .* found \(\d+, 31\)"),
        ("regions", "score", lambda s: s[:-1], "expected shape"),
        ("regions", "score", lambda s: s.tolist(), "expected a numpy array, found list"),
        ("proposals", "score", put(-1, np.nan), r"proposals.score: row \d+ \(image 3\) is not finite: nan"),
        ("regions", "confidence", put(0, -np.inf), "confidence: row 0 .* is not finite"),
        ("proposals", "box", put((0, 1), np.nan), "proposals.box: row 0 .* is not finite"),
        ("proposals", "box", put((0, 0), -1), "row 0 .* reaches beyond its image"),
        ("proposals", "box", put((0, 2), 64.5), "row 0 .* reaches beyond its image"),
        ("proposals", "box", put((-1, 3), 51), r"\(image 3\) reaches beyond its image"),
        ("ground_truth", "box", lambda b: b[:, [2, 1, 0, 3]], "row 0 .* has no area"),
        ("ground_truth", "class_index", lambda c: c.astype("i8"), "expected int32, found int64"),
    ],
)
def test_bad_rows_are_refused_by_name_and_image(building, product, field, change, message):
    path, block = building
    with pytest.raises(StoreError, match=message):
        write_block(path, block, changed(storekit.block_rows(block), product, field, change))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([1, 1], "i4"), r"expected shape \(2, 4\)"),
        (np.array([1, 1, 1], "i4"), r"counts must be int32 of shape \(2,\)"),
        (np.array([1, 1]), "counts must be int32"),
        (np.array([-1, 200], "i4"), "cannot be negative"),
    ],
)
def test_counts_must_fit_images_and_rows(building, counts, message):
    path, block = building
    rows = storekit.block_rows(block)
    with pytest.raises(StoreError, match=message):
        write_block(path, block, {**rows, "proposals": replace(rows["proposals"], counts=counts)})


def test_products_and_fields_must_be_exactly_those_of_the_schema(building):
    path, block = building
    rows = storekit.block_rows(block)
    with pytest.raises(StoreError, match=r"products: expected \['ground_truth', 'proposals', 'regions'\]"):
        write_block(path, block, {"regions": rows["regions"]})
    less = RaggedRows(counts=rows["proposals"].counts, fields={"box": rows["proposals"].fields["box"]})
    with pytest.raises(StoreError, match=r"proposals: fields: expected \['box', 'score'\], found \['box'\]"):
        write_block(path, block, {**rows, "proposals": less})


@pytest.mark.parametrize("block", [Block(0, 0, 1), Block(0, 1, 3), Block(6, 12, 14), Block(-1, 0, 2)])
def test_a_part_of_a_block_cannot_be_written(building, block):
    with pytest.raises(StoreError, match="is not a block of this store"):
        write_block(building[0], block, storekit.block_rows(Block(0, 0, 1)))


def test_float16_rounding_of_a_unit_vector_is_accepted(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((4000, 1024)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    box = np.tile(np.array([0, 0, 64, 48], "f4"), (4000, 1))
    counts, empty, none = np.array([4000], "i4"), np.zeros(1, "i4"), vectors[:0].astype("f2")
    proposals = {"box": box[:0], "score": box[:0, 0]}
    truth = {"box": box[:0], "class_index": empty[:0], "annotation_id": np.zeros(0, "i8"), "embedding": none}
    regions = {"box": box, "score": box[:, 0], "confidence": box[:, 0], "class_index": np.zeros(4000, "i4")}
    with storekit.open_writer(tmp_path, image_ids=[1], widths=[64], heights=[48], embed_dim=1024) as writer:
        products = {
            "proposals": RaggedRows(empty, proposals),
            "regions": RaggedRows(counts, {**regions, "embedding": vectors.astype("f2")}),
            "ground_truth": RaggedRows(empty, truth),
        }
        write_block(tmp_path, writer.blocks[0], products)
        assert writer.pending() == []


@pytest.mark.parametrize(
    ("product", "arrays", "attributes", "message"),
    [
        ("labels", {}, {}, "has no per-store product 'labels'; it has teacher, text"),
        ("teacher", {"weights": np.zeros(3, "f4")}, {}, r"teacher: arrays: expected \['values'\]"),
        ("teacher", {"values": np.array([0, np.nan], "f4")}, {}, "teacher.values: row 1 is not finite"),
        ("teacher", {"values": np.zeros(3)}, {}, "expected float32, found float64"),
        ("teacher", {"values": np.zeros(3, "f4")}, [1], "the attributes must be a JSON object, found list"),
        ("teacher", {"values": np.zeros(3, "f4")}, {"when": np.int64(3)}, "teacher.user.when: a int64 is not JSON"),
        ("text", {"embedding": np.eye(2, 32, dtype="f4") * 2}, {"names": ["a", "b"]}, "row 0 is not of unit length"),
        ("text", {"embedding": np.eye(2, 31, dtype="f4")}, {"names": ["a", "b"]}, r"expected shape \(2, 32\)"),
        ("text", {"embedding": np.eye(2, 32, dtype="f4")}, {}, 'must hold "names"'),
        ("text", {"embedding": np.eye(2, 32, dtype="f4")}, {"names": ["a", "a"]}, "2 embeddings but 1 different names"),
    ],
)
def test_bad_whole_products_are_refused(tmp_path, product, arrays, attributes, message):
    with storekit.open_writer(tmp_path) as writer, pytest.raises(StoreError, match=message):
        writer.write_per_store(product, arrays, attributes)


def test_a_per_store_product_is_written_once(tmp_path):
    with storekit.open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
        arrays, attributes = storekit.PER_STORE["teacher"]
        writer.write_per_store("teacher", arrays, attributes)
        with pytest.raises(StoreError, match="was written before, with other contents; use read_per_store"):
            writer.write_per_store("teacher", {"values": arrays["values"] + 1}, attributes)
        assert (writer.read_per_store("teacher")[0]["values"] == arrays["values"]).all()


OTHER = storekit.manifest(proposals={"nms_iou": 0.5}, text={"prompts": "new"})


@pytest.mark.parametrize("complete", [True, False])
def test_another_manifest_is_refused_by_the_name_of_the_difference(finished, tmp_path, complete):
    path = finished if complete else tmp_path
    if not complete:
        storekit.open_writer(path).close()
    message = (
        "made from something else: proposals.nms_iou: store has 0.7, wanted 0.5; "
        'text.prompts: store has no such entry, wanted "new"; '
    )
    # Nothing can be taken over from a store that is not finished.
    message += (
        f"build into another folder: `path={path}-2`; equal there: teacher, ground_truth"
        if complete
        else f"it is not finished: go on with the settings that it was begun with, or remove the folder {path}, or "
        f"build into another folder: `path={path}-2`"
    )
    with pytest.raises(StoreMismatch, match=re.escape(message)):
        storekit.open_writer(path, manifest=OTHER)


def test_the_proposed_folder_is_a_free_one_and_nothing_is_promised_of_a_store_that_shares_nothing(finished):
    other = storekit.manifest(teacher={"seed": 4})
    taken = finished.with_name(f"{finished.name}-2")
    taken.mkdir()
    try:
        with pytest.raises(StoreMismatch, match=f"build into another folder: `path={finished}-3`$"):
            storekit.open_writer(finished, manifest=other)
    finally:
        taken.rmdir()


def test_a_manifest_of_other_images_is_refused(tmp_path):
    with pytest.raises(StoreError, match="the manifest was made for another list of images"):
        storekit.open_writer(tmp_path, manifest=storekit.manifest(images=([1], [2], [3])))


def test_training_refuses_a_store_made_from_something_else(finished):
    Store(finished).require(storekit.manifest())
    with pytest.raises(StoreMismatch, match="nms_iou: store has 0.7, wanted 0.5; .*use a store made for these"):
        Store(finished).require(OTHER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": storekit.IDS[::-1]}, "images_sha256"),
        ({"widths": [65, *storekit.WIDTHS[1:]]}, "images_sha256"),
        ({"embed_dim": 16}, "embed_dim: store has 32, wanted 16"),
        ({"block_images": 3}, "block_images: store has 2, wanted 3"),
        ({"shard_bytes": 1}, "shard_bytes: store has 16384, wanted 1"),
    ],
)
def test_a_build_is_not_resumed_with_other_images_or_geometry(tmp_path, change, message):
    storekit.open_writer(tmp_path).close()
    with pytest.raises(StoreMismatch, match=message):
        storekit.open_writer(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": [70, *storekit.IDS[:-1]]}, "id 70 is in the list more than once"),
        ({"image_ids": storekit.IDS[1:]}, "10 ids, 11 widths and 11 heights"),
        ({"image_ids": [], "widths": [], "heights": []}, "the list is empty"),
        ({"widths": [0, *storekit.WIDTHS[1:]]}, "image 70 has 0 x 48 pixels"),
        ({"widths": [2**40, *storekit.WIDTHS[1:]]}, "must be whole numbers within int32"),
        ({"image_ids": [str(image) for image in storekit.IDS]}, "must be whole numbers"),
        ({"heights": [0.5, *storekit.HEIGHTS[1:]]}, "must be whole numbers"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"block_images": 0}, "block_images must be at least 1, got 0"),
    ],
)
def test_images_that_make_no_sense_are_refused_and_no_folder_is_made(tmp_path, change, message):
    with pytest.raises(StoreError, match=message):
        storekit.open_writer(tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="holds 'holiday.jpg' but no store"):
        storekit.open_writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(StoreError, match="is a file"):
        storekit.open_writer(tmp_path / "holiday.jpg")


def test_a_second_builder_is_turned_away_and_a_killed_one_is_not_in_the_way(tmp_path):
    script = (
        "import storekit, sys, time; w = storekit.open_writer(sys.argv[1]); print('up', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    ) as builder:
        assert builder.stdout.readline() == b"up\n"
        with pytest.raises(StoreError, match="another process is building this store"):
            storekit.open_writer(tmp_path)
        builder.send_signal(signal.SIGKILL)
    with storekit.open_writer(tmp_path) as writer:
        assert len(writer.pending()) == 6


def test_a_second_builder_in_the_same_process_is_turned_away_too(tmp_path):
    with storekit.open_writer(tmp_path):
        for _ in range(2):
            with pytest.raises(StoreError, match="another process is building"):
                storekit.open_writer(tmp_path)
    storekit.open_writer(tmp_path).close()


def test_another_format_version_is_refused_by_every_door(copy, tmp_path):
    mark = json.loads((copy / "COMMIT.json").read_text())
    mark.pop("sha256")
    (copy / "COMMIT.json").write_bytes(seal({**mark, "format_version": 1}))
    for door in (Store, info, storekit.open_writer):
        with pytest.raises(StoreError, match="store format 1, this version reads formats 2, 3, 4"):
            door(copy)
    path = tmp_path / "unfinished"
    storekit.open_writer(path).close()
    entry = json.loads((path / "journal/plan/entry.json").read_text())
    entry.pop("sha256")
    entry["attributes"]["format_version"] = 7
    (path / "journal/plan/entry.json").write_bytes(seal(entry))
    for door in (Store, info, storekit.open_writer):
        with pytest.raises(StoreError, match="store format 7"):
            door(path)
