"""A full and a read-only disk: one line, nothing damaged, and the build goes on once there is room."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import storekit

ROOT = Path(__file__).resolve().parents[2]

# A mount is seen by the processes of its own namespace alone, and goes with them.
SCRIPT = """
import subprocess, sys
import storekit
from ezsd.cache import StoreError, verify

folder, size, expected, other = sys.argv[1:5]
mount = ["mount", "-t", "tmpfs", "-o"]
if subprocess.run([*mount, f"size={size}", "tmpfs", folder]).returncode:
    sys.exit(77)
store = f"{folder}/store"
try:
    storekit.build(store)
except StoreError as error:
    assert expected in str(error), error
    assert "same command again" in str(error), error
    assert "\\\\n" not in str(error)
else:
    sys.exit("the disk was not full")
assert verify(store, deep=True) == []
subprocess.run(["mount", "-o", "remount,size=64M", folder], check=True)
storekit.build(store)
print(storekit.contents(store))
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
assert storekit.open_writer(store).complete
try:
    storekit.open_writer(f"{folder}/another")
except StoreError as error:
    assert "another: cannot be written to (Read-only file system); choose another folder: `path=NEW`" in str(error)
    storekit.build(other)
else:
    sys.exit("the disk was not read-only")
"""


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("160k", "the disk is full (No space left on device): "),
        ("300k", " bytes are still to be written here, but only "),
    ],
)
def test_a_full_disk_is_one_line_with_the_bytes_needed_and_the_build_goes_on(finished, tmp_path, size, expected):
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root and unshare")
    folder = tmp_path / "small"
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = ["unshare", "-m", sys.executable, "-c", SCRIPT, str(folder), size, expected, str(tmp_path / "other")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(storekit.contents(finished))
