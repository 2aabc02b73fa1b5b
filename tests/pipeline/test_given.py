"""Boxes that somebody else made take the place of scored anchors; everything after them is the same."""

import json

import numpy as np
import pytest

from ezsd.cache import Store, StoreMismatch
from ezsd.errors import ResultsError
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.external_proposals import given_proposals
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest


def entries(proposals):
    """Proposals by image as a results file has them."""
    return [
        {"image_id": image_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image_id, rows in proposals.items()
        for (x1, y1, x2, y2), score in zip(rows.box.astype("f8").tolist(), rows.score.tolist(), strict=True)
    ]


@pytest.fixture
def boxes_file(shapes_store, tmp_path):
    """The quick store's own proposals, worst first, as a results file."""
    store = Store(shapes_store)
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries({int(i): store.proposals[int(i)] for i in store.image_ids})[::-1]))
    return path


@pytest.fixture
def build(shapes_dataset, tmp_path):
    def run(config, name, **options):
        request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / name, **({"workers": 1} | options))
        build_cache(request)
        return Store(request.out)

    return run


def same(first, second):
    """Whether every image has the same rows in two mappings of a store."""
    for image_id in first:
        a, b = first[image_id], second[image_id]
        for name in type(a).__slots__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{image_id} {name}")


@pytest.mark.usefixtures("warm_workers")
def test_its_own_proposals_given_back_make_the_same_regions(build, shapes_store, with_settings, boxes_file):
    given = build(with_settings(proposals={"boxes": str(boxes_file)}), "given", reuse=shapes_store, workers=2)
    own = Store(shapes_store)
    same(given.proposals, own.proposals)
    same(given.regions, own.regions)
    same(given.ground_truth, own.ground_truth)
    assert given.manifest.fingerprints["ground_truth"] == own.manifest.fingerprints["ground_truth"]
    assert given.manifest.fingerprints["proposals"] != own.manifest.fingerprints["proposals"]


def test_nothing_is_filtered_unless_asked_for(build, shapes_store, with_settings, boxes_file):
    free = {"base_iou": 1.1, "drop_base_guesses": False, "drop_background": False, "max_regions": 7}
    store = build(with_settings(proposals={"boxes": str(boxes_file), **free}), "free", reuse=shapes_store)
    for image_id in store.image_ids.tolist():
        np.testing.assert_array_equal(store.regions[image_id].box, store.proposals[image_id].box[:7])
    assert min(store.regions[i].confidence.min() for i in store.image_ids.tolist()) < 0.5


def test_background_is_dropped_again_from_a_store_that_kept_it(build, shapes_store, with_settings):
    loose = build(with_settings(proposals={"drop_background": False}), "loose", reuse=shapes_store)
    assert loose.manifest != Store(shapes_store).manifest
    again = build(with_settings(), "again", reuse=loose.path)
    same(again.regions, Store(shapes_store).regions)
    assert sum(len(loose.regions[i].box) for i in loose.image_ids.tolist()) > sum(
        len(again.regions[i].box) for i in again.image_ids.tolist()
    )


def test_several_background_prompts_leave_less_over(build, shapes_store, with_settings, monkeypatch):
    two = build(with_settings(teacher={"background": ("background", "red")}), "two", reuse=shapes_store)
    one = Store(shapes_store)
    assert two.manifest.products["proposals"].inputs["background"] == ["background", "red"]
    assert two.manifest.fingerprints["text"] == one.manifest.fingerprints["text"]
    kept = [sum(float(s.regions[i].confidence.sum()) for i in one.image_ids.tolist()) for s in (one, two)]
    assert kept[1] < kept[0]
    # A complete store is recognised by its record.
    monkeypatch.setattr("ezsd.pipeline.extraction.build.configured_teacher", None)
    build(with_settings(teacher={"background": ("background", "red")}), "two")


def test_other_boxes_are_another_store(build, shapes_store, with_settings, boxes_file):
    config = with_settings(proposals={"boxes": str(boxes_file)})
    build(config, "given", reuse=shapes_store)
    boxes_file.write_text(json.dumps(json.loads(boxes_file.read_text())[1:]))
    with pytest.raises(StoreMismatch, match=r"proposals\.boxes_sha256"):
        build(config, "given")


def test_a_store_of_given_boxes_is_repaired_from_them(build, shapes_dataset, shapes_store, with_settings, boxes_file):
    store = build(with_settings(proposals={"boxes": str(boxes_file)}), "given", reuse=shapes_store)
    shard = sorted((store.path / "proposals/box/c").rglob("*"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    report = repair_store(store.path, shapes_dataset.root, weights=None, device="cpu")
    assert not report.left
    assert shard.read_bytes() == whole


def test_boxes_are_cut_to_the_image_and_the_best_kept(shapes_store, with_settings, tmp_path, shapes_dataset):
    images = training_annotations(shapes_dataset.root / shapes_dataset.train_annotations, shapes_dataset.split).images
    one = {"image_id": 1, "category_id": 77}
    path = tmp_path / "boxes.json"
    path.write_text(
        json.dumps(
            [
                one | {"bbox": [0, 0, 10, 10], "score": 0.1},
                one | {"bbox": [-5, 120, 15, 50], "score": 0.9},
                one | {"bbox": [127.5, 0, 40, 40], "score": 1.0},
                one | {"bbox": [3, 3, 4, 5], "score": 0.5},
            ]
        )
    )
    found = given_proposals(with_settings(proposals={"boxes": str(path), "max_proposals": 2}).proposals, images)
    assert found[1]["box"].tolist() == [[0, 120, 10, 128], [3, 3, 7, 8]]
    assert found[1]["score"].tolist() == pytest.approx([0.9, 0.5])
    assert found.keys() == {image.id for image in images}
    assert found[2]["box"].shape == (0, 4)


def test_boxes_of_a_printed_document_go_by_file_names(with_settings, tmp_path, shapes_dataset):
    images = training_annotations(shapes_dataset.root / shapes_dataset.train_annotations, shapes_dataset.split).images
    path = tmp_path / "boxes.json"
    document = {
        "images": [{"id": 1, "file_name": f"elsewhere/{images[4].file_name}", "width": 128, "height": 128}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.1}],
    }
    path.write_text(json.dumps(document))
    found = given_proposals(with_settings(proposals={"boxes": str(path)}).proposals, images)
    assert {image_id: len(rows["box"]) for image_id, rows in found.items()} == {
        image.id: int(image.id == images[4].id) for image in images
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConfigError, r"proposals\.boxes .*boxes\.json: no such file"),
        ("[{]", ResultsError, "expected JSON"),
        ('[{"image_id": 999, "bbox": [0, 0, 1, 1], "score": 1}]', ResultsError, r"\[0\]\.image_id.*found 999"),
        ('[{"image_id": 1, "bbox": [0, 0, 1], "score": 1}]', ResultsError, r"\[0\]\.bbox: expected four"),
        ('[{"image_id": 1, "bbox": [0, 0, 1, 1], "score": NaN}]', ResultsError, r"\[0\]\.score: expected a finite"),
    ],
)
def test_a_file_that_is_not_in_order_is_refused_before_anything_is_written(
    content, error, message, build, with_settings, tmp_path
):
    path = tmp_path / "boxes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        build(with_settings(proposals={"boxes": str(path)}), "never")
    assert not (tmp_path / "never").exists()
