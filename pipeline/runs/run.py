"""The run folder: what was trained on what, metrics, checkpoints that survive a kill.

run.json                configuration, store's manifest, names, digest of their text rows, table of LayerNorms
environment.json        places, definition of the dataset, teacher, device, versions: recorded, not compared
stores.json             which bytes of a store it was trained on, from which step on
training_boxes.json     number and digest of the base boxes that it was trained on, from which step on
tables.safetensors      text rows of all classes, re-normalised LayerNorms
metrics.jsonl           one line per step
checkpoints/            step-00000400/{model.safetensors, optimiser.safetensors, state.json}, average.safetensors where
                        an average of the weights is kept, and class_counts.safetensors with Seesaw loss
seconds.json            time of each stage
card.md                 model card, written at the end of training and anew by later commands
train.lock              locked while a training writes here

If asked for: validation_slice.json (annotations of the images looked at while training), validation.jsonl (AP50 on
them); metrics.csv, validation.csv, tensorboard/, wandb/, mlruns/, loggers.json (what trackers were given). Written by
the later commands: eval.json and detections.json, also with a suffix for another split or label space
(eval-train-novel.json), crops.json, audit.json and audit-ovd-strict.json, report.html. Where a run was trained
longer after step 400, results-00000400/ has those of the shorter one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import reprlib
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ezsd.cache import Difference, FileLock, differences, file_digest, rename, short_json, sync, write_atomic
from ezsd.data.stream import is_finite
from ezsd.errors import quantity
from ezsd.pipeline.config.names import with_todays_names
from ezsd.pipeline.config.schema import STAGE_ONE, Config, from_tables, with_defaults
from ezsd.pipeline.errors import DamagedFile, RunError
from ezsd.pipeline.files import as_json, parse_object, read_object, require_shallow, write_json, write_text
from ezsd.pipeline.runs.folder import require_run
from ezsd.pipeline.runs.schedule import first_other_rate

log = logging.getLogger("ezsd")
KEEP_CHECKPOINTS = 2
_LISTED = 4
"""Most differences listed in one message."""
LOCK = "train.lock"
_CHECKPOINT = re.compile(r"step-\d+|\.step-\d+\.partial")
"""Names of folders that training writes below checkpoints/."""
_PARTS = frozenset(("model.safetensors", "optimiser.safetensors"))
_OPTIONAL = frozenset(("average.safetensors", "class_counts.safetensors"))
_OF_WEIGHTS = ("eval*.json", "detections*.json", "audit*.json", "report.html", "card.md")
"""Results of later commands that a longer training outdates."""
_SPEC = {
    "config": dict,
    "store": dict,
    "dataset": str,
    "names": list,
    "base_count": int,
    "embed_dim": int,
    "layer_norms": list,
    "re_normalisation": dict,
}
"""Types of the values in run.json that later commands read."""
CHANGEABLE = (
    "backend",
    "channels_last",
    "checkpoint_every",
    "checkpoint_minutes",
    "compile",
    "loggers",
    "num_workers",
    "validate_every",
    "validate_images",
)
"""Settings of [train] that may change when a run is gone on with: what is learned does not depend on them, but for the
rounding of another backend, layout or compiler. `grad_accumulation` is one more where `learns_the_same_in_parts`."""
_NOT_COMPARED = frozenset(
    {f"config.train.{key}" for key in CHANGEABLE}
    # The store's digest says whether it is the same one; a copy of it may record other places.
    | {f"config.{table}" for table in STAGE_ONE}
    # The rate that it leads to is compared: see `ezsd.pipeline.training.trainer.in_effect`.
    | {"config.train.reference_batch_size"}
)


def learns_the_same_in_parts(sampling: object, *, frozen_norms: bool) -> bool:
    """True if a step learns the same, but for rounding, whatever `train.grad_accumulation` is.

    What is drawn must be each image's own, and no normalisation may depend on who is in a batch: the statistics of
    batch normalisation are frozen where the backbone began with ImageNet's weights, and only there.
    """
    return sampling == "image" and frozen_norms


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    def model(self) -> dict[str, Tensor]:
        """The state to detect with: the moving average of the weights, if one was kept."""
        return self.average() or self.trained()

    def trained(self) -> dict[str, Tensor]:
        """The state to go on training from."""
        return read_tensors(self.folder / "model.safetensors")

    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the weights; None if none was kept."""
        path = self.folder / "average.safetensors"
        return read_tensors(path) if path.exists() else None

    def class_counts(self) -> Tensor | None:
        """Objects of each base class that training had shown, (B,) int64; None if none were counted."""
        path = self.folder / "class_counts.safetensors"
        return _tensor(read_tensors(path), "class_counts", path) if path.exists() else None

    def optimiser(self) -> dict[str, Tensor]:
        """Flattened optimiser state, see `flatten_optimiser`."""
        return read_tensors(self.folder / "optimiser.safetensors")


