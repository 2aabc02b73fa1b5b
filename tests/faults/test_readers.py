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
    """Start a look of another process at `tmp_path/store`, and get what became of it or go on beside it."""
    command = [sys.executable, "-c", READER, str(tmp_path / "store"), str(finished)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as reader:
        assert reader.stdout.readline() == "ready\n"

        asked, found = 0, []

        def ask(wait=True):
            nonlocal asked
            reader.stdin.write("look\n")
            reader.stdin.flush()
            asked += 1
            while wait and len(found) < asked:
                found.append(reader.stdout.readline().strip())
            return found[-1] if wait else None

        ask.all = lambda: found + reader.communicate()[0].split()
        yield ask
    assert reader.returncode == 0


def test_a_reader_beside_a_build_sees_nothing_or_all(look, finished, tmp_path):
    def arrange(items):
        # Every other look falls between two blocks or shards, the others into the writing of one.
        for number, item in enumerate(items):
            assert look(wait=number % 2 == 0) in ("refused", None)
            yield item

    assert look() == "refused"
    storekit.build(tmp_path / "store", arrange=arrange)
    assert storekit.contents(tmp_path / "store") == storekit.contents(finished)
    look(wait=False)
    found = look.all()
    assert found[-1] == "right"
    # Once it is there it stays.
    assert found == sorted(found, key=lambda one: one == "right")


def test_a_reader_beside_a_repair_sees_right_rows_or_one_line(look, finished, tmp_path):
    inside = []

    class Looking(storekit.Images):
        """In the middle of a repair, whenever it asks for something, the damaged store is looked at."""

        def per_store(self, product, known):
            inside.append(look())
            return super().per_store(product, known)

        def annotated(self, block):
            inside.append(look())
            return super().annotated(block)

        def rows(self, blocks, stored):
            inside.append(look())
            return super().rows(blocks, stored)

    store = storekit.build(tmp_path / "store")
    assert look() == "right"
    for name in ("regions/embedding/c/0/0", "ground_truth/offset/c/0", "text/zarr.json"):
        storekit.flip(store / name, 9)
        for _ in range(3):
            look(wait=False)
        assert repair(store, Looking()).repaired == (name,)
        look(wait=False)
    assert inside
    found = look.all()
    assert len(found) == 13 + len(inside)
    assert found[-1] == "right"
    assert storekit.contents(store) == storekit.contents(finished)
