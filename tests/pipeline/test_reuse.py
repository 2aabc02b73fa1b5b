"""What an earlier store has is taken over, and the result is that of a build from nothing."""

import dataclasses
import shutil

import numpy as np
import pytest

import ezsd.pipeline.extraction.build
import ezsd.pipeline.extraction.jobs
import ezsd.pipeline.extraction.worker
from ezsd.cache import Store, StoreMismatch, compare, repair, verify
from ezsd.pipeline.console.store_messages import repair_lines
from ezsd.pipeline.data.image_source import ImageFolder
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.extraction.teacher import configured_teacher


def files(store):
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in sorted(store.rglob("*"))
        if p.is_file() and p.name not in {"environment.json", "build.log"}
    }


@pytest.fixture
def build(shapes_dataset, tmp_path):
    def run(config, name, reuse=None):
        request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / name, workers=1, reuse=reuse)
        return build_cache(request)

    return run


@pytest.fixture
def crops_seen(monkeypatch):
    """How many crops the teacher was shown while regions were extracted."""
    seen = []
    real = ezsd.pipeline.extraction.jobs.extract_block

    def counting(job, block):
        from ezsd.pipeline.extraction.worker import _worker

        teacher = _worker(job).teacher
        encode = type(teacher).encode_image

        def encode_image(pixels):
            seen.append(len(pixels))
            return encode(teacher, pixels)

        monkeypatch.setattr(teacher, "encode_image", encode_image)
        return real(job, block)

    monkeypatch.setattr(ezsd.pipeline.extraction.jobs, "extract_block", counting)
    return seen


LATE = [
    pytest.param({"proposals": {"max_regions": 4}}, "regions", marks=pytest.mark.slow),
    ({"proposals": {"base_iou": 0.1}}, "regions"),
    ({"proposals": {"drop_base_guesses": False, "max_regions": 20}}, "regions"),
]


@pytest.mark.parametrize(("change", "computed"), LATE)
def test_other_filters_choose_again_among_the_same_proposals(
    change, computed, build, shapes_store, with_settings, tmp_path, crops_seen
):
    config = with_settings(**change)
    report = build(config, "reusing", reuse=shapes_store)
    assert report.computed == (computed,)
    reencoded = sum(crops_seen)
    crops_seen.clear()
    build(config, "fresh")
    assert files(tmp_path / "reusing") == files(tmp_path / "fresh")
    assert reencoded < sum(crops_seen)


def test_no_image_is_read_of_which_nothing_is_encoded(build, with_settings, tmp_path, crops_seen, monkeypatch):
    """Few regions are chosen where the earlier store kept every proposal that is clear of base boxes."""
    every = {"drop_base_guesses": False, "max_regions": 1000}
    build(with_settings(teacher={"background": None}, proposals=every), "every")
    crops_seen.clear()
    read, real = [], ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda *image: read.append(image) or real(*image))
    few = with_settings(teacher={"background": None}, proposals=every | {"max_regions": 4})
    assert build(few, "few", reuse=tmp_path / "every").computed == ("regions",)
    assert (crops_seen, read) == ([], [])


def test_smaller_embeddings_are_converted_and_nothing_is_encoded(
    build, shapes_store, with_settings, tmp_path, crops_seen
):
    config = with_settings(build={"embedding": "int8"})
    report = build(config, "reusing", reuse=shapes_store)
    assert report.computed == ()
    assert crops_seen == []
    build(config, "fresh")
    assert files(tmp_path / "reusing") == files(tmp_path / "fresh")
    half, small = Store(shapes_store), Store(tmp_path / "reusing")
    for image_id in half.image_ids.tolist():
        before = half.regions[image_id].embedding.astype("f4")
        after = small.regions[image_id].embedding.astype("f4")
        np.testing.assert_allclose((before * after).sum(1), 1, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-3)


def test_other_proposals_still_take_over_the_teacher_and_ground_truth(build, shapes_store, with_settings, tmp_path):
    config = with_settings(proposals={"nms_iou": 0.5})
    report = build(config, "reusing", reuse=shapes_store)
    assert report.reused == ("teacher", "text", "ground_truth")
    build(config, "fresh")
    assert files(tmp_path / "reusing") == files(tmp_path / "fresh")


