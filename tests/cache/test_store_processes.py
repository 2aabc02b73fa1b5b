"""A store used before a fork, after it, and through pickle reads the same everywhere."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import storekit

from ezsd.cache import Store

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: newer Pythons warn about any fork beside zarr's threads, and here warnings are errors.
FORK = """
import os, sys
from ezsd.cache import Store
store = Store(sys.argv[1])
regions = store.regions
before = {image: regions[image].embedding.tobytes() for image in regions}
parent = store._here
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        after = {image: regions[image].embedding.tobytes() for image in regions}
        os._exit(0 if after == before and store._here is not parent else 3)
    children.append(child)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
assert regions[3].embedding.tobytes() == before[3]
assert store._here is parent
"""


def test_forked_children_read_what_the_parent_reads(finished):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FORK, str(finished)], env=environment, check=True, timeout=60)


def test_spawned_workers_read_through_a_pickled_store(finished):
    store = Store(finished)
    expected = [store.regions[image].embedding.tobytes() for image in storekit.IDS]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(storekit.read_embedding, [(store, image) for image in storekit.IDS]) == expected


def test_a_pickled_mapping_is_small_and_reads_on(finished):
    regions = Store(finished).regions
    assert len(regions[3].box)
    data = pickle.dumps(regions)
    assert len(data) < 1000
    assert pickle.loads(data)[3].box.tolist() == regions[3].box.tolist()


def test_opening_reads_no_arrays(finished):
    code = "import sys, cache; cache.Store(sys.argv[1]).regions; assert not {'zarr', 'torch'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(finished)], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("relative", [True, False])
def test_a_store_survives_a_change_of_the_working_folder(finished, monkeypatch, tmp_path, relative):
    monkeypatch.chdir(finished.parent)
    store = Store(finished.name if relative else finished)
    monkeypatch.chdir(tmp_path)
    assert len(store.regions[3].box)
