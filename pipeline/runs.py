"""The run folder: what was trained on what, metrics, checkpoints that survive a kill.

run.json             configuration, store manifest and digest, names, teacher
environment.json     data root, cache, teacher, device, versions: recorded, not compared
tables.safetensors   text rows of all names, re-normalised LayerNorms
metrics.jsonl        one line per step
checkpoints/         step-00000400/{model.safetensors, optimiser.safetensors, state.json}
seconds.json         time of each stage
eval.json, crops.json, detections.json, report.html   written by the later commands
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger("ezsd")
KEEP_CHECKPOINTS = 2


class RunError(ValueError):
    """A run folder is missing, unfinished or another run's."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    folder: Path
    step: int

    def model(self) -> dict[str, Tensor]:
        """The detector's state."""
        return load_file(self.folder / "model.safetensors")

    def optimiser(self) -> dict[str, Tensor]:
        """Flattened optimiser state, see `flatten_optimiser`."""
        return load_file(self.folder / "optimiser.safetensors")


class Run:
    """A run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run. RunError when the folder holds none."""
        if not (folder / "run.json").is_file():
            raise RunError(
                f"--run {folder}: no run here (run.json is missing); `ezsd train --cache ... --run` makes one"
            )
        return cls(folder)

    @classmethod
    def create_or_resume(cls, folder: Path, card: Mapping[str, object], tables: Mapping[str, Tensor]) -> Run:
        """Start a run, or go on with the same one; RunError names what differs from an earlier one."""
        run = cls(folder)
        wanted = json.loads(json.dumps(card))
        if (folder / "run.json").is_file():
            differences = _differences(run.card, wanted)
            if differences:
                raise RunError(
                    f"--run {folder}: holds another run: {'; '.join(differences[:4])}; choose another --run folder"
                )
            return run
        # What a start that was killed before run.json leaves behind is made again.
        begun = {"checkpoints", "tables.safetensors", ".run.json.partial"}
        if folder.exists() and any(p.name not in begun for p in folder.iterdir()):
            raise RunError(f"--run {folder}: is not empty and holds no run; choose another --run folder")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_file(dict(tables), folder / "tables.safetensors")
        _fsync(folder / "tables.safetensors")
        # Last, so that a folder with run.json is whole.
        write_json(folder / "run.json", wanted)
        return run

    @property
    def card(self) -> dict[str, object]:
        """What run.json says."""
        card: dict[str, object] = json.loads((self.folder / "run.json").read_text())
        return card

    @property
    def environment(self) -> dict[str, object]:
        """What environment.json says: places and versions, never compared."""
        environment: dict[str, object] = json.loads((self.folder / "environment.json").read_text())
        return environment

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Record places and versions of the latest start."""
        write_json(self.folder / "environment.json", environment)

    def tables(self) -> dict[str, Tensor]:
        """`text` (C, D) and `layer_norms` (K,), float32."""
        return load_file(self.folder / "tables.safetensors")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its state says; torn ones are passed over."""
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            state = folder / "state.json"
            with contextlib.suppress(OSError, ValueError, KeyError):
                expected = json.loads(state.read_text())
                if all(_sha256(folder / name) == digest for name, digest in expected["sha256"].items()):
                    return Checkpoint(folder, int(expected["step"]))
            log.warning("%s: damaged, passed over", folder)
        return None

    def finished(self) -> Checkpoint:
        """The checkpoint of the last step. RunError when training has not reached it."""
        latest = self.latest()
        steps = _nested(self.card, "config", "train", "steps")
        if latest is None or latest.step != steps:
            at = "no checkpoint yet" if latest is None else f"at step {latest.step}"
            raise RunError(f"--run {self.folder}: training is not finished ({at} of {steps}); run `ezsd train` again")
        return latest

    def save(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Write a checkpoint: all of it or nothing, durable before older ones go."""
        target = self.folder / "checkpoints" / f"step-{step:08d}"
        scratch = target.with_name(f".{target.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, scratch / "model.safetensors")
        save_file(flatten_optimiser(optimiser), scratch / "optimiser.safetensors")
        digests = {name: _sha256(scratch / name) for name in ("model.safetensors", "optimiser.safetensors")}
        write_json(scratch / "state.json", {"step": step, "sha256": digests})
        for path in (*scratch.iterdir(), scratch):
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        _fsync(target.parent)
        for old in sorted(target.parent.glob("step-*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    def record_seconds(self, stage: str, seconds: float) -> None:
        """Note how long a stage took; kept apart from results, which are the same on a re-run."""
        path = self.folder / "seconds.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**known, stage: round(seconds, 2)})

    def read_metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def cut_metrics(self, step: int) -> None:
        """Forget metrics after `step`, which a resumed run will write again; a torn last line goes too."""
        path = self.folder / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as named tensors: `<parameter number>.<name>`."""
    state = optimiser.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimiser`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file: all of it or nothing."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    _fsync(scratch)
    scratch.rename(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nested(card: Mapping[str, object], *keys: str) -> object:
    value: object = card
    for key in keys:
        assert isinstance(value, Mapping)
        value = value[key]
    return value


def _differences(old: object, new: object, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if old == new else [f"{where}: {_short(old)} there, {_short(new)} wanted"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
