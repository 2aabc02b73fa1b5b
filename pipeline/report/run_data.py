"""Contents of a run's folder, read once for all sections of its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezsd.cache import Store, StoreMismatch, read_environment
from ezsd.pipeline.data.datasets import DRAWN
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.files import read_object
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.store_digests import read_stores


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Contents of one run's folder."""

    run: Run
    label: str
    """Name of the folder; its path where two runs share a name."""
    spec: dict[str, Any]
    """run.json."""
    environment: dict[str, Any]
    """environment.json."""
    evaluation: dict[str, Any] | None
    """eval.json; None until `ezsd eval`."""
    crops: dict[str, Any] | None
    """crops.json; None until `ezsd eval --crops`."""
    metrics: list[dict[str, float]]
    """Lines of metrics.jsonl."""
    validation: list[dict[str, float]]
    """Lines of validation.jsonl: AP50 by group while the run was trained; none where it did not validate."""
    seconds: dict[str, float]
    """Wall-clock time by stage."""

    @property
    def novel(self) -> frozenset[str]:
        """Names without training boxes."""
        return frozenset(self.spec["names"][self.spec["base_count"] :])

    def command(self, verb: str, *options: str) -> str:
        """A command about this run."""
        return shell_command("ezsd", verb, "--run", shown_path(self.run.folder), *options)


def collect(runs: Sequence[Run]) -> list[RunData]:
    """Read the folders of runs, the main one first; the others' evaluations are read at its limit.

    Raises:
        RunError: a run is of another dataset, or was evaluated by another version or on other annotations.
    """
    names = [run.folder.absolute().name for run in runs]
    collected: list[RunData] = []
    for run, name in zip(runs, names, strict=True):
        folder, spec = run.folder, run.spec
        if spec["dataset"] != runs[0].spec["dataset"]:
            both = f"{spec['dataset']}, not on {runs[0].spec['dataset']}"
            raise RunError(f"`compare={folder}`: trained on {both}; compare runs of one dataset")
        collected.append(
            RunData(
                run=run,
                label=name if names.count(name) == 1 else shown_path(folder),
                spec=spec,
                environment=run.environment,
                evaluation=_read_evaluation(folder, collected[0] if collected else None),
                crops=read_table(folder / "crops.json"),
                metrics=run.read_metrics(),
                validation=run.read_validation(),
                seconds=read_table(folder / "seconds.json") or {},
            )
        )
    return collected


def _read_evaluation(folder: Path, main: RunData | None) -> dict[str, Any] | None:
    """Contents of eval.json, at the main run's limit; None without one."""
    table = read_table(folder / "eval.json")
    if table is None:
        return None
    if not {"limit", "generalised", "annotations"} <= table.keys():
        raise RunError(f"{folder}: was evaluated by another version of ezsd; run `ezsd eval` again")
    if main is None or main.evaluation is None:
        return table
    theirs, ours = table["annotations"], main.evaluation["annotations"]
    if theirs["sha256"] != ours["sha256"]:
        files = f"{theirs['file']} (sha256 {theirs['sha256'][:12]}), not on {ours['file']} ({ours['sha256'][:12]})"
        raise RunError(
            f"`compare={folder}`: evaluated on {files} as {main.run.folder} was; figures of two ground truths cannot "
            "stand side by side: run `ezsd eval` again, both with the same `data_root`"
        )
    return table | {"limit": main.evaluation["limit"]}


def read_table(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file. DamagedFile when it holds something else."""
    if not path.is_file():
        return None
    return read_object(path)


def shown_path(path: Path) -> str:
    """A path as one would type it in the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def shell_command(*words: str) -> str:
    """A command line of these words, quoted for a shell."""
    return " ".join(shlex.quote(word) for word in words)


def dataset_label(main: RunData) -> str:
    """Description of the dataset."""
    name = str(main.spec["dataset"])
    if name in DRAWN:
        return f"{name} benchmark, synthetic; not COCO"
    return "a folder in COCO's layout, 48 base and 17 novel classes" if name == "coco" else name


def flat_settings(tables: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """All settings as section.key; of sentences that came from a file, a word for that file."""
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return flat | ({"teacher.descriptions": "FILE"} if flat.get("teacher.descriptions") else {})


def run_store(main: RunData) -> Store:
    """The run's store, where it was when the run was trained. RunError for an address, which no file makes ezsd ask."""
    recorded = str(main.environment["cache"])
    if "://" in recorded:
        raise RunError(f"`run={main.run.folder}`: its record says that its store is at {recorded}, which is no folder")
    store = Store(recorded)
    if store.manifest.digest != main.spec["store"]["digest"]:
        raise StoreMismatch(f"{store.path}: holds another store now than the one this run was trained from")
    trained_on = read_stores(main.run)
    if trained_on and store.digest not in [entry["sha256"] for entry in trained_on]:
        raise StoreMismatch(f"{store.path}: holds other bytes now than those this run was trained on")
    return store


def store_environment(main: RunData) -> dict[str, Any]:
    """Contents of the store's environment.json; empty where it is gone."""
    return read_environment(Path(str(main.environment["cache"])))
