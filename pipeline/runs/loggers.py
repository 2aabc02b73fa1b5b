"""Loggers of a training's metrics: metrics.jsonl always; CSV, TensorBoard, Weights & Biases and MLflow if asked for."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

from ezsd.choices import Logger
from ezsd.pipeline.config.schema import to_tables
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.files import read_object, write_json, write_text
from ezsd.pipeline.runs.run import Run

log = logging.getLogger("ezsd")
PROJECT = "ezsd"
"""Project of Weights & Biases and experiment of MLflow, unless WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME name others."""
RECORD = "loggers.json"
"""File of a run with the ids that trackers know it by, and the last step that each was given."""
_PACKAGES: Mapping[Logger, str] = {"mlflow": "mlflow", "tensorboard": "tensorboard", "wandb": "wandb"}
_EVERY_SECONDS = 5.0
"""Seconds between two messages to a tracker."""

Record = Mapping[str, float | None]
Ending = Literal["finished", "failed", "killed"]
"""End of a start of training: with its last step, with an error, or because somebody stopped it."""


class _Sink(Protocol):
    def write(self, part: str, record: Record) -> None:
        """Take the figures of a step; `part` is "train" or "validation"."""

    def flush(self) -> None:
        """Hand on what is held back."""

    def close(self, ending: Ending) -> None:
        """Hand on what is held back, and end."""


def require_loggers(loggers: Sequence[Logger]) -> None:
    """Raise ConfigError for a logger whose package is not installed."""
    for name in loggers:
        if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
            raise ConfigError(f"`train.loggers`: {name} is not installed; pip install 'ezsd[{name}]'")


class MetricsLog:
    """Appends to metrics.jsonl and validation.jsonl of a run, and to the loggers of its settings.

    Args:
        run: the run whose folder holds them.
        loggers: other loggers; their packages are installed, see `require_loggers`.
        begin: the last step that is not written again.
    """

    def __init__(self, run: Run, *, loggers: Sequence[Logger], begin: int) -> None:
        self._run = run
        self._sinks: list[_Sink] = []
        try:
            for name in loggers:
                self._sinks.append(_SINKS[name](run, begin))
        except BaseException as error:
            self._close(_ending(type(error)))
            raise

    def __enter__(self) -> MetricsLog:
        self._file = (self._run.folder / "metrics.jsonl").open("a")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._close(_ending(kind))

    def _close(self, ending: Ending) -> None:
        # All of them, whatever becomes of one: a full disk ends the files, and a tracker is still told of the end.
        with ExitStack() as sinks:
            for sink in self._sinks:
                sinks.callback(sink.close, ending)

    def write(self, record: Mapping[str, float]) -> None:
        """Write the figures of a step; `step` is one of them."""
        self._file.write(json.dumps(record) + "\n")
        self._show("train", record)

    def write_validation(self, record: Record) -> None:
        """Figures on the validation slice; None for a group without objects."""
        with (self._run.folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._show("validation", record)

    def flush(self) -> None:
        """Hand what was written to the system: a checkpoint follows."""
        self._file.flush()
        for sink in self._sinks:
            sink.flush()

    def _show(self, part: str, record: Record) -> None:
        for sink in self._sinks:
            sink.write(part, record)


def _ending(kind: type[BaseException] | None) -> Ending:
    """Ending of a training that an exception of this type has left, or none."""
    if kind is None:
        return "finished"
    # `Stopped`, the answer to a signal, is a SystemExit.
    return "killed" if issubclass(kind, SystemExit | KeyboardInterrupt) else "failed"


def _figures(record: Record) -> dict[str, float]:
    """Figures of a record without its step, and without those that there are not."""
    return {name: value for name, value in record.items() if name != "step" and value is not None}


class _Csv:
    """metrics.csv and validation.csv, the tables of metrics.jsonl and validation.jsonl.

    They begin with all steps of the run so far, whether or not they were asked for then.
    """

    def __init__(self, run: Run, begin: int) -> None:
        before = {"train": run.read_metrics(), "validation": run.read_validation()}
        files = {"train": run.folder / "metrics.csv", "validation": run.folder / "validation.csv"}
        self._tables = {part: _Table(files[part], before[part]) for part in files}

    def write(self, part: str, record: Record) -> None:
        self._tables[part].add(record)

    def flush(self) -> None:
        for table in self._tables.values():
            table.flush()

    def close(self, ending: Ending) -> None:
        for table in self._tables.values():
            table.close()


class _Table:
    """A CSV file whose columns are the names of all figures so far; without a record there is no file."""

    def __init__(self, path: Path, records: Sequence[Record]) -> None:
        self._path = path
        self._columns = list(dict.fromkeys(name for record in records for name in record))
        self._file: TextIO | None = None
        path.unlink(missing_ok=True)
        if records:
            self._begin(records)

    def add(self, record: Record) -> None:
        new = [name for name in record if name not in self._columns]
        if new or self._file is None:
            # Some figures come first in a later step: the rows before have none.
            before = self._rows()
            self._columns += new
            self._begin([*before, record])
            return
        self._file.write(self._lines([record]))

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _rows(self) -> list[Mapping[str, Any]]:
        if self._file is None:
            return []
        self._file.close()
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        write_text(self._path, ",".join(self._columns) + "\n" + self._lines(records))
        self._file = self._path.open("a", newline="")

    def _lines(self, records: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(records)
        return text.getvalue()


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Run, begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Later steps, of a start that was killed, are written again: their first events count no more.
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=begin + 1)

    def write(self, part: str, record: Record) -> None:
        for name, value in _figures(record).items():
            self._writer.add_scalar(f"{part}/{name}", value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()


class _Tracker(ABC):
    """Base of loggers that keep a run of their own, which cannot forget a step.

    A resumed training may make steps again that a killed one had handed on. So the last step is noted before it is
    handed on, and up to there nothing is handed on again: no step is there twice, and after a kill at most those of
    the last seconds are missing. What a tracker refuses is said once, and the training goes on without it.
    """

    name: Logger

    def __init__(self, run: Run, begin: int) -> None:
        self._run = run
        self._path = run.folder / RECORD
        self._waiting: list[tuple[str, Record]] = []
        self._handed_at = time.monotonic()
        self._is_lost = False
        noted = self._record().get(self.name, {})
        self.id: str | None = noted.get("id")
        self._last: dict[str, int] = {part: noted.get(part, 0) for part in ("train", "validation")}

    def write(self, part: str, record: Record) -> None:
        step = int(record["step"] or 0)
        if self._is_lost or step <= self._last[part]:
            return
        self._waiting.append((part, record))
        if time.monotonic() - self._handed_at > _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        records, self._waiting = self._waiting, []
        for part, record in records:
            self._last[part] = int(record["step"] or 0)
        if records and not self._is_lost:
            self.note()
            self.guarded(lambda: self.hand_on(records))
        self._handed_at = time.monotonic()

    def close(self, ending: Ending) -> None:
        try:
            self.flush()
        finally:
            # One that has refused figures may take this.
            self._attempt(lambda: self.end(ending))

    def note(self) -> None:
        """Record the id and the last steps."""
        write_json(self._path, self._record() | {self.name: {"id": self.id, **self._last}})

    def _record(self) -> dict[str, Any]:
        return read_object(self._path) if self._path.exists() else {}

    def guarded(self, work: Callable[[], object]) -> None:
        """Do some work with the tracker; whatever its library raises ends the tracking alone."""
        if not self._is_lost:
            self._attempt(work)

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            # Each library, and those below it, have errors of their own.
            if self._is_lost:
                return
            self._is_lost = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("%s takes no more metrics (%s): training goes on, metrics.jsonl has all", self.name, reason)

    @abstractmethod
    def hand_on(self, records: Sequence[tuple[str, Record]]) -> None:
        """Log records, in the order of their steps."""

    @abstractmethod
    def end(self, ending: Ending) -> None:
        """End the tracker's run, which a resumed training opens again, and say there how the training has ended."""


