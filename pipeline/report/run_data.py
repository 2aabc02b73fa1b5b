"""What a run's folder says, read once for all sections."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezsd.cache import Store, StoreMismatch, read_environment
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.files import read_object
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.store_digests import read_stores

_LABELS = {
    "shapes": "shapes benchmark, synthetic; not COCO",
    "coco": "a folder in COCO's layout, 48 base and 17 novel classes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one run's folder says."""

    run: Run
    label: str
    card: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    """None until `ezsd eval`."""
    crops: dict[str, Any] | None
    """None until `ezsd eval --crops`."""
    metrics: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def novel(self) -> frozenset[str]:
        """Names without training boxes."""
        return frozenset(self.card["names"][self.card["base_count"] :])

    def command(self, verb: str, *options: str) -> str:
        """A command about this run."""
        return shell_command("ezsd", verb, "--run", shown_path(self.run.folder), *options)


def collect(runs: Sequence[Run]) -> list[Facts]:
    """The facts of runs, the main one first; what the others' evaluations say is read at its limit.

    Raises:
        RunError: a run is of another dataset, or was evaluated by another version or on other annotations.
    """
    names = [run.folder.absolute().name for run in runs]
    facts: list[Facts] = []
    for run, name in zip(runs, names, strict=True):
        folder, card = run.folder, run.spec
        if card["dataset"] != runs[0].spec["dataset"]:
            both = f"{card['dataset']}, not on {runs[0].spec['dataset']}"
            raise RunError(f"--compare {folder}: trained on {both}; compare runs of one dataset")
        facts.append(
            Facts(
                run=run,
                label=name if names.count(name) == 1 else shown_path(folder),
                card=card,
                environment=run.environment,
                evaluation=_read_evaluation(folder, facts[0] if facts else None),
                crops=read_table(folder / "crops.json"),
                metrics=run.read_metrics(),
                seconds=read_table(folder / "seconds.json") or {},
            )
        )
    return facts


def _read_evaluation(folder: Path, main: Facts | None) -> dict[str, Any] | None:
    """What eval.json says, at the main run's limit; None without one."""
    table = read_table(folder / "eval.json")
    if table is None:
        return None
    if not {"limit", "generalised", "annotations"} <= table.keys():
        raise RunError(f"--run {folder}: was evaluated by another version of ezsd; run `ezsd eval` again")
    if main is None or main.evaluation is None:
        return table
    theirs, ours = table["annotations"], main.evaluation["annotations"]
    if theirs["sha256"] != ours["sha256"]:
        files = f"{theirs['file']} (sha256 {theirs['sha256'][:12]}), not on {ours['file']} ({ours['sha256'][:12]})"
        raise RunError(
            f"--compare {folder}: evaluated on {files} as {main.run.folder} was; figures of two ground truths cannot "
            "stand side by side: run `ezsd eval` again, both with the same --data-root"
        )
    return table | {"limit": main.evaluation["limit"]}


def read_table(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is no such file. RunError when it holds something else."""
    if not path.is_file():
        return None
    return read_object(path)


def shown_path(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def shell_command(*words: str) -> str:
    """Words as one would type them."""
    return " ".join(shlex.quote(word) for word in words)


def dataset_label(main: Facts) -> str:
    """What the dataset is, in words."""
    name = str(main.card["dataset"])
    return _LABELS.get(name, name)


def flat_settings(tables: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """All settings as section.key."""
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}


def run_store(main: Facts) -> Store:
    """The run's store, where it was when the run was trained."""
    store = Store(str(main.environment["cache"]))
    if store.manifest.digest != main.card["store"]["digest"]:
        raise StoreMismatch(f"{store.path}: holds another store now than the one this run was trained from")
    known = read_stores(main.run)
    if known and store.digest not in [entry["sha256"] for entry in known]:
        raise StoreMismatch(f"{store.path}: holds other bytes now than those this run was trained on")
    return store


def store_environment(main: Facts) -> dict[str, Any]:
    """What the store's environment.json says, if it is still there."""
    return read_environment(Path(str(main.environment["cache"])))
