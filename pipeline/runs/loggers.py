"""Loggers of a training's figures: lines of JSON always, TensorBoard if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.runs.run import Run


class MetricsLog:
    """Appends to metrics.jsonl and validation.jsonl of a run.

    Args:
        run: the run whose folder holds them.
        tensorboard: whether figures go to RUN/tensorboard as well.
        begin: the last step that is not written again.
    """

    def __init__(self, run: Run, *, tensorboard: bool, begin: int) -> None:
        self._run = run
        self._open = ExitStack()
        self._board: Any = _board(run, begin) if tensorboard else None

    def __enter__(self) -> MetricsLog:
        self._file = self._open.enter_context((self._run.folder / "metrics.jsonl").open("a"))
        if self._board is not None:
            self._open.callback(self._board.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def write(self, record: Mapping[str, float]) -> None:
        """Write the figures of a step; `step` is one of them."""
        self._file.write(json.dumps(record) + "\n")
        self._show("train", record)

    def write_validation(self, record: Mapping[str, float | None]) -> None:
        """Figures on the validation slice; None for a group without objects."""
        with (self._run.folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._show("validation", record)

    def flush(self) -> None:
        """Hand what was written to the system: a checkpoint follows."""
        self._file.flush()

    def _show(self, part: str, record: Mapping[str, float | None]) -> None:
        if self._board is None:
            return
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"{part}/{name}", value, record["step"])


def _board(run: Run, begin: int) -> object:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("train.tensorboard: TensorBoard is not installed; pip install 'ezsd[tensorboard]'") from error
    writer: object = SummaryWriter(str(run.folder / "tensorboard"), purge_step=begin + 1)
    return writer
