"""Ctrl-C and SIGTERM: what is done is kept and said, nothing is left running, and the same command goes on."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ezsd.cache import Store
from ezsd.pipeline.config.schema import to_tables
from ezsd.pipeline.interrupts import end_listening, listen
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from tests.commandkit import Begun
from tests.conftest import QUICK as OF_SHAPES
from tests.pipeline.stopkit import (
    WAIT_SECONDS,
    Talk,
    begun,
    descendants,
    end_all,
    loads_libraries,
    press_ctrl_c,
    require_gone,
    require_stopped,
    run_again,
    started,
)

ROOT = Path(__file__).resolve().parents[2]
OF_RUN = [one for one in OF_SHAPES if one.startswith(("model.", "train."))]
OF_STORE = [one for one in OF_SHAPES if one not in OF_RUN]
QUICK = (*OF_STORE, "build.block_images=1")
ENDLESS = ("train.steps=100000", "train.batch_size=2", "train.checkpoint_every=100000")


@pytest.fixture(autouse=True)
def _as_from_a_terminal():
    # A shell has Ctrl-C ignored by what it starts in the background, as these tests may be.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    end_all()


def settings(*values):
    return [word for value in values for word in ("--set", value)]


def checkpoints(run):
    return list((run / "checkpoints").glob("step-*"))


def last_line(text):
    return text.strip().splitlines()[-1]


def test_a_training_told_to_stop_saves_and_the_same_command_goes_on(shapes_store, tmp_path):
    run = tmp_path / "run"
    words = ["train", "--cache", shapes_store, "--run", run, "--device", "cpu"]
    words += settings(*ENDLESS, "train.num_workers=1", "train.checkpoint_minutes=0.0001")
    reached = 0
    for number, ask in ((signal.SIGINT, press_ctrl_c), (signal.SIGTERM, Begun.terminate)):
        process = begun(*words)
        talk = Talk(process)
        talk.wait_for(lambda before=reached: any(int(p.name[5:]) > before for p in checkpoints(run)))
        family = descendants(process.pid)
        ask(process)
        code, said = talk.end()
        assert code == 128 + number, said
        assert said.count(f"{number.name}: stopping after this step; ") == 1, said
        found = re.fullmatch(
            rf"ezsd: stopped by {number.name}: checkpoint of step (\d+) saved; run the same command to go on",
            last_line(said),
        )
        assert found, said
        assert "Traceback" not in said
        assert "worker" not in said
        assert len(family) >= 3, "a server, its tracker and a reader"
        require_gone(family)
        latest = Run.open(run).latest()
        assert latest is not None
        assert latest.step == int(found[1]) > reached
        assert (f"at step {reached}" in said) == bool(reached), said
        reached = latest.step


@pytest.mark.parametrize("resumed", [False, True])
def test_a_training_stopped_before_its_first_step_says_so(resumed, shapes_run, shapes_store, tmp_path):
    run = tmp_path / "run"
    if resumed:
        shutil.copytree(shapes_run.folder, run)
        shutil.rmtree(run / "checkpoints/step-00000006")
    words = ["train", "--cache", shapes_store, "--run", run, "--device", "cpu"]
    words += settings(*OF_RUN)
    process = started(*words)
    talk = Talk(process)
    talk.wait_for(lambda: loads_libraries(process))
    press_ctrl_c(process)
    # Whatever checkpoints are there: they are not gone.
    require_stopped(talk.end(), "no step of this start is done; run the same command again")
    assert "trained; next: ezsd eval" in run_again(*words)
    assert Run.open(run).finished().step == 6


def test_a_training_that_waits_for_its_first_images_says_so_and_the_same_command_begins(
    shapes_root, shapes_store, tmp_path
):
    """An image that is a pipe is waited for like one on a disk that does not answer."""
    root = Path(shutil.copytree(shapes_root, tmp_path / "shapes"))
    os.mkfifo(tmp_path / "pipe")
    for image in (root / "train").iterdir():
        image.unlink()
        image.hardlink_to(tmp_path / "pipe")
    run = tmp_path / "run"
    words = ["train", "--cache", shapes_store, "--run", run, "--data-root", root, "--device", "cpu"]
    words += settings("train.steps=1", "train.warmup_steps=0", "train.batch_size=2", "train.num_workers=1")
    process = begun(*words)
    talk = Talk(process)
    writing = []
    talk.wait_for(lambda: writing or writing.extend(opened_once_read(tmp_path / "pipe")))
    press_ctrl_c(process)
    code, said = talk.end()
    os.close(writing[0])
    assert code == 130, said
    assert last_line(said).endswith("SIGINT: no step is done yet; run the same command to begin again"), said
    assert "Traceback" not in said
    assert not checkpoints(run)
    for image in (root / "train").iterdir():
        image.unlink()
        shutil.copyfile(shapes_root / "train" / image.name, image)
    run_again(*words)
    assert Run.open(run).finished().step == 1


def opened_once_read(pipe):
    """A pipe opened for writing, as soon as somebody reads it."""
    try:
        return [os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)]
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return []


KEPT = {
    "eval": "no figures are kept; run the same command again",
    "detect": "pictures that are drawn stay; run the same command again",
    "report": "no page is written; run the same command again",
    "check": "a check leaves nothing behind; run the same command again",
    "export": "the folder appears when it is whole; run the same command again",
    "verify": "a check leaves nothing behind; run the same command again",
    "build": "run the same command to go on",
    "info": "nothing is begun yet; run the same command again",
}


@pytest.mark.parametrize("command", KEPT)
def test_other_commands_end_with_a_line_and_130_and_the_same_command_goes_on(
    command, shapes_run, shapes_store, shapes_root, tmp_path
):
    image, out = min((shapes_root / "val").iterdir()), tmp_path / "out"
    run = shutil.copytree(shapes_run.folder, tmp_path / "run")
    words = {
        "eval": ["eval", "--run", run],
        "detect": ["detect", image, "--run", run, "--classes", "ring", "--threshold", "0", "--out", f"{out}.png"],
        "report": ["report", "--run", run],
        "check": ["data", "check", "--dataset", "shapes", "--data-root", shapes_root, "--decode"],
        "export": ["cache", "export", shapes_store, "--format", "npz", "--out", out],
        "verify": ["cache", "verify", shapes_store, "--deep"],
        "build": ["cache", "build", "--dataset", "shapes", "--data-root", shapes_root, "--out", out],
        "info": ["cache", "info", shapes_store],
    }[command]
    if command == "build":
        words += ["--device", "cpu", "--scheduler", "sync", "--reuse", shapes_store, *settings(*OF_STORE)]
    if command == "eval":
        (run / "eval.json").unlink()
    made = {"eval": run / "eval.json", "report": run / "report.html", "detect": tmp_path / "out.png"}
    made |= {"export": out, "build": out / "COMMIT.json"}
    before = set(tmp_path.rglob("*"))
    process = started(*words)
    talk = Talk(process)
    talk.wait_for(lambda: loads_libraries(process))
    press_ctrl_c(process)
    require_stopped(talk.end(), KEPT[command])
    assert set(tmp_path.rglob("*")) == before
    run_again(*words)
    assert command not in made or made[command].exists()


@pytest.mark.usefixtures("warm_workers")
def test_a_build_in_several_processes_stops_and_goes_on_to_the_same_store(
    shapes_dataset, shapes_root, shapes_store, tmp_path
):
    out = tmp_path / "store"
    words = ["cache", "build", "--dataset", "shapes", "--data-root", shapes_root, "--out", out, "--device", "cpu"]
    words += ["--workers", "2", *settings(*QUICK)]
    process = begun(*words)
    talk = Talk(process)
    talk.wait_for(lambda: list(out.glob("**/block-*")) or len(descendants(process.pid)) >= 3)
    family = descendants(process.pid)
    press_ctrl_c(process)
    code, said = talk.end()
    assert code == 130, said
    assert re.search(r"SIGINT: \d+ of 12 blocks (is|are) done; run the same command to go on$", last_line(said)), said
    assert "Traceback" not in said
    require_gone(family)
    run_again(*words)
    assert (Store(out).text[1] == Store(shapes_store).text[1]).all()


def test_a_second_command_of_a_process_listens_too():
    for _ in range(2):
        listen()
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        end_listening()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


ALARMS = """
import os, signal, sys, time
from ezsd.pipeline.interrupts import Stopped, listen, stop_listening
if sys.argv[1] == "own":
    signal.alarm(100)
