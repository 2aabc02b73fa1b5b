"""A store of holes is a store: committed by the store's own code, and read with all checks."""

from pathlib import Path

import numpy as np
import pytest

from ezsd.cache import Store, verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store_geometry(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return __import__("store_geometry")


def test_a_store_of_holes_is_committed_and_read_like_any_other(store_geometry, monkeypatch, tmp_path):
    monkeypatch.setitem(store_geometry.GEOMETRIES, "small", store_geometry.Geometry(600, 3, spread=2))
    row = store_geometry.measured(tmp_path, "small")
    assert (row["build"]["blocks"], row["open"]["maps"] > 0) == (3, True)
    assert store_geometry.shown(row).startswith("| small | 600 | 3 |")
    assert verify(tmp_path / "small") == []
    store = Store(tmp_path / "small")
    counts = store.regions.batch(store.image_ids.tolist()).counts
    assert len(counts) == 600
    assert 180 < counts.mean() < 220
    image = int(store.image_ids[-1])
    assert store.regions[image].embedding.shape == (counts[-1], store_geometry.DIM)
    assert not store.ground_truth[image].box.any()
    assert np.ptp(counts) > 100
