"""What a build would need is said before anything is written, and holds afterwards."""

import shutil

import pytest

import ezsd.pipeline.extraction.forecast
from ezsd.cache import Store, info
from ezsd.pipeline.console.store_messages import forecast_lines
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.errors import ImageError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.encoder import CropEncoder
from ezsd.pipeline.extraction.forecast import forecast_build
from ezsd.pipeline.extraction.request import BuildRequest


@pytest.fixture
def forecast(shapes_dataset, tmp_path):
    def run(config, *, probe_seconds=0.1, **changes):
        request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "none", **changes)
        found = forecast_build(request, probe_seconds=probe_seconds)
        assert not (tmp_path / "none").exists()
        return found

    return run


def test_bytes_are_no_less_than_what_is_built(forecast, quick_config, shapes_store):
    found = forecast(quick_config)
    assert (found.images, len(Store(shapes_store).image_ids)) == (12, 12)
    assert found.at_most.peak >= found.at_most.final >= info(shapes_store).bytes_ - 20_000


def test_crops_are_those_that_are_then_encoded(forecast, shapes_dataset, quick_config, tmp_path):
    found = forecast(quick_config)
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=tmp_path / "store", workers=1))
    assert found.passes == report.crops


def test_crops_of_a_mode_that_follows_scores_are_at_most_so_many(forecast, shapes_dataset, with_settings, tmp_path):
    grid = {
        "grid": "paper",
        "sizes": (128.0, 256.0),
        "stride": 64.0,
        "search": "coarse-to-fine",
        "anchor_fraction": 0.3,
    }
    config = with_settings(proposals=grid)
    found = forecast(config)
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1))
    assert found.passes / 2 < report.crops <= found.passes


def test_time_follows_from_the_probe_and_the_number_of_processes(forecast, with_settings):
    config = with_settings(build={"block_images": 2})
    one, four = forecast(config, workers=1), forecast(config, workers=4)
    assert one.seconds == pytest.approx(one.passes * one.probe.seconds / one.probe.crops)
    assert four.seconds == pytest.approx(four.passes * four.probe.seconds / four.probe.crops / 4)
    assert one.probe.crops > 0
    assert any("by 4 processes" in line for line in forecast_lines("store", four))


def test_a_cluster_is_not_asked(forecast, quick_config):
    found = forecast(quick_config, scheduler="tcp://192.0.2.1:8786")
    assert found.processes is None
    assert any("for each worker, divided by their number" in line for line in forecast_lines("store", found))


def test_missing_images_are_said_or_stop_it_as_they_would_a_build(shapes_root, with_settings, tmp_path):
    shutil.copytree(shapes_root, tmp_path / "data")
    config, dataset = with_settings(build={"max_bad_images": 0.1}), find_dataset("shapes", tmp_path / "data")
    request = BuildRequest(dataset=dataset, config=config, out=tmp_path / "none")
    (tmp_path / "data/train/000001.png").unlink()
    found = forecast_build(request, probe_seconds=0.1)
    assert found.missing == 1
    assert "12 images in 3 blocks, 1 of them missing" in forecast_lines("store", found)[0]
    (tmp_path / "data/train/000007.png").unlink()
    with pytest.raises(ImageError, match=r"2 images cannot be read, .* allows 1: .*000001\.png: no such image"):
        forecast_build(request, probe_seconds=0.1)


def test_a_probe_ends_in_time_on_a_slow_machine(forecast, quick_config, monkeypatch):
    """Crops take a hundredth of a second each: there is no time for a batch of 64."""
    clock = [0.0]

    class Slow(CropEncoder):
        def encode(self, pixels, boxes):
            clock[0] += len(boxes) / 100
            return super().encode(pixels, boxes)

    monkeypatch.setattr(ezsd.pipeline.extraction.forecast, "CropEncoder", Slow)
    monkeypatch.setattr(ezsd.pipeline.extraction.forecast.time, "perf_counter", lambda: clock[0])
    found = forecast(quick_config, probe_seconds=0.5)
    assert found.probe.rate == pytest.approx(100)
    assert 0.3 < found.probe.seconds <= 0.5


def test_images_without_anchors_are_tried_whole(forecast, with_settings):
    found = forecast(with_settings(proposals={"sizes": (1.0,), "ratios": (2.0,)}))
    assert (found.passes, found.probe.crops > 0) == (20, True)