class _WeightsAndBiases(_Tracker):
    """A run of Weights & Biases, whose files are below RUN/wandb; WANDB_MODE=offline keeps them there.

    Its own step counts rows, which cannot go back: a validation that a resumed training makes up for, of a step before
    the last one logged, would be dropped. So the step of a training is a figure, and the axis of the others.
    """

    name: Logger = "wandb"
    _EXIT_CODES: Mapping[Ending, int] = {"finished": 0, "failed": 1, "killed": 255}
    """The last one is that of a script that Ctrl-C ended."""

    def __init__(self, run: Run, begin: int) -> None:
        super().__init__(run, begin)
        import wandb

        is_offline = os.environ.get("WANDB_MODE") == "offline"
        known, self.id = self.id is not None, self.id or uuid.uuid4().hex[:8]
        try:
            self._tracked: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=self.id,
                name=run.folder.absolute().name,
                dir=str(run.folder),
                config=to_tables(run.config),
                resume="allow" if known and not is_offline else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
            for part in self._last:
                self._tracked.define_metric(f"{part}/step")
                self._tracked.define_metric(f"{part}/*", step_metric=f"{part}/step")
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"`train.loggers`: wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self.note()

    def hand_on(self, records: Sequence[tuple[str, Record]]) -> None:
        for part, record in records:
            figures = {f"{part}/{name}": value for name, value in _figures(record).items()}
            self._tracked.log({f"{part}/step": int(record["step"] or 0), **figures})

    def end(self, ending: Ending) -> None:
        self._tracked.finish(exit_code=self._EXIT_CODES[ending])