listen()
try:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)
    except BaseException:
        # As a library does that catches everything, after a while; and swallows it.
        time.sleep(0.4)
    time.sleep(1 if sys.argv[1] == "own" else 100)
    print("swallowed")
except Stopped:
    print("raised again")
stop_listening()
print(signal.getsignal(signal.SIGALRM) is signal.SIG_DFL, signal.getitimer(signal.ITIMER_REAL)[0] > 0)
"""


@pytest.mark.parametrize(
    ("alarm", "said"), [("none", ["raised again", "True False"]), ("own", ["swallowed", "True True"])]
)
def test_a_swallowed_signal_comes_again_and_nobodys_alarm_is_touched(alarm, said):
    words = [sys.executable, "-c", ALARMS, alarm]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.stdout.splitlines() == said, done.stderr


EXIT = """
import atexit, os, signal, time
from ezsd.pipeline.interrupts import listen
# Functions that are registered first are called last.
atexit.register(lambda: print(signal.getitimer(signal.ITIMER_REAL)[0] > 0))
listen()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(100)
"""


def test_no_alarm_is_left_when_python_ends_slowly():
    words = [sys.executable, "-c", EXIT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "False\n"), done.stderr


def test_drawing_shapes_leaves_no_folder_and_the_same_command_makes_it(tmp_path):
    words = ["data", "shapes", "--out", tmp_path / "shapes", "--train", 200, "--val", 1]
    process = started(*words)
    talk = Talk(process)
    talk.wait_for(lambda: len(list((tmp_path / ".shapes.partial").glob("train/*.png"))) > 10)
    family = descendants(process.pid)
    press_ctrl_c(process)
    require_stopped(talk.end(), "the folder appears when it is whole; run the same command again")
    assert not (tmp_path / "shapes").exists()
    require_gone(family)
    assert "200 training and 1 validation image," in run_again(*words)
    assert [place.name for place in tmp_path.iterdir()] == ["shapes"]


BUSY = """
import subprocess, sys, time
from ezsd.pipeline.interrupts import finishing, listen, run_commands
if sys.argv[1] == "step":
    with finishing("this step"):
        print("ready", flush=True)
        time.sleep(1000)
