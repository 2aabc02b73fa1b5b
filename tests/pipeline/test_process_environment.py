"""What a command does to its own process before it works."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from ezsd.pipeline.process_environment import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(80_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(**variables):
    """Page faults of a block of 80 MB that was allocated and freed before."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", _FAULTS]
    return int(subprocess.run(command, env={**environment, **variables}, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_freed_memory_is_kept_unless_a_user_has_set_malloc():
    assert faults() < 100
    assert faults(MALLOC_ARENA_MAX="2") > 10_000
    assert faults(GLIBC_TUNABLES="glibc.malloc.arena_max=2") > 10_000
