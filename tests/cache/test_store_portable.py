"""Reading on a system that is not POSIX: a process without the modules, constants and calls that Windows lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import storekit

from ezsd.cache import Store, StoreError, write_block
from ezsd.cache.format.commit_mark import read_mark
from ezsd.pipeline.console.store_messages import compare_lines

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = """
import ctypes, mmap, os, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "grp", "pwd", "termios", "_posixshmem"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
POSIX = (
    "O_CLOEXEC O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_SYNC sync fork register_at_fork sched_getaffinity preadv pread "
    "RWF_NOWAIT pidfd_open getuid geteuid posix_fadvise killpg getpgid setsid"
)
for name in POSIX.split():
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in vars(mmap) if name.startswith(("PROT_", "MAP_", "MADV_"))]:
    delattr(mmap, name)

class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **options):
        if name is None:
            raise TypeError("there is no library of the whole process")
        super().__init__(name, *args, **options)

ctypes.CDLL = CDLL
opened = os.open

def open_files_alone(path, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *args, **options)

os.open = open_files_alone
"""
"""Begins a process that is as poor as one on Windows: no descriptor of a folder can be had there either."""


def on_windows(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS + code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = """
import dataclasses, hashlib, json
from ezsd.cache import Store, info, verify

store = Store(sys.argv[1])
ids = store.image_ids.tolist()
batch = store.regions.batch(ids)
one = store.ground_truth[ids[0]]
names, text = store.text
about = info(sys.argv[1])
print(json.dumps({
    "batch": {field.name: hashlib.sha256(getattr(batch.rows, field.name).tobytes()).hexdigest()
              for field in dataclasses.fields(batch.rows)},
    "one": one.box.tolist(),
    "names": names,
    "digest": store.digest,
    "info": [about.complete, about.images, about.problems],
    "damage": list(map(str, verify(sys.argv[1], deep=True))),
}))
"""


@pytest.mark.parametrize("embedding", ["float16", "int8"])
def test_a_store_is_read_without_posix(embedding, tmp_path):
    path = storekit.build(tmp_path / "store", embedding=embedding)
    found, store = on_windows(READ, path), Store(path)
    rows = store.regions.batch(storekit.IDS).rows
    assert found["batch"] == {name: storekit.sha256(getattr(rows, name)) for name in storekit.FIELDS["regions"]}
    assert found["one"] == store.ground_truth[storekit.IDS[0]].box.tolist()
    assert (found["names"], found["digest"]) == (storekit.NAMES, store.digest)
    assert (found["info"], found["damage"]) == ([True, len(storekit.IDS), []], [])


def test_damage_is_found_without_posix(copy):
    storekit.flip(copy / "regions/embedding/c/0/0", 99)
    code = """
import json
from ezsd.cache import Store, StoreError, verify

try:
    Store(sys.argv[1]).regions.batch([70])
except StoreError as error:
    print(json.dumps([str(error), list(map(str, verify(sys.argv[1], deep=True)))]))
"""
    said, damage = on_windows(code, copy)
    assert "do not match their checksum" in said
    assert len(damage) == 1
    assert "regions/embedding/c/0/0: its bytes are not those" in damage[0]


def test_an_unfinished_store_is_described_without_posix(tmp_path):
    with storekit.open_writer(tmp_path / "store") as writer:
        storekit.write_one(tmp_path / "store", writer.blocks[0])
    code = """
import json
from ezsd.cache import info, verify

found = info(sys.argv[1])
print(json.dumps([found.complete, found.blocks_done, verify(sys.argv[1], deep=True)]))
"""
    assert on_windows(code, tmp_path / "store") == [False, 1, []]


def test_stores_are_compared_without_posix(finished, tmp_path):
    other = storekit.build(tmp_path / "other", manifest=storekit.manifest(regions={"keep": 20}))
    code = """
import json
from ezsd.pipeline.console.store_messages import compare_lines

print(json.dumps([compare_lines(sys.argv[1], second) for second in sys.argv[1:]]))
"""
    same, changed = on_windows(code, finished, other)
    assert same == [f"products with the same fingerprint: {', '.join(storekit.INPUTS)}", "same content, file for file"]
    assert changed == compare_lines(finished, other)
    assert "first has 150, second has 20" in changed[0]


def test_a_store_is_pushed_to_a_url_without_posix(finished):
    code = """
import json
from ezsd.cache import Store, compare, push, verify

url = "memory://pushed"
print(json.dumps([
    push(sys.argv[1], url),
    push(sys.argv[1], url),
    Store(url).digest,
    list(map(str, verify(url, deep=True))),
    compare(sys.argv[1], url).content,
]))
"""
    sent = len(read_mark(finished).files)
    assert on_windows(code, finished) == [sent, 0, Store(finished).digest, [], []]


WRITES = {
    "begin": "storekit.open_writer(here / 'new')",
    "go on": "storekit.open_writer(here / 'half')",
    "a block": "storekit.write_one(here / 'half', read_plan(here / 'half').blocks[1])",
    "repair": "repair(here / 'whole')",
    "remove leftovers": "collect(here / 'whole')",
    "push to a folder": "push(here / 'whole', (here / 'pushed').as_uri())",
    "pull": "pull((here / 'whole').as_uri(), here / 'pulled')",
    "export": "export(here / 'whole', here / 'exported', format='npz')",
}
WRITE = """
import json
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import storekit
from ezsd.cache import StoreError, collect, export, pull, push, read_plan, repair

here, said = Path(sys.argv[1]), {}
for name, code in json.loads(sys.argv[3]).items():
    try:
        eval(code)
    except StoreError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_writing_is_refused_without_posix_in_one_line_and_changes_nothing(finished, tmp_path):
    with storekit.open_writer(tmp_path / "half") as writer:
        block = writer.blocks[1]
    (tmp_path / "whole").symlink_to(finished)
    before = sorted(tmp_path.rglob("*"))
    said = on_windows(WRITE, tmp_path, Path(__file__).parent, json.dumps(WRITES))
    assert said.keys() == WRITES.keys()
    for line in said.values():
        assert "cannot be written to on this system, whose Python has no fcntl" in line
        assert line.endswith("stores can be read here, write them on Linux or macOS")
    assert sorted(tmp_path.rglob("*")) == before
    # Here it goes on.
    write_block(tmp_path / "half", block, storekit.block_rows(block))


def test_where_a_system_limits_nothing_the_files_are_opened_all_the_same(finished):
    code = """
import errno, json
from ezsd.cache import Store, StoreError

store, here = Store(sys.argv[1]), os.open

def none_left(path, *args, **options):
    if "/c/" in str(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
    return here(path, *args, **options)

os.open = none_left
try:
    store.regions[70]
except StoreError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    name, said = on_windows(code, finished)
    assert name == "StoreUnreadable"
    assert "Too many open files" in said


def test_the_store_of_a_posix_system_has_its_locks(tmp_path):
    with storekit.open_writer(tmp_path / "store"), pytest.raises(StoreError, match="another process is building"):
        storekit.open_writer(tmp_path / "store")
