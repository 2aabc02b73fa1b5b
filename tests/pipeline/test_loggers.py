"""Loggers of a training's metrics, and what a resumed training adds to them."""

import contextlib
import csv
import dataclasses
import json
import signal

import pytest
import torch

from ezsd.pipeline.config.names import with_todays_names
from ezsd.pipeline.config.schema import apply_override, to_tables
from ezsd.pipeline.console.arguments import loggers_override
from ezsd.pipeline.errors import ArgumentError, ConfigError
from ezsd.pipeline.interrupts import Stopped
from ezsd.pipeline.runs import loggers
from ezsd.pipeline.runs.loggers import MetricsLog, require_loggers
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train

STEPS = list(range(1, 9))


def figures(step):
    found = {"step": step, "loss": 1 / step, "seconds": 0.5}
    # Some figures come later than others.
    return found | {"pseudo": float(step)} if step > 3 else found


@pytest.fixture
def new_run(quick_config, tmp_path):
    """A run before its first step, by the name of its folder."""
    spec = {"names": ["cat"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": to_tables(quick_config)}
    return lambda name: Run.create_or_resume(tmp_path / name, spec, {"text": torch.eye(2)})


@pytest.fixture
def logged_twice(new_run):
    """A run whose training was killed at step 6, two after its checkpoint, and resumed to step 8, by its logger."""

    def make(logger, killed_by=None):
        run = new_run(logger)
        first = MetricsLog(run, loggers=[logger], begin=0)
        first.__enter__()
        for step in STEPS[:6]:
            first.write(figures(step))
            if step == 4:
                first.write_validation({"step": 4, "base": 0.5, "novel": None})
                first.flush()
        # What is in a buffer may be lost with a killed process, or be written, as here.
        first.__exit__(killed_by and type(killed_by), killed_by, None)
        run.cut_metrics(4)
        with MetricsLog(run, loggers=[logger], begin=4) as second:
            for step in STEPS[4:]:
                second.write(figures(step))
            second.write_validation({"step": 8, "base": 0.25, "novel": 0.125})
        return run

    return make


def test_csv_is_the_table_of_all_steps(logged_twice):
    run = logged_twice("csv")
    with (run.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == [
        figures(step) for step in STEPS
    ]
    assert list(rows[0]) == ["step", "loss", "seconds", "pseudo"]
    assert (run.folder / "validation.csv").read_text() == "step,base,novel\n4,0.5,\n8,0.25,0.125\n"
    assert [line["step"] for line in run.read_metrics()] == STEPS


def test_csv_that_is_asked_for_later_has_the_steps_before(logged_twice):
    run = logged_twice("csv")
    wanted = (run.folder / "metrics.csv").read_text()
    (run.folder / "metrics.csv").unlink()
    with MetricsLog(run, loggers=["csv"], begin=8):
        pass
    assert (run.folder / "metrics.csv").read_text() == wanted


def test_tensorboard_has_each_step_once(logged_twice):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logged_twice("tensorboard")
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in STEPS
    ]
    assert [(one.step, one.value) for one in events.Scalars("validation/base")] == [(4, 0.5), (8, 0.25)]
    assert [(one.step, one.value) for one in events.Scalars("validation/novel")] == [(8, 0.125)]


@pytest.fixture
def mlflow_of(monkeypatch):
    """A client of the store of a run's own folder."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return lambda run: mlflow.tracking.MlflowClient(tracking_uri=(run.folder / "mlruns").absolute().as_uri())


def test_mlflow_has_each_step_once(logged_twice, mlflow_of):
    run = logged_twice("mlflow")
    client = mlflow_of(run)
    (found,) = client.search_runs([client.get_experiment_by_name("ezsd").experiment_id])
    assert found.info.run_id == json.loads((run.folder / "loggers.json").read_text())["mlflow"]["id"]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(step, pytest.approx(1 / step)) for step in STEPS]
    assert [one.step for one in client.get_metric_history(found.info.run_id, "validation/novel")] == [8]
    assert found.data.params["train.steps"] == str(run.config.train.steps)
    assert found.info.status == "FINISHED"


ENDINGS = [
    (None, "FINISHED", 0),
    (FloatingPointError("a loss is not finite"), "FAILED", 1),
    (Stopped(signal.SIGINT), "KILLED", 255),
    (Stopped(signal.SIGTERM), "KILLED", 255),
]


@pytest.mark.parametrize(("error", "status"), [(error, status) for error, status, _ in ENDINGS])
def test_mlflow_knows_how_a_training_ended_and_that_it_goes_on(error, status, logged_twice, mlflow_of):
    run = logged_twice("mlflow", killed_by=RuntimeError("killed"))
    client, tracked = mlflow_of(run), json.loads((run.folder / "loggers.json").read_text())["mlflow"]["id"]
    third = MetricsLog(run, loggers=["mlflow"], begin=8)
    third.__enter__()
    assert client.get_run(tracked).info.status == "RUNNING"
    third.__exit__(error and type(error), error, None)
    assert client.get_run(tracked).info.status == status


def test_a_run_of_mlflow_that_cannot_begin_does_not_stay_running(new_run, mlflow_of, monkeypatch):
    import mlflow

    def refuse(*_):
        raise ConnectionError("no route to host")

    run = new_run("mlflow")
    monkeypatch.setattr(mlflow.tracking.MlflowClient, "log_param", refuse)
    with pytest.raises(ConfigError, match="no route to host; set MLFLOW_TRACKING_URI"):
        MetricsLog(run, loggers=["mlflow"], begin=0)
    client = mlflow_of(run)
    (found,) = client.search_runs([client.get_experiment_by_name("ezsd").experiment_id])
    assert found.info.status == "FAILED"


def leveldb_log(content):
    """Records of a file of Weights & Biases: 7 bytes, then LevelDB's log, blocks of 32 KiB of pieces of records."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        # Whole, or the last piece.
        if kind in (1, 4):
            yield record
            record = b""


@pytest.fixture
def wandb_records(monkeypatch):
    """Records that Weights & Biases has written below a run, in their order."""
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")

    def read(run):
        # Its own process has written all when it is gone.
        wandb.teardown()
        files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
        return [Record.FromString(data) for file in files for data in leveldb_log(file.read_bytes())]

    return read


def history(records):
    rows = [
        {(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in record.history.item}
        for record in records
    ]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows if row]


def test_wandb_has_each_step_once(logged_twice, wandb_records):
    records = wandb_records(logged_twice("wandb", killed_by=RuntimeError("killed")))
    rows = history(records)
    assert [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (step, pytest.approx(1 / step)) for step in STEPS
    ]
    assert [row for row in rows if "validation/step" in row] == [
        {"validation/step": 4, "validation/base": 0.5},
        {"validation/step": 8, "validation/base": 0.25, "validation/novel": 0.125},
    ]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]
    # The same run of Weights & Biases, and its axes.
    assert len({record.run.run_id for record in records if record.HasField("run")}) == 1
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.metric.glob_name}
    assert axes == {"train/*": "train/step", "validation/*": "validation/step"}


