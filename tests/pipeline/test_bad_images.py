"""Images that cannot be read: a few are left out with their reasons, more stop the build, mended ones are taken in."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from ezsd.cache import Store, journaled_bad_images
from ezsd.pipeline.console.store_messages import commit_lines, share_lines
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.errors import ImageError
from ezsd.pipeline.extraction import worker
from ezsd.pipeline.extraction.build import build_cache, build_share
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.scheduling.pool import Schedule
from ezsd.pipeline.training.train import TrainRequest, train
from tests.pretend_gpu import pretend_gpu


@pytest.fixture
def dataset(shapes_root, tmp_path):
    """A copy of the drawn images that may be damaged."""
    shutil.copytree(shapes_root, tmp_path / "data")
    return find_dataset("shapes", tmp_path / "data")


@pytest.fixture
def files(dataset) -> list[Path]:
    return sorted((dataset.root / dataset.train_images).iterdir())


@pytest.fixture
def build(dataset, with_settings, tmp_path):
    def run(share: float, name: str = "store", *, steps: int = 2, **changes):
        config = with_settings(build={"max_bad_images": share, "block_images": 4}, adapt={"steps": steps})
        request = BuildRequest(dataset=dataset, config=config, out=tmp_path / name, **{"workers": 1, **changes})
        return build_cache(request)

    return run


def damage(file: Path) -> bytes:
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    return before


def stored_bytes(store: Path) -> dict[str, bytes]:
    """All files of a store but those that say when and how it was built."""
    files = [file for file in store.rglob("*") if file.is_file() and file.name not in ("build.log", "environment.json")]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def rows(store: Store, image: int) -> int:
    return len(store.regions[image].box) + len(store.proposals[image].box) + len(store.ground_truth[image].box)


def test_bad_images_are_left_out_with_their_reason(build, files, tmp_path, caplog):
    damage(files[2])
    files[7].unlink()
    report = build(0.2)
    store = Store(tmp_path / "store")
    assert report.bad_images == len(store.bad_images) == 2
    for file, said in ((files[2], "cannot be read"), (files[7], "no such image")):
        (reason,) = (reason for reason in store.bad_images.values() if file.name in reason)
        assert said in reason
        assert str(tmp_path) not in reason
    assert all(rows(store, image) == 0 for image in store.bad_images)
    assert sum(rows(store, image) > 0 for image in store.image_ids.tolist()) == 10


def test_re_normalisation_leaves_out_as_many_and_says_which(build, files, tmp_path):
    before = {file: damage(file) for file in (files[1], files[6])}
    with pytest.raises(ImageError, match=r"2 images cannot be read, build.max_bad_images allows 1"):
        build(0.1, "stopped")
    files[6].write_bytes(before[files[6]])
    build(0.1)
    store = Store(tmp_path / "store")
    assert store.teacher[1]["left_out_images"] == list(store.bad_images)


@pytest.mark.usefixtures("warm_workers")
def test_workers_leave_out_the_same_images(build, files, tmp_path):
    damage(files[0])
    files[9].unlink()
    build(0.2, "one")
    build(0.2, "two", workers=2)
    for name in ("zarr.json", "images/zarr.json", "COMMIT.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("bad", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_images_in_flight_on_a_gpu_change_no_byte(bad, build, files, tmp_path, monkeypatch):
    for file in files[2 : 2 + bad]:
        damage(file)
    for most in (1, 3):
        monkeypatch.setattr(worker, "_IN_FLIGHT", most)
        with pretend_gpu():
            report = build(0.2, str(most), device="cuda", scheduler="sync")
        assert report.bad_images == bad
    one, three = (stored_bytes(tmp_path / name) for name in ("1", "3"))
    assert [name for name in one if one[name] != three.get(name)] == []
    assert len(one) > 10


def test_one_image_too_many_stops_the_build_and_is_taken_in_once_mended(build, files, tmp_path):
    before = {file: damage(file) for file in (files[1], files[6])}
    with pytest.raises(
        ImageError, match=r"2 images cannot be read, build.max_bad_images allows 1: .*mend them or raise"
    ):
        build(0.1, steps=0)
    assert len(journaled_bad_images(tmp_path / "store")) == 1
    for file, content in before.items():
        file.write_bytes(content)
    assert build(0.1, steps=0).bad_images == 0
    assert all(rows(Store(tmp_path / "store"), image) for image in Store(tmp_path / "store").image_ids.tolist())


def test_too_many_that_are_left_out_already_stop_builds_shares_and_commits(dataset, files, with_settings, tmp_path):
    for file in (files[1], files[6]):
        damage(file)
    out = tmp_path / "store"

    def share(allowed: float):
        config = with_settings(build={"max_bad_images": allowed, "block_images": 4}, adapt={"steps": 0})
        request = BuildRequest(dataset=dataset, config=config, out=out, scheduler="sync")
        return request, partial(build_share, request, Share(1, 1))

    _, generous = share(0.2)
    strict_request, strict = share(0.1)
    report = generous()
    assert (report.missing, report.bad_images) == (0, 2)
    sync = Schedule(scheduler="sync")
    for run in (strict, partial(build_cache, strict_request), partial(commit_cache, out, sync)):
        with pytest.raises(ImageError, match=r"2 images cannot be read, build.max_bad_images allows 1"):
            run()
    said = "2 images cannot be read and were left out; `ezsd cache info"
    assert said in share_lines(out, generous())[1]
    assert said in commit_lines(out, commit_cache(out, sync))[1]


def test_without_room_for_any_the_first_bad_image_stops_the_build(build, files, tmp_path):
    damage(files[4])
    with pytest.raises(ImageError, match=f"{files[4].name}: cannot be read"):
        build(0.001)
    assert journaled_bad_images(tmp_path / "store") == {}


def test_an_image_of_another_size_is_bad(build, files, tmp_path):
    shutil.copy(files[3], files[3].with_suffix(".new"))
    from PIL import Image

    with Image.open(files[3]) as image:
        image.resize((64, 48)).save(files[3])
    build(0.1)
    (reason,) = Store(tmp_path / "store").bad_images.values()
    assert "64 x 48" in reason


def test_an_image_without_any_box_is_looked_at_too(dataset, files, with_settings, tmp_path):
    path = dataset.root / dataset.train_annotations
    table = json.loads(path.read_text())
    bare, *others = sorted(table["images"], key=lambda image: image["id"])
    table["annotations"] = [one for one in table["annotations"] if one["image_id"] != bare["id"]]
    path.write_text(json.dumps(table))
    boxes = [{"image_id": image["id"], "bbox": [8, 8, 64, 64], "score": 0.5} for image in others]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    damage(next(file for file in files if file.name == Path(bare["file_name"]).name))
    config = with_settings(
        build={"max_bad_images": 0.1}, proposals={"boxes": str(tmp_path / "boxes.json")}, adapt={"steps": 0}
    )
    build_cache(BuildRequest(dataset=dataset, config=config, out=tmp_path / "store", scheduler="sync"))
    assert list(Store(tmp_path / "store").bad_images) == [bare["id"]]


def test_a_reused_store_gives_no_rows_for_its_bad_images(build, files, tmp_path):
    before = damage(files[6])
    build(0.1, "first")
    (image,) = Store(tmp_path / "first").bad_images
    files[6].write_bytes(before)
    report = build(0.1, "second", reuse=tmp_path / "first")
    second = Store(tmp_path / "second")
    assert (report.bad_images, second.bad_images) == (0, {})
    assert rows(second, image) > 0
    assert 0 < report.crops < sum(rows(second, other) for other in second.image_ids.tolist())


def test_the_limit_is_a_share_of_the_images_of_the_store(build, files, tmp_path):
    damage(files[1])
    with pytest.raises(ImageError, match=f"{files[1].name}: cannot be read"):
        build(0.1, steps=0, limit=6)
    assert build(0.1, "more", steps=0, limit=11).bad_images == 1


def test_reasons_do_not_say_where_linked_folders_lead(build, dataset, files, tmp_path):
    folder = dataset.root / dataset.train_images
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    damage(files[3])
    build(0.1)
    (reason,) = Store(tmp_path / "store").bad_images.values()
    assert reason.startswith(f"{files[3].name}: cannot be read")


def test_lost_rows_are_repaired_without_an_image_that_was_left_out(build, dataset, files, tmp_path):
    before = damage(files[6])
    build(0.1)
    lost = tmp_path / "store/regions/box/c/0/0"
    rows = lost.read_bytes()
    for content in (before, b"still damaged"):
        files[6].write_bytes(content)
        lost.unlink()
        assert not repair_store(tmp_path / "store", dataset.root, weights=None, device="cpu").left
        assert lost.read_bytes() == rows


def test_training_leaves_bad_images_out(build, files, tmp_path, with_settings, caplog):
    damage(files[2])
    build(0.1)
    with caplog.at_level("INFO", logger="ezsd"):
        run = train(TrainRequest(cache=tmp_path / "store", run=tmp_path / "run", config=with_settings()))
    assert "1 of 12 images could not be read when the store was built and is left out" in caplog.text
    assert run.latest() is not None
