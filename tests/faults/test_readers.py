"""A process that reads a store while another builds or repairs it: what was committed, or one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ezsd.cache import repair
from tests.cache import storekit

ROOT = Path(__file__).resolve().parents[2]
READER = """
import sys
from ezsd.cache import Store, StoreError
from tests.cache import storekit

path, expected = sys.argv[1:]
expected = {image: storekit.read_embedding(Store(expected), image) for image in storekit.IDS}
print("ready", flush=True)
right = refused = 0
# Whoever asks writes a line before each look, and closes at the end.
for _ in sys.stdin:
    try:
        store = Store(path)
        found = {image: storekit.read_embedding(store, image) for image in storekit.IDS}
    except StoreError as error:
        assert "\\n" not in str(error)
        refused += 1
        print("refused", flush=True)
    else:
        assert found == expected
        right += 1
        print("right", flush=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return storekit.build(tmp_path_factory.mktemp("finished") / "store")


@pytest.fixture
def look(finished, tmp_path):
    """Start a look of another process at `tmp_path/store`, and get what became of the last one."""
    command = [sys.executable, "-c", READER, str(tmp_path / "store"), str(finished)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as reader:
        assert reader.stdout.readline() == "ready\n"

        def ask(wait=True):
            reader.stdin.write("look\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip() if wait else None

        ask.rest = lambda: reader.communicate()[0].split()
        yield ask
    assert reader.returncode == 0


def test_a_reader_beside_a_build_sees_nothing_or_all(look, finished, tmp_path):
    def arrange(items):
        # Looks that nobody waits for fall into the writing of blocks and shards.
        for item in items:
            look(wait=False)
            yield item

    assert look() == "refused"
    storekit.build(tmp_path / "store", arrange=arrange)
    assert storekit.contents(tmp_path / "store") == storekit.contents(finished)
    look(wait=False)
    found = look.rest()
    assert found[-1] == "right"
    # Once it is there it stays.
    assert found == sorted(found, key=lambda one: one == "right")


def test_a_reader_beside_a_repair_sees_right_rows_or_one_line(look, finished, tmp_path):
    store = storekit.build(tmp_path / "store")
    assert look() == "right"
    for name in ("regions/embedding/c/0/0", "ground_truth/offset/c/0", "text/zarr.json"):
        storekit.flip(store / name, 9)
        for _ in range(3):
            look(wait=False)
        assert repair(store, storekit.Images()).repaired == (name,)
        look(wait=False)
    found = look.rest()
    assert len(found) == 12
    assert found[-1] == "right"
    assert storekit.contents(store) == storekit.contents(finished)