def test_wandb_takes_a_validation_of_an_earlier_step(logged_twice, wandb_records):
    """As a resumed training makes up for one that was cut short, while the tracker has later steps already."""
    run = logged_twice("wandb")
    with MetricsLog(run, loggers=["wandb"], begin=8) as third:
        for step in (9, 10, 11):
            third.write(figures(step))
        third.flush()
        third.write_validation({"step": 10, "base": 0.75, "novel": None})
    rows = history(wandb_records(run))
    assert [row for row in rows if row.get("validation/step") == 10] == [
        {"validation/step": 10, "validation/base": 0.75}
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [(error, code) for error, _, code in ENDINGS])
def test_wandb_knows_how_a_training_ended(error, code, logged_twice, wandb_records):
    run = logged_twice("wandb", killed_by=error)
    first, _ = (record.exit.exit_code for record in wandb_records(run) if record.HasField("exit"))
    assert first == code


class Refusing(loggers._Tracker):
    name = "mlflow"

    def __init__(self, run, begin):
        super().__init__(run, begin)
        self.handed = 0

    def hand_on(self, records):
        self.handed += len(records)
        raise ConnectionError("no route\nto host")

    def end(self, ending):
        with (self._run.folder / "ended").open("a") as file:
            file.write(f"{ending} ")