class Run:
    """A run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began_at = 0
        """The step at which `train` took it up; its last one where nothing was left to train."""

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run.

        Raises:
            ArgumentError: the folder holds none.
            RunError: another version made it.
            DamagedFile: run.json is not a JSON object.
        """
        require_run(folder)
        run = cls(folder)
        spec = run.spec
        for key, kind in _SPEC.items():
            if not isinstance(spec.get(key), kind):
                raise RunError(
                    f"`run={folder}`: run.json has no {key}; another version made it, train it again in another `run` "
                    "folder"
                )
        wrong = _spec_fault(spec)
        if wrong:
            raise unlike_a_run(f"`run={folder}`", f"run.json: {wrong}")
        return run

    @classmethod
    @contextmanager
    def claim(
        cls,
        folder: Path,
        spec: Mapping[str, object],
        embeddings: Mapping[str, Tensor],
        check: Callable[[Run], None] = lambda run: None,
    ) -> Iterator[Run]:
        """Create or resume a run and keep other trainings out as long as the context lasts; see `create_or_resume`."""
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            yield cls.create_or_resume(folder, spec, embeddings, check)

    @classmethod
    def create_or_resume(
        cls,
        folder: Path,
        spec: Mapping[str, object],
        embeddings: Mapping[str, Tensor],
        check: Callable[[Run], None] = lambda run: None,
    ) -> Run:
        """Start a run, or go on with the same one.

        A folder without a checkpoint is nobody's run yet, whatever its run.json says: it is made anew. `check` may
        refuse a run that is there before anything of it is changed.

        Raises:
            RunError: the folder holds something else, or another run; names what differs.
            OSError: it cannot be written to.
        """
        run = cls(folder)
        wanted = as_json(spec)
        _refuse_foreign(folder)
        if run.has_checkpoint and (folder / "run.json").is_file():
            old = _with_effect(run.spec) if "in_effect" in wanted else run.spec
            found = _differences(old, wanted, ignored=_changeable(run.spec))
            if found and all(one.name.startswith("in_effect.") for one in found):
                raise RunError(
                    f"`run={folder}`: an earlier version of ezsd understood the same settings otherwise: "
                    f"{_listed(found)}; choose another `run` folder"
                )
            longer = _adds_steps(found)
            if found and not longer:
                raise RunError(f"`run={folder}`: holds another run: {_listed(found)}; choose another `run` folder")
            check(run)
            if longer:
                run._train_longer(wanted)
            return run
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tables.safetensors", save(dict(embeddings)))
        # Last, so that a folder with run.json is whole.
        write_json(folder / "run.json", wanted)
        return run

    @property
    def has_checkpoint(self) -> bool:
        """True if anything was trained that could be gone on with."""
        return any((self.folder / "checkpoints").glob("step-*"))

    def _train_longer(self, wanted: dict[str, Any]) -> None:
        """Give the run more steps, and set results of its weights so far aside.

        Raises:
            RunError: steps that are done would have had another learning rate in a run of that length.
        """
        old, new = self.config.train, from_tables(wanted["config"], where="config").train
        steps = (path.name.removeprefix("step-") for path in (self.folder / "checkpoints").glob("step-*"))
        done = max((int(step) for step in steps if step.isdecimal()), default=0)
        other = first_other_rate(old, new, done)
        if other is not None:
            of_done = quantity(done, "step is", "steps are")
            raise RunError(
                f"`run={self.folder}`: cannot go on to train.steps={new.steps}: {of_done} done, and with the "
                f"{new.schedule} schedule of {new.steps} steps the learning rate would have been another one from step "
                f"{other + 1} on; choose another `run` folder to train all steps"
            )
        results = [path for pattern in _OF_WEIGHTS for path in sorted(self.folder.glob(pattern))]
        aside = self.folder / f"results-{done:08d}"
        if results:
            aside.mkdir(exist_ok=True)
            log.info("%s: results of step %d are moved to %s", self.folder, done, aside.name)
        for path in results:
            rename(path, aside / path.name)
        # Last: until then the run is the shorter one.
        write_json(self.folder / "run.json", wanted)

    @property
    def spec(self) -> dict[str, object]:
        """Contents of run.json."""
        found = read_object(self.folder / "run.json")
        require_shallow(found, str(self.folder / "run.json"))
        if isinstance(found.get("config"), dict):
            found["config"] = with_todays_names(found["config"])
        return found

    @property
    def config(self) -> Config:
        """Configuration that the run is trained with."""
        tables = self.spec["config"]
        assert isinstance(tables, dict)
        return from_tables(tables, where=str(self.folder / "run.json"))

    @property
    def had_weights(self) -> bool:
        """True if the backbone began with pretrained weights."""
        return _nested(self.spec, "backbone_weights") is not None

    @property
    def environment(self) -> dict[str, object]:
        """Content of environment.json: places and versions, never compared."""
        path = self.folder / "environment.json"
        found = read_object(path)
        for key in ("data_root", "cache"):
            if not isinstance(found.get(key), str):
                raise RunError(f"{path}: does not say {key}; run the same `ezsd train` again to write it")
        return found

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Record places and versions of the latest start; what `record_start` noted of the others stays."""
        write_json(self.folder / "environment.json", {**environment, "starts": self.starts()})

    def starts(self) -> list[dict[str, object]]:
        """For each start that trained, oldest first: its first `step`, and the `settings` that starts may differ in."""
        path = self.folder / "environment.json"
        found: list[dict[str, object]] = read_object(path).get("starts", []) if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(one, dict) and _is_step(one.get("step")) for one in found):
            raise unlike_a_run(path, "starts: expected a list of objects with a step")
        return [
            {**start, "settings": with_todays_names({"train": start["settings"]})["train"]}
            if "settings" in start
            else start
            for start in found
        ]

    def record_start(self, step: int, settings: Mapping[str, object]) -> None:
        """Note with which settings the steps from `step` on are made; what came later was forgotten."""
        path = self.folder / "environment.json"
        before = [start for start in self.starts() if int(str(start["step"])) < step]
        write_json(path, {**read_object(path), "starts": [*before, {"step": step, "settings": dict(settings)}]})

    def embeddings(self) -> dict[str, Tensor]:
        """`text` (C, D) and `layer_norms` (K,), float32."""
        path = self.folder / "tables.safetensors"
        embeddings = read_tensors(path)
        text = _tensor(embeddings, "text", path)
        if text.dtype != torch.float32 or rows_digest(text.numpy()) != _nested(self.spec, "text_sha256"):
            raise RunError(f"{path}: holds other text rows than run.json says; train again in another `run` folder")
        return embeddings

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its state says; torn ones are passed over.

        RunError when it is another run's.
        """
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            state = _intact_state(folder)
            if state is None:
                log.warning("%s: damaged, passed over", folder)
                continue
            if isinstance(state.get("config"), dict):
                state["config"] = with_todays_names(state["config"])
            identity = self._identity()
            ignored = _changeable(self.spec)
            own = {key: state.get(key) for key in identity}
            found = _differences(own, identity, ignored=ignored)
            if _adds_steps(found):
                earlier = from_tables(state["config"], where=str(folder))
                found = [] if first_other_rate(earlier.train, self.config.train, state["step"]) is None else found
            if found:
                raise RunError(f"{folder}: is another run's: {_listed(found)}; remove it")
            return Checkpoint(folder, int(state["step"]))
        return None

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step, unchecked: another process has found it whole."""
        return Checkpoint(self._checkpoint_folder(step), step)

    def _checkpoint_folder(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def finished(self) -> Checkpoint:
        """The checkpoint of the last step. RunError when training has not reached it."""
        latest = self.latest()
        steps = _nested(self.spec, "config", "train", "steps")
        if latest is None or latest.step != steps:
            at = "no checkpoint yet" if latest is None else f"at step {latest.step}"
            raise RunError(f"`run={self.folder}`: training is not finished ({at} of {steps}); run `ezsd train` again")
        return latest

    def save(
        self,
        step: int,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None = None,
        class_counts: Tensor | None = None,
    ) -> None:
        """Write a checkpoint: all of it or nothing, durable before older ones go.

        Raises:
            OSError: the disk is full or cannot be written to; earlier checkpoints are still there.
        """
        target = self._checkpoint_folder(step)
        scratch = target.with_name(f".{target.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        parts = {"model": model.state_dict(), "optimiser": flatten_optimiser(optimiser)}
        if average is not None:
            parts["average"] = dict(average)
        if class_counts is not None:
            parts["class_counts"] = {"class_counts": class_counts}
        digests = {}
        for name, tensors in parts.items():
            content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            digests[f"{name}.safetensors"] = write_atomic(scratch / f"{name}.safetensors", content).sha256
        write_json(scratch / "state.json", {"step": step, "sha256": digests, **self._identity()})
        sync(scratch)
        # Only a torn one can stand here: training goes on from the newest that is whole.
        shutil.rmtree(target, ignore_errors=True)
        rename(scratch, target)
        self._forget_others(step)

    def _identity(self) -> dict[str, object]:
        """Values that tell a checkpoint from others, and that its use with any names needs."""
        spec = self.spec
        return {
            "names": _nested(spec, "names"),
            "text_sha256": _nested(spec, "text_sha256"),
            "store_digest": _nested(spec, "store", "digest"),
            "config": _nested(spec, "config"),
        }

    def _forget_others(self, step: int) -> None:
        """Keep the newest checkpoints up to `step`; what is later or unfinished was torn."""
        folder = self.folder / "checkpoints"
        known = sorted(p for p in folder.glob("step-*") if p.name <= f"step-{step:08d}")[-KEEP_CHECKPOINTS:]
        for old in folder.iterdir():
            # What no training writes is somebody's own, and a link may lead anywhere.
            if old not in known and _CHECKPOINT.fullmatch(old.name) and not old.is_symlink():
                shutil.rmtree(old)

    def seconds(self) -> dict[str, float]:
        """Duration of each stage, as far as recorded."""
        path = self.folder / "seconds.json"
        return read_object(path) if path.exists() else {}

    def record_seconds(self, stage: str, seconds: float) -> None:
        """Note how long a stage took; kept apart from results, which are the same on a re-run."""
        write_json(self.folder / "seconds.json", {**self.seconds(), stage: round(seconds, 2)})

    def read_metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl."""
        return self._lines("metrics.jsonl")

    def read_validation(self) -> list[dict[str, float]]:
        """All lines of validation.jsonl."""
        return self._lines("validation.jsonl")

    def _lines(self, name: str) -> list[dict[str, float]]:
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [parse_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    def cut_metrics(self, step: int) -> None:
        """Forget metrics after `step`, which a resumed run will write again; a torn last line goes too."""
        for path in (self.folder / "metrics.jsonl", self.folder / "validation.jsonl"):
            kept = []
            for line in path.read_text().splitlines() if path.exists() else []:
                with contextlib.suppress(DamagedFile):
                    if parse_object(line, str(path))["step"] <= step:
                        kept.append(line)
            if path.exists():
                write_text(path, "".join(line + "\n" for line in kept))


def unlike_a_run(where: object, reason: str) -> RunError:
    """The error of a file of a run that says what no run of ezsd does."""
    return RunError(f"{where}: {reason}; train again in another `run` folder")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of a run. RunError when it is damaged or gone."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        # ValueError and KeyError: a type or a shape in its head that no tensor has.
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: is damaged or gone ({reason}); train again in another `run` folder") from error


def _tensor(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """A tensor of a file by its name. RunError when the file has none."""
    if name not in tensors:
        raise unlike_a_run(path, f"holds no {name}")
    return tensors[name]


def _is_step(value: object) -> bool:
    return type(value) is int and value >= 0


def _spec_fault(spec: Mapping[str, Any]) -> str | None:
    """The fault within a value of run.json that is of the right type; None for none."""
    names, base, store = spec["names"], spec["base_count"], spec["store"]
    if not names or not all(isinstance(name, str) for name in names):
        return "names: expected a list of names"
    if not 1 <= base <= len(names):
        return f"base_count: expected a number from 1 to {len(names)}, found {base}"
    if not 1 <= spec["embed_dim"] <= _WIDEST:
        return f"embed_dim: expected a number from 1 to {_WIDEST}, found {spec['embed_dim']}"
    if not isinstance(store.get("digest"), str):
        return "store: expected a digest"
    if not all(isinstance(norm, dict) for norm in spec["layer_norms"]):
        return "layer_norms: expected a list of objects"
    return None


_WIDEST = 2**16
"""Largest width of embeddings."""


def _intact_state(folder: Path) -> dict[str, Any] | None:
    """Content of state.json of a checkpoint; None if its files differ or are not exactly those of a checkpoint."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        state = read_object(folder / "state.json")
        require_shallow(state, str(folder))
        names = state["sha256"].keys()
        # Names from a file are not joined to a path before they are known.
        if not _PARTS <= names <= _PARTS | _OPTIONAL or not isinstance(state["step"], int):
            return None
        if all(file_digest(folder / name).sha256 == digest for name, digest in state["sha256"].items()):
            return state
    return None


def _refuse_foreign(folder: Path) -> None:
    if (folder / "run.json").is_file():
        return
    # What a start that was killed before run.json leaves behind is made again.
    begun = {"checkpoints", "tables.safetensors", ".tables.safetensors.partial", ".run.json.partial", LOCK}
    if folder.exists() and any(p.name not in begun for p in folder.iterdir()):
        raise RunError(f"`run={folder}`: is not empty and holds no run; choose another `run` folder")


def _locked(folder: Path) -> FileLock:
    """The right to train in a folder. RunError while another training has it."""

    def busy(owner: str) -> RunError:
        return RunError(
            f"`run={folder}`: another training ({owner.strip() or 'unknown'}) is writing to it; wait for it to end, "
            "or choose another `run` folder"
        )

    return FileLock(folder / LOCK, busy=busy, owner=f"process {os.getpid()} on {socket.gethostname()}\n")


def rows_digest(text: NDArray[np.float32]) -> str:
    """Digest of text rows (C, D), as run.json records it."""
    return hashlib.sha256(text.tobytes()).hexdigest()


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


def _adds_steps(found: Sequence[Difference]) -> bool:
    """True if two records of a run differ in nothing but the number of steps, of which the second has more."""
    return [one.name for one in found] == ["config.train.steps"] and _is_fewer(found[0].stored, found[0].wanted)


def _is_fewer(one: object, other: object) -> bool:
    return _is_step(one) and _is_step(other) and cast("int", one) < cast("int", other)


def _with_effect(spec: Mapping[str, object]) -> Mapping[str, object]:
    """Convert a spec to the form that this version writes.

    Earlier versions took a distance as it stands, and any rate in proportion.
    """
    if "in_effect" in spec:
        return spec
    rate, size = (_number(spec, "config", "train", key) for key in ("learning_rate", "batch_size"))
    train = _nested(spec, "config", "train")
    of = _number(spec, "config", "train", "reference_batch_size") if "reference_batch_size" in cast("Any", train) else 0
    return {
        **spec,
        "in_effect": {
            "distillation_weight": _nested(spec, "config", "loss", "distillation"),
            "peak_rate": rate * size / of if of else rate,
        },
    }


def _number(spec: Mapping[str, object], *keys: str) -> float:
    value = _nested(spec, *keys)
    if not is_finite(value):
        raise unlike_a_run("run.json", f"{'.'.join(keys)}: expected a number, found {reprlib.repr(value)}")
    return value


def _nested(spec: Mapping[str, object], *keys: str) -> object:
    value: object = spec
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise unlike_a_run("run.json", f"has no {'.'.join(keys)}")
        value = value[key]
    return value


def _changeable(spec: Mapping[str, object]) -> frozenset[str]:
    """Settings that may differ from the run's spec when training starts again."""
    train = _nested(spec, "config", "train")
    sampling = train.get("rng") if isinstance(train, Mapping) else None
    if learns_the_same_in_parts(sampling, frozen_norms=spec.get("backbone_weights") is not None):
        return _NOT_COMPARED | {"config.train.grad_accumulation"}
    return _NOT_COMPARED


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], *, ignored: Set[str]) -> list[Difference]:
    """The values that two records of a run differ in; None is as good as no entry, and 1 as 1.0."""
    return [
        one
        for one in differences(_comparable(_complete(old)), _comparable(_complete(new)))
        if one.more or one.stored != one.wanted
        if not any(one.name == name or one.name.startswith((f"{name}.", f"{name}[")) for name in ignored)
    ]


def _complete(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of a run with the defaults of settings that came after it."""
    config = record.get("config")
    return {**record, "config": with_defaults(config)} if isinstance(config, Mapping) else record


def _comparable(value: Any) -> Any:  # noqa: ANN401 - JSON
    """JSON with whole numbers written alike, whether they were read as 1 or 1.0."""
    if isinstance(value, Mapping):
        return {key: _comparable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(found: Sequence[Difference]) -> str:
    values = [one for one in found if not one.more][:_LISTED]
    return "; ".join(f"{one.name}: {short_json(one.stored)} there, {short_json(one.wanted)} wanted" for one in values)
