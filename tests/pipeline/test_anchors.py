"""The cheaper modes, from the setting to the store."""

import dataclasses

import numpy as np
import pytest
import torch

from ezsd.cache import Store, StoreMismatch, info
from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.extraction.anchors import image_anchors, look_at_anchors
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.provenance import proposal_settings
from ezsd.pipeline.extraction.request import BuildRequest

MODES = ("grown-stride", "coarse-to-fine")


def files(store):
    left_out = {"environment.json", "build.log"}
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file() and p.name not in left_out}


def settings(mode, **changes):
    return dataclasses.replace(load_preset("coco").proposals, search=mode, **changes)


def area_score(embedding):
    return embedding.prod(1)


def looked(mode, width=640, height=480, **changes):
    """What is looked at, where an embedding is a box's width and height."""
    return look_at_anchors(settings(mode, **changes), width, height, lambda b: b[:, 2:] - b[:, :2], area_score)


@pytest.mark.parametrize(("width", "height", "count"), [(640, 480, 12_750), (1333, 800, 15_750)])
def test_the_faithful_mode_looks_at_the_whole_grid(width, height, count):
    boxes, embedding = looked("exhaustive", width, height)
    assert len(boxes) == count
    assert torch.equal(boxes, image_anchors(settings("exhaustive"), width, height))
    assert torch.equal(embedding, boxes[:, 2:] - boxes[:, :2])


@pytest.mark.parametrize("mode", MODES)
def test_a_cheaper_mode_looks_at_less_of_the_same_grid_in_its_order(mode):
    boxes, embedding = looked(mode, growth=0.5, anchor_fraction=0.1)
    assert len(boxes) == {"grown-stride": 6012, "coarse-to-fine": 1275}[mode]
    grid = image_anchors(settings(mode), 640, 480).tolist()
    rest = iter(grid)
    assert all(box in rest for box in boxes.tolist()), "one after the other"
    assert torch.equal(embedding, boxes[:, 2:] - boxes[:, :2])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 900), (2000, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_images_of_hardly_any_pixels_have_no_thin_anchors(mode, width, height):
    boxes, _ = looked(mode, width, height)
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()


@pytest.fixture(scope="session")
def grid_config(quick_config):
    """A faithful grid of 507 anchors on images of 128 pixels."""
    proposals = dataclasses.replace(
        quick_config.proposals, grid="paper", sizes=(128.0, 192.0, 288.0), ratios=(1.0,), stride=64.0, growth=0.7
    )
    return dataclasses.replace(quick_config, proposals=proposals)


def with_mode(config, search, **changes):
    return dataclasses.replace(config, proposals=dataclasses.replace(config.proposals, search=search, **changes))


@pytest.fixture(scope="session")
def built(shapes_dataset, grid_config, tmp_path_factory):
    """One store per mode."""
    folder, stores = tmp_path_factory.mktemp("modes"), {}
    for mode in ("exhaustive", *MODES):
        config = with_mode(grid_config, mode, anchor_fraction=0.4)
        stores[mode] = folder / mode
        build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=stores[mode], workers=1))
    return stores


def crops_per_image(store):
    encoded = info(store).environment["encoded"]
    return encoded["crops"] / encoded["images"]


def test_the_passes_are_recorded_and_are_fewer(built):
    truth = len(Store(built["exhaustive"]).ground_truth[1].box)
    crops = {mode: crops_per_image(store) for mode, store in built.items()}
    assert crops["coarse-to-fine"] < crops["grown-stride"] < crops["exhaustive"]
    assert crops["coarse-to-fine"] <= 0.4 * 507 + 7
    assert crops["exhaustive"] <= 507 + 7
    assert truth <= 7


@pytest.mark.parametrize("mode", MODES)
def test_a_region_that_two_modes_keep_has_one_embedding(mode, built):
    """It comes from the scoring pass, and does not depend on what was looked at besides."""
    cheap, whole, shared = Store(built[mode]), Store(built["exhaustive"]), 0
    for image_id in cheap.image_ids.tolist():
        one, other = cheap.regions[image_id], whole.regions[image_id]
        known = {box.tobytes(): row for row, box in enumerate(other.box)}
        for row, box in enumerate(one.box):
            if box.tobytes() in known:
                shared += 1
                np.testing.assert_array_equal(one.embedding[row], other.embedding[known[box.tobytes()]])
                assert one.score[row] == other.score[known[box.tobytes()]]
    assert shared > 10


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("mode", [pytest.param(MODES[0], marks=pytest.mark.slow), *MODES[1:]])
def test_a_cheaper_store_is_the_same_from_two_workers(mode, built, shapes_dataset, grid_config, tmp_path):
    config = with_mode(grid_config, mode, anchor_fraction=0.4)
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "two", workers=2))
    assert files(tmp_path / "two") == files(built[mode])


@pytest.mark.parametrize(
    ("mode", "asked", "named"),
    [
        ("exhaustive", {"search": "coarse-to-fine"}, r"proposals\.search: store has .exhaustive., wanted .coarse"),
        ("grown-stride", {"search": "coarse-to-fine"}, r"proposals\.search.*grown-stride.*coarse-to-fine"),
        ("coarse-to-fine", {"search": "coarse-to-fine", "anchor_fraction": 0.3}, r"\.anchor_fraction.*0\.4.*0\.3"),
        ("grown-stride", {"search": "grown-stride", "growth": 0.9}, r"proposals\.growth.*0\.7.*0\.9"),
    ],
)
def test_a_store_of_another_mode_is_refused_by_name(mode, asked, named, built, shapes_dataset, grid_config):
    config = with_mode(grid_config, **{"anchor_fraction": 0.4, **asked})
    with pytest.raises(StoreMismatch, match=named):
        build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=built[mode], workers=1))


def test_a_store_says_which_mode_it_has(built, grid_config):
    for mode, store in built.items():
        recorded = proposal_settings(Store(store).manifest)
        wanted = to_tables(with_mode(grid_config, mode, anchor_fraction=0.4))["proposals"]
        assert recorded["search"] == mode
        assert recorded.items() <= wanted.items()
    # Stores made before there were modes are stores of the faithful one.
    assert "mode" not in Store(built["exhaustive"]).manifest.products["proposals"].inputs