class Full(loggers._Csv):
    def close(self, ending):
        super().close(ending)
        raise OSError(28, "No space left on device")


class Told(loggers._Tracker):
    name = "mlflow"

    def hand_on(self, records):
        pass

    def end(self, ending):
        (self._run.folder / "ended").write_text(ending)


@pytest.mark.parametrize(("error", "status"), [(error, status) for error, status, _ in ENDINGS])
def test_a_tracker_is_told_how_a_training_ended(error, status, logged_twice, monkeypatch):
    monkeypatch.setitem(loggers._SINKS, "mlflow", Told)
    run = logged_twice("mlflow")
    ended = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with ended, MetricsLog(run, loggers=["mlflow"], begin=8):
        if error is not None:
            raise error
    assert (run.folder / "ended").read_text() == status.lower()


def test_a_tracker_that_fails_ends_no_training(logged_twice, monkeypatch, caplog):
    monkeypatch.setitem(loggers._SINKS, "mlflow", Refusing)
    run = logged_twice("mlflow")
    assert [line["step"] for line in run.read_metrics()] == STEPS
    said = "mlflow takes no more metrics (ConnectionError: no route to host): training goes on, metrics.jsonl has all"
    # Once for each of the two starts.
    assert [one.message for one in caplog.records] == [said, said]
    assert (run.folder / "ended").read_text() == "finished finished ", "it may be reached again at the end"


def test_a_tracker_is_told_of_the_end_where_a_file_cannot_be_closed(logged_twice, monkeypatch):
    monkeypatch.setitem(loggers._SINKS, "mlflow", Told)
    run = logged_twice("mlflow")
    (run.folder / "ended").unlink()
    monkeypatch.setitem(loggers._SINKS, "csv", Full)
    with pytest.raises(OSError, match="No space left"), MetricsLog(run, loggers=["mlflow", "csv"], begin=8):
        raise FloatingPointError("a loss is not finite")
    assert (run.folder / "ended").read_text() == "failed"


def test_a_training_writes_its_loggers(shapes_store, shapes_root, with_settings, tmp_path):
    asked = ("csv", "tensorboard") if loggers.find_spec("tensorboard") else ("csv",)
    config = with_settings(train={"loggers": asked, "steps": 2})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, data_root=shapes_root)
    run = train(request)
    with (run.folder / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.read_metrics()
    assert len(rows) == 2
    assert (run.folder / "tensorboard").is_dir() == ("tensorboard" in asked)
    # It goes on with other ones: nothing that is learned depends on them.
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, loggers=()))
    assert train(dataclasses.replace(request, config=again)).began_at == 2


@pytest.mark.parametrize("logger", ["mlflow", "tensorboard", "wandb"])
def test_an_extra_that_is_missing_is_named_before_anything_is_made(
    shapes_store, with_settings, tmp_path, monkeypatch, logger
):
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    config = with_settings(train={"loggers": ("csv", logger)})
    with pytest.raises(ConfigError, match=rf"^`train.loggers`: {logger} is not .*; pip install 'ezsd\[{logger}\]'$"):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))
    assert not (tmp_path / "run").exists()
    require_loggers(["csv"])


def test_the_option_is_the_setting():
    tables = {"train": {}}
    (override,) = loggers_override("tensorboard, csv")
    apply_override(tables, override)
    assert tables == {"train": {"loggers": ["tensorboard", "csv"]}}
    assert loggers_override(None) == []
    with pytest.raises(ArgumentError, match="--log csv,tensorbored: no logger 'tensorbored'; known are csv, mlflow"):
        loggers_override("csv,tensorbored")


def test_a_record_with_the_former_setting_is_read(with_settings):
    assert with_todays_names({"train": {"tensorboard": True}}) == {"train": {"loggers": ["tensorboard"]}}
    assert with_todays_names({"train": {"tensorboard": False}}) == {"train": {"loggers": []}}
    with pytest.raises(ConfigError, match="a logger is in the list twice"):
        with_settings(train={"loggers": ("csv", "csv")})
