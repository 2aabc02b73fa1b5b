"""Stage one as a whole: the same store from any number of workers, after a kill, and with novel boxes hidden."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from ezsd.cache import Store, StoreIncomplete, StoreMismatch
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import TeacherError, VocabularyError
from ezsd.pipeline.config.schema import to_tables
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.vocabulary import Split
from tests.commandkit import Begun, ezsd

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_COMPARED = {"environment.json", "build.log"}


def files(store):
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in sorted(store.rglob("*"))
        if p.is_file() and p.name not in NOT_COMPARED
    }


def overrides(config):
    """The `--set` options that make the shipped preset this configuration."""
    tables = to_tables(config)
    return [
        option
        for section in ("adapt", "proposals", "build")
        for key, value in tables[section].items()
        for option in ("--set", f"{section}.{key}={json.dumps(value)}")
    ]


def build_command(dataset, config, out, *, workers):
    command = [sys.executable, "-m", "ezsd", "cache", "build", "--dataset", dataset.name, "--out", str(out)]
    return [*command, "--workers", str(workers), "--data-root", str(dataset.root), *overrides(config)]


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_make_the_same_bytes_as_one(shapes_dataset, quick_config, shapes_store, tmp_path):
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=tmp_path / "two", workers=2))
    assert files(tmp_path / "two") == files(shapes_store)


def test_a_background_word_that_the_teacher_lacks_is_refused_before_re_normalisation(
    shapes_dataset, with_settings, tmp_path
):
    config, out = with_settings(teacher={"background": ("background", "zebra")}), tmp_path / "store"
    with pytest.raises(TeacherError, match="no weights for a word of 'zebra'"):
        build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=out))
    assert not out.exists()


def test_names_with_equal_prompts_are_refused_before_re_normalisation(
    shapes_dataset, quick_config, shapes_root, tmp_path, caplog
):
    root = shutil.copytree(shapes_root, tmp_path / "data")
    for part in ("train", "val"):
        path = root / f"annotations/instances_{part}.json"
        document = json.loads(path.read_text())
        document["categories"].append({"id": 1000, "name": "Circle"})
        path.write_text(json.dumps(document))
    split = Split(base=SHAPES_SPLIT.base, novel=(*SHAPES_SPLIT.novel, "Circle"))
    dataset = dataclasses.replace(shapes_dataset, root=root, split=split)
    with pytest.raises(VocabularyError, match="the teacher cannot tell 'circle' from 'Circle'"):
        build_cache(BuildRequest(dataset=dataset, config=quick_config, out=tmp_path / "store", workers=1))
    assert not [record for record in caplog.records if "re-normalised" in record.message]


@pytest.mark.parametrize(
    "point",
    ["whole.after_rename", "block.before_rename:2", pytest.param("commit.before_rename", marks=pytest.mark.slow)],
)
def test_a_killed_build_resumes_to_the_same_bytes(point, shapes_dataset, quick_config, shapes_store, tmp_path):
    out = tmp_path / "killed"
    words = build_command(shapes_dataset, quick_config, out, workers=1)[3:]
    killed = ezsd(*words, cwd=tmp_path, EZSD_FAILPOINT=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(StoreIncomplete):
        Store(out)
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, workers=1))
    assert files(out) == files(shapes_store)


def test_a_complete_store_is_left_alone(shapes_dataset, quick_config, shapes_store):
    before = {p: p.stat().st_mtime_ns for p in shapes_store.rglob("*")}
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=shapes_store, workers=1))
    assert report.already_complete
    assert {p: p.stat().st_mtime_ns for p in shapes_store.rglob("*")} == before


def test_another_setting_is_refused_by_its_name(shapes_dataset, with_settings, shapes_store):
    other = with_settings(proposals={"nms_iou": 0.5})
    with pytest.raises(StoreMismatch, match=r"proposals\.nms_iou.*0\.7.*0\.5"):
        build_cache(BuildRequest(dataset=shapes_dataset, config=other, out=shapes_store, workers=1))


def test_novel_boxes_cannot_reach_the_store(shapes_root, quick_config, shapes_store, tmp_path):
    """The same build from annotations without novel boxes: every byte is the same."""
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "train").symlink_to(shapes_root / "train")
    (blind / "val").symlink_to(shapes_root / "val")
    (blind / "annotations").mkdir()
    for name in ("instances_train.json", "instances_val.json"):
        document = json.loads((shapes_root / "annotations" / name).read_text())
        novel = {c["id"] for c in document["categories"] if c["name"] in SHAPES_SPLIT.novel}
        kept = [a for a in document["annotations"] if a["category_id"] not in novel]
        assert len(kept) < len(document["annotations"])
        (blind / "annotations" / name).write_text(json.dumps(document | {"annotations": kept}))
    request = BuildRequest(
        dataset=find_dataset("shapes", blind), config=quick_config, out=tmp_path / "store", workers=1
    )
    build_cache(request)
    assert files(tmp_path / "store") == files(shapes_store)


def test_no_byte_of_a_store_comes_from_the_validation_files(shapes_root, quick_config, shapes_store, tmp_path):
    half = tmp_path / "half"
    (half / "annotations").mkdir(parents=True)
    (half / "val").symlink_to(shapes_root / "val")
    (half / "train").symlink_to(shapes_root / "train")
    (half / "annotations/instances_train.json").symlink_to(shapes_root / "annotations/instances_train.json")
    # They are only looked over, so that an evaluation later can read them.
    document = json.loads((shapes_root / "annotations/instances_val.json").read_text())
    document |= {"images": document["images"][:1], "annotations": []}
    (half / "annotations/instances_val.json").write_text(json.dumps(document))
    request = BuildRequest(dataset=find_dataset("shapes", half), config=quick_config, out=tmp_path / "store", workers=1)
    build_cache(request)
    assert files(tmp_path / "store") == files(shapes_store)


def test_the_store_holds_what_the_method_says(shapes_store, quick_config):
    store = Store(shapes_store)
    names, text = store.text
    assert names == SHAPES_SPLIT.names
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    values, attributes = store.teacher
    assert len(values) == sum(int(np.prod(p["shape"])) for p in attributes["parameters"]) == 3200
    assert 0 <= attributes["base_accuracy_after"] <= 1
    assert "novel" not in json.dumps(attributes)
    for image_id in store.image_ids:
        truth, regions = store.ground_truth[int(image_id)], store.regions[int(image_id)]
        assert (truth.class_index < len(SHAPES_SPLIT.base)).all()
        assert (regions.class_index >= len(SHAPES_SPLIT.base)).all()
        assert len(regions.box) <= quick_config.proposals.max_regions
        assert (np.diff(regions.score) <= 0).all()
    data = zarr.open(shapes_store, mode="r")["regions/embedding"][:]
    assert len(data) == zarr.open(shapes_store, mode="r")["regions/offset"][-1]


def test_a_moved_store_is_the_same_store(shapes_dataset, quick_config, shapes_store, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(shapes_store, moved)
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=moved, workers=1))
    assert report.already_complete


def test_limit_takes_the_first_images(shapes_dataset, quick_config, tmp_path):
    config = dataclasses.replace(quick_config, adapt=dataclasses.replace(quick_config.adapt, steps=0))
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "few", limit=3, workers=1))
    assert list(Store(tmp_path / "few").image_ids) == [1, 2, 3]


def test_a_kill_at_any_moment_is_survived(shapes_dataset, quick_config, shapes_store, tmp_path):
    out = tmp_path / "random"
    process = Begun(*build_command(shapes_dataset, quick_config, out, workers=2)[3:], cwd=tmp_path)
    journal = out / "journal"
    deadline = time.monotonic() + 120
    while not list(journal.glob("block-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # Its workers are of its group.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, workers=1))
    assert files(out) == files(shapes_store)


def test_a_process_that_outlives_a_build_keeps_nothing_of_it(shapes_dataset, quick_config, tmp_path):
    """The same folders, settings and teacher, other annotations: as on a cluster whose workers stay."""
    config = dataclasses.replace(quick_config, adapt=dataclasses.replace(quick_config.adapt, steps=0))
    root, out = tmp_path / "shapes", tmp_path / "store"
    shutil.copytree(shapes_dataset.root, root)
    file = root / "annotations/instances_train.json"
    document = json.loads(file.read_text())
    base = {one["id"] for one in document["categories"] if one["name"] in SHAPES_SPLIT.base}
    boxes = []
    for _ in range(2):
        build_cache(BuildRequest(dataset=find_dataset("shapes", root), config=config, out=out, limit=3, workers=1))
        boxes.append([len(Store(out).ground_truth[image].box) for image in (1, 2, 3)])
        shutil.rmtree(out)
        first = next(a for a in document["annotations"] if a["category_id"] in base and a["image_id"] == 1)
        document["annotations"].remove(first)
        file.write_text(json.dumps(document))
    assert boxes[1] == [boxes[0][0] - 1, *boxes[0][1:]]
