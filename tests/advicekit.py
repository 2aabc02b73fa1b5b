"""Advice that is followed: a row is a situation, words of its message, the cure done as the message says, what works.

Messages are read as the command line says them.

The tables are in the files of tests that say so; `advice.toml` lists all advice.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import EzsdError
from ezsd.pipeline.config.schema import apply_override, from_tables, load_preset, to_tables
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.console.store_messages import build_lines
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.extraction.build import build_cache, build_share
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.training.train import TrainRequest, train

REFUSALS = (EzsdError, ValueError)
"""With what a user's mistake is told; some of these checks are the method's, which has no errors of its own."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One row; its functions are given the scene that it plays in."""

    situation: str
    prepare: Callable[[Any], object] = lambda scene: None
    meet: Callable[[Any], object]
    """Returns the message or raises it."""
    message: str
    """A regular expression; its groups are what the cure is given."""
    cure: Callable[[Any, re.Match[str]], object] = lambda scene, found: None
    """Does what the matched message says."""
    works: Callable[[Any], object] | None = None
    """What was wanted, and goes through then; `meet` by default."""


def each_of(table: list[Advice]) -> pytest.MarkDecorator:
    """One test for each row."""
    return pytest.mark.parametrize("row", table, ids=lambda row: row.situation)


def follow(row: Advice, scene: object, refusals: tuple[type[Exception], ...] = REFUSALS) -> None:
    """Meet a message, do what it says, and get on."""
    row.prepare(scene)
    try:
        said = str(row.meet(scene))
    except refusals as error:
        said = str(error)
    found = re.search(row.message, as_options(said))
    assert found, said
    row.cure(scene, found)
    again = (row.works or row.meet)(scene)
    assert not re.search(row.message, as_options(str(again)))


Calls = dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]]
"""Advice of one call, by what is said: what it is said to, and what it says to do, each in an empty folder."""


def follow_call(calls: Calls, said: str, folder: Path) -> None:
    """Make a call that is refused, and then the one that is advised."""
    asked, advised = calls[said]
    with pytest.raises(REFUSALS) as error:
        asked(folder)
    assert re.search(said, as_options(str(error.value))), error.value
    advised(folder)


FAST = (
    "adapt.steps=1",
    "adapt.batch_size=16",
    "proposals.search=exhaustive",
    "proposals.sizes=[60]",
    "proposals.stride=1.0",
    "build.block_images=6",
    "train.pseudo_confidence=0",
)
"""Settings of a build of seconds."""


class Place:
    """A dataset of one's own, and what is built from it."""

    def __init__(self, shapes_root: Path, root: Path) -> None:
        self.root = root
        self.config = load_preset("shapes", [*FAST, "train.steps=1", "train.batch_size=2", "train.warmup_steps=0"])
        self.options: dict[str, object] = {}
        for part in ("train", "val"):
            shutil.copytree(shapes_root / part, root / part)
            shutil.copyfile(shapes_root / f"annotations/instances_{part}.json", root / f"{part}.json")
        self.toml = root / "own.toml"
        self.toml.write_text(
            'name = "own"\n'
            + "".join(f'[{p}]\nimages = "{p}"\nannotations = "{p}.json"\n' for p in ("train", "val"))
            + f"[classes]\nbase = {json.dumps(SHAPES_SPLIT.base)}\nnovel = {json.dumps(SHAPES_SPLIT.novel)}\n"
        )

    def edit(self, change: Callable[[dict], None]) -> None:
        """Change both annotation files."""
        for part in ("train", "val"):
            path = self.root / f"{part}.json"
            document = json.loads(path.read_text())
            change(document)
            path.write_text(json.dumps(document))

    def replace(self, old: str, new: str) -> None:
        """Change the TOML file."""
        assert old in self.toml.read_text()
        self.toml.write_text(self.toml.read_text().replace(old, new))

    def set(self, override: str) -> None:
        """As `--set` would."""
        tables = to_tables(self.config)
        apply_override(tables, override)
        self.config = from_tables(tables, where="advice")

    @property
    def dataset(self) -> Dataset:
        return find_dataset(str(self.toml))

    def request(self) -> BuildRequest:
        options = {"out": self.root / "store", **self.options}
        return BuildRequest(dataset=self.dataset, config=self.config, scheduler="sync", **options)

    def build(self) -> str:
        report = build_cache(self.request())
        return "\n".join(build_lines(report.path, report))

    def build_half(self) -> None:
        build_share(self.request(), Share(1, 2))

    def check(self) -> str:
        found = check_dataset(find_dataset(str(self.toml), strict=False))
        if found.problems:
            raise ValueError("\n".join(found.problems))
        return "\n".join(found.warnings)

    def train(self) -> None:
        train(TrainRequest(cache=self.request().out, run=self.root / "run", config=self.config))
