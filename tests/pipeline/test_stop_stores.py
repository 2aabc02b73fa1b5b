"""Ctrl-C while a store is committed, sent, fetched or repaired: nothing half, and the same command goes on.

The command stops itself at the place that a test is about, and Ctrl-C is what it then finds.
"""

import shutil
import signal

import fsspec
import pytest

from ezsd.cache import Store, StoreIncomplete, verify
from ezsd.cache.tools.transfer import push
from tests.cache import storekit
from tests.pipeline.stopkit import end_all, require_stopped, run_again, stopped_at


@pytest.fixture(autouse=True)
def _as_from_a_terminal():
    # A shell has Ctrl-C ignored by what it starts in the background, as these tests may be.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    end_all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return storekit.build(tmp_path_factory.mktemp("finished") / "store")


@pytest.mark.parametrize(("failpoint", "written"), [("shard.half_written:3", 0), ("shard.after_rename:5", 4)])
def test_a_commit_keeps_the_shards_that_are_written_and_goes_on(finished, tmp_path, failpoint, written):
    path = tmp_path / "store"
    with storekit.open_writer(path) as writer:
        writer.write_environment({"host": "here"})
        storekit.write_per_store(writer)
        for block in writer.pending():
            storekit.write_one(path, block)
        shards = len(writer.commit_tasks())
    words = ["cache", "commit", path, "--scheduler", "sync"]
    ended = stopped_at(failpoint, *words)
    require_stopped(ended, "the shards that are written stay; run the same command to go on")
    assert verify(path) == []
    with pytest.raises(StoreIncomplete):
        Store(path)
    with storekit.open_writer(path) as writer:
        assert 0 < len(writer.commit_tasks()) <= shards - written
    assert "complete (" in run_again(*words)
    assert storekit.contents(path) == storekit.contents(finished)


@pytest.mark.parametrize(
    "failpoint",
    [
        "push_sign.before_rename",
        "push_sign.before_rename:2",
        "push.half_written:3",
        "push.after_file:5",
        "push_sign.before_rename:3",
    ],
)
def test_a_push_keeps_the_files_that_are_sent_and_goes_on(finished, tmp_path, failpoint):
    target = tmp_path / "copy"
    words = ["cache", "push", finished, target.as_uri()]
    ended = stopped_at(failpoint, *words)
    require_stopped(ended, "the files that are sent stay; run the same command to go on")
    # What says that this is a store, or becomes one, is whole or not there.
    for sign in ("COMMIT.json", "TRANSFER.json"):
        assert not (target / sign).exists() or (target / sign).read_bytes() == (finished / "COMMIT.json").read_bytes()
    said = run_again(*words)
    assert "complete (" in said or "complete already" in said
    assert storekit.contents(target) == storekit.contents(finished)
    assert verify(target, deep=True) == []


def test_a_push_killed_before_it_says_that_it_has_begun_goes_on(finished, tmp_path):
    """What it was about to say lies there still, and is not taken for somebody else's file."""
    target = tmp_path / "copy"
    (target / ".transfer").mkdir(parents=True)
    (target / ".transfer/TRANSFER.json-1-ab").write_text("{")
    assert push(finished, target.as_uri()) > 20
    assert verify(target, deep=True) == []


def test_a_push_stopped_before_its_last_step_is_tidied_up_by_the_next(finished):
    url = "memory://stopped-before-its-last-step"
    push(finished, url)
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/TRANSFER.json", (finished / "COMMIT.json").read_bytes())
    assert push(finished, url) == 0
    assert not files.exists(f"{root}/TRANSFER.json")


@pytest.mark.parametrize("failpoint", ["pull_start.before_rename", "pull.half_written:3", "pull.after_rename:5"])
def test_a_pull_keeps_the_files_that_have_come_and_goes_on(finished, tmp_path, failpoint):
    target = tmp_path / "copy"
    words = ["cache", "pull", finished.as_uri(), target]
    ended = stopped_at(failpoint, *words)
    require_stopped(ended, "the files that have come stay; run the same command to go on")
    assert not (target / "COMMIT.json").exists()
    assert not (target / ".lock").exists()
    here, whole = storekit.contents(target), storekit.contents(finished)
    # A file is whole where it belongs, or not there.
    strange = {name for name, digest in here.items() if whole.get(name) != digest}
    assert {name for name in strange if not name.startswith(".transfer/")} <= {"TRANSFER.json"}
    assert "complete (" in run_again(*words)
    assert storekit.contents(target) == whole
    assert verify(target, deep=True) == []


def test_a_repair_keeps_what_is_repaired_and_goes_on(finished, tmp_path):
    store = shutil.copytree(finished, tmp_path / "store")
    damaged = ["checksums/regions/box/c/0", "checksums/regions/score/c/0"]
    for name in damaged:
        storekit.flip(store / name, 9)
    words = ["cache", "repair", store, "--device", "cpu"]
    ended = stopped_at("shard.before_rename:2", *words)
    require_stopped(ended, "what is repaired stays; run the same command to go on")
    # Only what was damaged and committed is in the folder.
    assert sorted(storekit.contents(store)) == sorted(storekit.contents(finished))
    assert {damage.name for damage in verify(store, deep=True)} <= {damaged[1]}
    assert "complete, every file is what was committed" in run_again(*words)
    assert storekit.contents(store) == storekit.contents(finished)