class _Mlflow(_Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI or in files below RUN/mlruns."""

    name: Logger = "mlflow"

    def __init__(self, run: Run, begin: int) -> None:
        super().__init__(run, begin)
        import mlflow

        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            address = (run.folder / "mlruns").absolute().as_uri()
            # Newer versions take files for a mistake unless told so; a database would need more packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            self._client: Any = mlflow.tracking.MlflowClient(tracking_uri=address)
            if self.id is None:
                experiment = self._client.get_experiment_by_name(name)
                place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
                tags = {"mlflow.runName": run.folder.absolute().name}
                self.id = self._client.create_run(place, tags=tags).info.run_id
                for section, table in to_tables(run.config).items():
                    for key, value in table.items():
                        self._client.log_param(self.id, f"{section}.{key}", str(value)[:_MLFLOW_LETTERS])
            else:
                self._client.update_run(self.id, status="RUNNING")
        except Exception as error:
            # Its own errors, and those of whatever it reaches the address by.
            if self.id is not None:
                # A run that no training follows must not stay at RUNNING. Who refuses this too has told why already.
                with suppress(Exception):
                    self.end("failed")
            reason = " ".join(str(error).split())
            raise ConfigError(f"`train.loggers`: mlflow: {address}: {reason}; set MLFLOW_TRACKING_URI") from error
        self.note()

    def hand_on(self, records: Sequence[tuple[str, Record]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(f"{part}/{name}", value, now, int(record["step"] or 0))
            for part, record in records
            for name, value in _figures(record).items()
            if math.isfinite(value)
        ]
        for start in range(0, len(points), _MLFLOW_POINTS):
            self._client.log_batch(self.id, metrics=points[start : start + _MLFLOW_POINTS])

    def end(self, ending: Ending) -> None:
        self._client.set_terminated(self.id, status=ending.upper())


_MLFLOW_LETTERS = 250
"""Letters of a parameter that every store of MLflow takes."""
_MLFLOW_POINTS = 1000
"""Points that MLflow takes at a time."""
_SINKS: dict[Logger, Callable[[Run, int], _Sink]] = {
    "csv": _Csv,
    "mlflow": _Mlflow,
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}
