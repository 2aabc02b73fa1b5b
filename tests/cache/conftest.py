import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Worker processes import the helpers by name, so they must be a module that can be found.
sys.path.insert(0, str(Path(__file__).parent))

import storekit


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One complete store, shared: tests must not change it."""
    return storekit.build(tmp_path_factory.mktemp("finished") / "store")


@pytest.fixture
def copy(finished, tmp_path):
    """A complete store that a test may damage."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def memory():
    """A folder in memory where there is one: there a flush to the disk costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)