def test_an_early_change_proposes_a_folder_and_says_what_it_could_take_over(
    shapes_dataset, shapes_store, with_settings
):
    before = files(shapes_store)
    late = BuildRequest(
        dataset=shapes_dataset, config=with_settings(proposals={"max_regions": 4}), out=shapes_store, workers=1
    )
    with pytest.raises(
        StoreMismatch,
        match=rf"proposals\.max_regions: store has 10, wanted 4; .*`out={shapes_store}-2` `reuse={shapes_store}` takes",
    ):
        build_cache(late)
    early = dataclasses.replace(late, config=with_settings(teacher={"template": "{}"}))
    with pytest.raises(StoreMismatch, match=rf"teacher\.template.*another folder: `out={shapes_store}-2`$"):
        build_cache(early)
    assert files(shapes_store) == before


def test_a_complete_store_is_recognised_before_the_teacher_is_loaded(
    shapes_dataset, shapes_store, quick_config, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(ezsd.pipeline.extraction.build, "configured_teacher", refuse)
    request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=shapes_store, workers=1)
    assert build_cache(request).already_complete
    # Earlier versions did not record all settings of the teacher.
    recorded = ezsd.pipeline.extraction.build.info(shapes_store)
    teacher = {key: value for key, value in recorded.environment["teacher"].items() if key != "descriptions"}
    earlier = dataclasses.replace(recorded, environment={**recorded.environment, "teacher": teacher})
    monkeypatch.setattr(ezsd.pipeline.extraction.build, "info", lambda _: earlier)
    assert build_cache(request).already_complete


def test_training_settings_do_not_make_another_store(shapes_dataset, shapes_store, with_settings):
    config = with_settings(train={"steps": 3}, loss={"distillation": 0.5}, build={"block_images": 3})
    assert build_cache(
        BuildRequest(dataset=shapes_dataset, config=config, out=shapes_store, workers=1)
    ).already_complete


@pytest.mark.parametrize(
    "name",
    [
        "regions/embedding/c/0/0",
        "ground_truth/box/c/0/0",
        "proposals/offset/c/0",
        "text/embedding/c/0/0",
        "teacher/values/c/0",
        "images/width/c/0",
        "manifest.json",
    ],
)
def test_a_lost_file_is_computed_again_from_the_images(name, shapes_store, shapes_root, tmp_path):
    damaged = shutil.copytree(shapes_store, tmp_path / "damaged")
    before = files(damaged)
    (damaged / name).unlink()
    assert [found.name for found in repair(damaged).left] == [name]
    assert (damaged / "INCOMPLETE.json").exists()
    report = repair_store(damaged, shapes_root, weights=None, device="cpu")
    assert report.repaired == (name,)
    assert "complete" in repair_lines(damaged, report)[-1]
    assert files(damaged) == before
    assert verify(damaged, deep=True) == []
    assert compare(damaged, shapes_store).content == ()


def test_boxes_and_classes_are_repaired_from_annotations_without_a_teacher(
    shapes_store, shapes_root, tmp_path, monkeypatch
):
    damaged = shutil.copytree(shapes_store, tmp_path / "damaged")
    for name in ("offset/c/0", "box/c/0/0", "class_index/c/0", "annotation_id/c/0"):
        (damaged / "ground_truth" / name).unlink()
    monkeypatch.setattr("ezsd.pipeline.extraction.repair.configured_teacher", None)
    report = repair_store(damaged, shapes_root, weights=None, device="cpu")
    assert (len(report.repaired), report.left, report.images) == (4, (), 0)
    assert files(damaged) == files(shapes_store)


def test_rows_are_not_computed_by_another_teacher(shapes_store, shapes_root, tmp_path, monkeypatch):
    def another(config, device):
        return configured_teacher(dataclasses.replace(config, template="not a photo of a {}"), device)

    damaged = shutil.copytree(shapes_store, tmp_path / "damaged")
    (damaged / "regions/box/c/0/0").unlink()
    monkeypatch.setattr("ezsd.pipeline.extraction.repair.configured_teacher", another)
    with pytest.raises(StoreMismatch, match="template: store has .* rows are computed by its own teacher alone"):
        repair_store(damaged, shapes_root, weights=None, device="cpu")


def test_a_store_is_not_repaired_from_other_images(shapes_store, tmp_path):
    from ezsd.pipeline.data.shapes import write_shapes

    write_shapes(tmp_path / "other", train=12, val=1, seed=6, workers=1)
    damaged = shutil.copytree(shapes_store, tmp_path / "damaged")
    (damaged / "regions/box/c/0/0").unlink()
    with pytest.raises(StoreMismatch, match="make another store than this one"):
        repair_store(damaged, tmp_path / "other", weights=None, device="cpu")
