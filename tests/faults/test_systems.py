"""Commands on odd file systems, small disks, tight limits and without rights: one line with place and cure, then on."""

import shutil

import pytest

from tests.cache.storekit import contents
from tests.commandkit import ezsd
from tests.conftest import QUICK
from tests.faults.faultkit import require_refusable_locks, small_disk

OF_RUN = [one for one in QUICK if one.startswith(("model.", "train."))]
TINY = [one for one in QUICK if one not in OF_RUN]
TINY += ["adapt.steps=1", "adapt.batch_size=16", "build.block_images=1"]
OF_RUN += [f"train.{one}" for one in ("batch_size=1", "reference_batch_size=1", "steps=2", "warmup_steps=1")]
OF_RUN += ["train.checkpoint_every=1"]


def settings(values):
    return [word for value in values for word in ("--set", value)]


@pytest.fixture(scope="module")
def build(shapes_root):
    """A build of two images into a folder, under faults."""
    words = ("cache", "build", "--dataset", "shapes", "--data-root", shapes_root, "--limit", 2, "--device", "cpu")
    return lambda out, **how: ezsd(*words, "--scheduler", "sync", "--out", out, *settings(TINY), **how)


@pytest.fixture(scope="module")
def store(build, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "store"
    assert build(out).returncode == 0
    return out


@pytest.fixture(scope="module")
def train(store):
    """A training of two steps into a folder, under faults."""
    words = ("train", "--cache", store, "--device", "cpu", *settings(OF_RUN))
    return lambda run, **how: ezsd(*words, "--run", run, **how)


def line(done):
    """The one line with which a command ends that cannot go on."""
    said = [one for one in done.stderr.splitlines() if one.startswith("ezsd: ")]
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    assert done.stderr.endswith(f"{said[0]}\n"), done.stderr
    assert "Traceback" not in done.stderr
    return said[0]


def test_a_disk_without_locks_is_named_with_what_to_do(store, build, train, tmp_path):
    require_refusable_locks()
    copy = shutil.copytree(store, tmp_path / "copy")
    commands = [
        ("ENOLCK", tmp_path / "new/.lock", lambda **how: build(tmp_path / "new", **how)),
        ("EOPNOTSUPP", copy / ".lock", lambda **how: ezsd("cache", "gc", copy, **how)),
        ("EINVAL", tmp_path / "run/train.lock", lambda **how: train(tmp_path / "run", **how)),
    ]
    for errno, place, command in commands:
        said = line(command(faults=[["no_locks", errno]]))
        assert said.startswith(f"ezsd: {place}: cannot be locked (")
        assert "have them switched on" in said
        # With locks the same command goes on.
        assert command().returncode == 0
    # What only reads needs none.
    assert ezsd("cache", "verify", "--deep", copy, faults=[["no_locks"]]).returncode == 0
    assert contents(copy) == contents(store)


def test_a_disk_that_flushes_no_folders_is_named_with_what_to_do(store, build, train, tmp_path):
    for command in (build, train):
        out = tmp_path / "disk/out"
        out.parent.mkdir()
        said = line(command(out, faults=[["no_folder_flush"]]))
        assert f"{out.parent}" in said
        assert "cannot be flushed to the disk (Invalid argument)" in said
        assert "choose a folder on another file system" in said
        assert not {"COMMIT.json", "run.json"} & {file.name for file in out.parent.rglob("*")}
        shutil.rmtree(out.parent)
    assert ezsd("cache", "verify", store, faults=[["no_folder_flush"]]).returncode == 0


def test_files_that_may_not_grow_are_named_and_the_same_command_goes_on(store, build, train, tmp_path):
    for command, size, name in ((build, 2000, "store"), (build, 20_000, "store"), (train, 100_000, "run")):
        said = line(command(tmp_path / name, faults=[["limit", "RLIMIT_FSIZE", size]]))
        assert said.startswith(f"ezsd: {tmp_path / name}/")
        assert said.endswith(
            ": File too large; have the limit of a file's size raised (`ulimit -f unlimited`) and run the same command "
            "again"
        )
    assert build(tmp_path / "store").returncode == 0
    assert contents(tmp_path / "store") == contents(store)
    assert train(tmp_path / "run").returncode == 0


def test_a_process_with_few_open_files_works_or_says_so(store, build, tmp_path):
    said = line(build(tmp_path / "few", faults=[["limit", "RLIMIT_NOFILE", 24]]))
    assert "Too many open files; raise the limit of open files (`ulimit -n`) and run the same command again" in said
    assert ezsd("cache", "verify", "--deep", store, faults=[["limit", "RLIMIT_NOFILE", 24]]).returncode == 0


def test_folders_that_may_not_be_written_are_named_with_what_to_do(store, build, train, tmp_path):
    closed = tmp_path / "closed"
    copy = shutil.copytree(store, closed / "copy")
    damaged = shutil.copytree(store, closed / "damaged")
    (damaged / "regions/score/zarr.json").write_bytes(b"{")
    folders = [place for place in [closed, *closed.rglob("*")] if place.is_dir()]
    before = contents(closed)
    for folder in folders:
        folder.chmod(0o500)
    without = [["without_rights"]]
    commands = [
        (lambda **how: build(closed / "new", **how), "choose another folder: `path=NEW`"),
        (
            lambda **how: train(closed / "run", **how),
            "have its mode changed (`chmod -R u+rwX`), or choose another place",
        ),
        (
            lambda **how: ezsd("cache", "gc", copy, **how),
            "have its mode changed (`chmod -R u+rwX`), or choose another place",
        ),
        (
            lambda **how: ezsd("cache", "repair", damaged, **how),
            "have its mode changed (`chmod -R u+rwX`), or choose another",
        ),
        (lambda **how: ezsd("cache", "export", copy, "--format", "npz", "--out", closed / "out", **how), "choose an"),
    ]
    try:
        for command, cure in commands:
            said = line(command(faults=without))
            assert f"{closed}/" in said
            assert "Permission denied" in said
            assert cure in said.replace("--out NEW", "`path=NEW`")
        assert ezsd("cache", "verify", "--deep", copy, faults=without).returncode == 0
        assert contents(closed) == before
    finally:
        for folder in folders:
            folder.chmod(0o700)


@pytest.mark.parametrize(
    ("size", "expected", "cure"),
    [
        ("60k", ": the disk is full (No space left on device): ", "; nothing is damaged, make room and "),
        ("200k", " bytes are still to be written here, but only ", " more and "),
    ],
)
def test_a_disk_that_fills_up_ends_a_build_in_one_line_and_room_lets_it_go_on(
    store, build, tmp_path, size, expected, cure
):
    with small_disk(tmp_path / "small", size) as disk:
        out = disk.folder / "store"
        said = line(build(out, faults=disk.faults))
        assert str(out) in said
        assert expected in said
        assert said.endswith(f"{cure}run the same command again")
        assert not (disk.seen / "store/COMMIT.json").exists()
        disk.remount("size=64M")
        assert build(out, faults=disk.faults).returncode == 0
        assert contents(disk.seen / "store") == contents(store)
        disk.remount("ro")
        for command in ("gc", "repair"):
            said = line(ezsd("cache", command, out, faults=disk.faults))
            assert "Read-only file system" in said
            assert said.endswith("choose a place on a disk that may be written to")
        assert ezsd("cache", "verify", "--deep", out, faults=disk.faults).returncode == 0


def test_a_disk_that_fills_up_ends_a_training_in_one_line_and_room_lets_it_go_on(train, tmp_path):
    with small_disk(tmp_path / "small", "2M") as disk:
        out = disk.folder / "run"
        said = line(train(out, faults=disk.faults))
        assert str(out) in said
        assert said.endswith("No space left on device; make room on that disk and run the same command again")
        disk.remount("size=256M")
        assert train(out, faults=disk.faults).returncode == 0
        assert (disk.seen / "run/checkpoints/step-00000002").is_dir()
