"""Hostile files of every kind, in the fast form of `make fuzz`: an answer, or an error of ezsd, and nothing else."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ezsd.cache.storage.arrays import zarr_errors
from ezsd.pipeline.errors import ImageError
from tests.fuzz.guard import MEMORY, Finding, tried, watched
from tests.fuzz.mutate import Chance, packed, unpacked
from tests.fuzz.targets import BY_NAME

CASES = Path(__file__).parent / "cases"
PART = 3
"""One in so many of the mutations is tried; the others with `-m slow`."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target by its name, made once."""
    made = {}

    def find(name):
        if name not in made:
            # In memory a flush to the disk costs nothing.
            made[name] = BY_NAME[name](tmp_path_factory.mktemp(name))
        return made[name]

    return find


def require_answers(target, numbers):
    for number in numbers:
        try:
            target.run(target.example(number))
        except Finding as finding:
            raise AssertionError(f"example {number} of {target.name}: {finding}\n{finding.trace}") from None


@pytest.mark.parametrize("name", BY_NAME)
def test_mutations_of_sound_files_are_an_answer_or_one_line(target, name):
    one = target(name)
    require_answers(one, range(one.examples // PART))


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_more_mutations_are_an_answer_or_one_line(target, name):
    one = target(name)
    require_answers(one, range(one.examples // PART, one.examples))


@pytest.mark.parametrize("case", sorted(CASES.rglob("*.case")), ids=lambda case: f"{case.parent.name}-{case.stem}")
def test_what_once_was_neither_is_now(target, case):
    target(case.parent.name).run(case.read_bytes())


@pytest.mark.parametrize("name", ["annotations", "toml", "detections", "names", "labels", "runs", "store-metadata"])
def test_sound_files_are_not_refused(target, name):
    # A target whose sound files were refused would try nothing of what comes behind.
    for data in target(name).inputs()[:5]:
        assert target(name).run(data) == []


def test_an_example_is_the_same_every_time_and_another_for_each_number(target):
    one = target("annotations")
    assert one.example(3) == one.example(3)
    assert len({one.example(number) for number in range(50)}) > 40
    assert unpacked(packed("fit", "b", b"x\ny"), ["a", "b"]) == ("fit", "b", b"x\ny")
    assert unpacked(b"\xff\xff", ["a"])[1:] == ("a", b"")
    assert Chance("x").random() == Chance("x").random()


# What the guard sees


def outside(folder):
    (folder.parent / "made").write_text("x")


def made_outside(folder):
    (folder.parent / "made").mkdir()


def moved_outside(folder):
    (folder / "x").write_text("x")
    (folder / "x").rename(folder.parent / "x")


def through_a_link(folder):
    (folder / "up").symlink_to(folder.parent)
    (folder / "up/made").write_text("x")


def secret_read(folder):
    (folder / "../outside/secret").read_text()


def process(folder):
    subprocess.run(["true"], check=True)


def swallowed(folder):
    with contextlib.suppress(BaseException):
        os.system("true")


def too_large(folder):
    # What earlier inputs have left free is no new memory.
    np.empty(3 * MEMORY, np.uint8)


def too_large_and_told(folder):
    with zarr_errors("here", "mend it"):
        too_large(folder)


def untyped(folder):
    raise KeyError("x")


def overflow(folder):
    np.float32(1e38) * np.float32(1e38)


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (outside, "write outside"),
        (made_outside, "os.mkdir outside"),
        (moved_outside, "os.rename outside"),
        (through_a_link, "write outside"),
        (secret_read, "read outside"),
        (process, "subprocess.Popen"),
        (swallowed, "os.system"),
        (too_large, "MemoryError"),
        (too_large_and_told, "memory"),
        (untyped, "KeyError"),
        (overflow, "RuntimeWarning"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_no_file_may_do_is_a_finding(tmp_path, does, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("x")
    with pytest.raises(Finding) as caught, watched(folder, secret=tmp_path / "outside"):
        does(folder)
    assert kind in caught.value.kind
    assert not (tmp_path / "made").exists()
    assert caught.value.signature.startswith(caught.value.kind)
    # Outside of the watch all of it is allowed.
    if does not in (too_large, too_large_and_told):
        (tmp_path / "made").write_text("x")


def test_a_loop_without_an_end_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 0.2)

    def forever():
        while True:
            pass

    with pytest.raises(Finding, match="^time: "), watched(tmp_path):
        forever()


def test_errors_of_ezsd_and_of_places_are_answers(tmp_path):
    def refuse():
        raise ImageError("a.png: cannot be read")

    with watched(tmp_path) as refused:
        assert isinstance(tried(refuse), ImageError)
        (tmp_path / "x").write_text("x")
        assert isinstance(tried((tmp_path / "gone").read_text), FileNotFoundError)
        refuse()
    assert [one.partition(":")[0] for one in refused] == ["ImageError", "FileNotFoundError", "ImageError"]


def test_the_long_form_without_atheris_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    monkeypatch.setitem(sys.modules, "atheris", None)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("fuzz").main()
    assert ended.value.code == 2
    assert "pip install 'ezsd[fuzz]'" in capsys.readouterr().err