else:
    listen()
    # The child says what it hears, and takes its time.
    child = (
        "import time; from ezsd.pipeline.interrupts import finishing\\n"
        "with finishing('its work') as request:\\n"
        "    print('ready', flush=True)\\n"
        "    while not request.signal: time.sleep(0.02)\\n"
        "    time.sleep(float(%r)); print('saved', flush=True)"
    ) % sys.argv[2]
    run_commands([[sys.executable, "-c", child]] * 2, {"PYTHONPATH": "."})
"""


def busy(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", BUSY, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@pytest.mark.parametrize("arguments", [("step",), ("commands", "1000")])
def test_a_second_one_ends_at_once_what_does_not_come_to_an_end(arguments):
    with busy(*arguments) as process:
        for _ in range(len(arguments)):
            assert process.stdout.readline() == "ready\n"
        family = descendants(process.pid)
        press_ctrl_c(process)
        while "Ctrl-C again to stop at once" not in process.stderr.readline():
            assert process.poll() is None
        # A wrapper that tells its child what the terminal has told it already asks no second time.
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert process.poll() is None
        press_ctrl_c(process)
        assert process.wait(WAIT_SECONDS) == 130
        assert "Traceback" not in process.stderr.read()
        require_gone(family)


@pytest.mark.parametrize("ask", [press_ctrl_c, lambda process: process.send_signal(signal.SIGINT)])
def test_commands_that_are_run_finish_whoever_was_told(ask):
    with busy("commands", "0.1") as process:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
        ask(process)
        assert process.wait(WAIT_SECONDS) == 130
        assert process.stdout.read() == "saved\nsaved\n"


def test_a_job_started_to_ignore_ctrl_c_goes_on_ignoring_it(tmp_path):
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from ezsd.pipeline.interrupts import listen; listen(); os.kill(os.getpid(), signal.SIGINT); print('here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("here\n", "")


def test_a_demo_stopped_in_its_trainings_says_so_once_and_goes_on_with_them(
    shapes_root, shapes_store, tmp_path, monkeypatch
):
    # Its trainings are commands of their own, and must be of this tree too.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "demo"
    shutil.copytree(shapes_root, out / "data")
    shutil.copytree(shapes_store, out / "cache")
    # What is drawn already is told by its spec alone: few images pass for the benchmark.
    spec = json.loads((out / "data/shapes.json").read_text())
    (out / "data/shapes.json").write_text(json.dumps({**spec, "train": 500, "val": 250, "seed": 0}))
    words = ["demo", "--out", out, "--device", "cpu"]
    words += settings(*OF_SHAPES, "train.steps=20", "train.batch_size=2", "train.checkpoint_minutes=0.0001")
    process = begun(*words)
    talk = Talk(process)
    runs = [out / "runs/distilled", out / "runs/plain"]
    talk.wait_for(lambda: all(map(checkpoints, runs)))
    family = descendants(process.pid)
    press_ctrl_c(process)
    require_stopped(talk.end(), "what is finished stays; run the same command to go on")
    require_gone(family)
    reached = [Run.open(run).latest().step for run in runs]
    assert 0 < min(reached) < 20
    assert "report: " in run_again(*words)
    assert (runs[0] / "report.html").exists()
    for run, step in zip(runs, reached, strict=True):
        # No step was made twice.
        assert [start["step"] for start in Run.open(run).starts()] == [0, step]


@pytest.mark.parametrize("then", ["raise ImportError('numpy._core failed to import')", "while True: signal.pause()"])
def test_a_library_that_catches_the_stop_does_not_keep_it(then):
    """As torch does when it is loaded: it goes on without numpy, or stumbles over that."""
    code = (
        "import os, signal\n"
        "from ezsd.pipeline.interrupts import Stopped, keeping, listen\n"
        "listen()\n"
        "try:\n"
        "    with keeping('nothing is lost'):\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            while True: signal.pause()\n"
        "        except BaseException:\n"
        "            pass\n"
        f"        {then}\n"
        "except Stopped as stopped:\n"
        "    print(stopped.code, stopped)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "130 stopped by SIGINT: nothing is lost\n"


def test_the_documented_command_trains_with_several_processes_and_stops_after_the_same_step(shapes_store, tmp_path):
    documented = re.search(r"^torchrun (.*)$", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    assert documented is not None
    run = tmp_path / "run"
    words = documented[1].replace("8", "2").replace("cache/coco", str(shapes_store)).split()
    words[words.index("runs/coco")] = str(run)
    words += ["--device", "cpu", *settings(*ENDLESS, "train.rng=image", "train.checkpoint_minutes=0.0001")]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    talk = Talk(process)
    talk.wait_for(lambda: checkpoints(run))
    family = descendants(process.pid)
    press_ctrl_c(process)
    _, said = talk.end()
    require_gone(family)
    found = re.findall(r"^ezsd: stopped by SIGINT: checkpoint of step (\d+) saved; run the same", said, re.MULTILINE)
    assert len(found) == 1, said
    latest = Run.open(run).latest()
    assert latest is not None
    assert latest.step == int(found[0])
    assert [line["step"] for line in Run.open(run).read_metrics()] == list(range(1, latest.step + 1))


def test_checkpoints_by_time_change_nothing_that_is_learned(shapes_run, shapes_store, with_settings, tmp_path):
    config = with_settings(train={"checkpoint_every": 100, "checkpoint_minutes": 1e-6})
    timed = train(TrainRequest(cache=shapes_store, run=tmp_path / "timed", config=config))
    assert sorted(p.name for p in checkpoints(timed.folder)) == ["step-00000005", "step-00000006"]
    ours, theirs = timed.finished().trained(), shapes_run.finished().trained()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    # A run that began without the setting goes on.
    spec = json.loads((timed.folder / "run.json").read_text())
    assert spec["config"] == to_tables(config)
    del spec["config"]["train"]["checkpoint_minutes"]
    (timed.folder / "run.json").write_text(json.dumps(spec))
    assert train(TrainRequest(cache=shapes_store, run=timed.folder, config=config)).began_at == 6
