"""`make gpu-check` without a GPU: what is right is accepted, one broken thing refuses, the table comes all the same."""

import contextlib
import dataclasses
import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commandkit import ezsd
from tests.kernels import stand_ins
from tests.pretend_gpu import GPU, pretend_gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEMO = """
AP50        base  novel    all
distilled   81.0   86.0   83.0
plain       80.0    4.0   53.0
"""
CASES = "... [100%]\n3 passed in 9.99s\n"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_check")


@pytest.fixture
def commands(gpu_check):
    """Commands that end well and print what is looked for; keeps what was run."""

    class Commands(list):
        texts = {"pytest": CASES, "demo": DEMO}

        def __call__(self, words, seconds=0):
            self.append([str(word) for word in words])
            return gpu_check.Done(0, next((text for name, text in self.texts.items() if name in self[-1]), "a row\n"))

        def __contains__(self, name):
            return any(word.endswith(name) for words in self for word in words)

    return Commands()


@pytest.fixture
def check(gpu_check, commands, tmp_path):
    sizes = dataclasses.replace(gpu_check.SMALL, batches=1, step_images=1, steps=1, judged=True)
    return gpu_check.Check(device=GPU, work=tmp_path, results=tmp_path, sizes=sizes, command=commands)


def named(gpu_check, *names):
    return [section for section in gpu_check.SECTIONS if section.name in names]


KERNELS, STEP, STAGE = "kernels against float64", "training step against the CPU", "stage one against the CPU"
SPEED, TABLE = "waits, speed and memory of a step", "table of the kernels"


def test_a_pretend_gpu_is_accepted(gpu_check, check, commands, shapes_root, monkeypatch, capsys):
    stage = importlib.import_module("gpu_check_stage")
    monkeypatch.setattr(stage, "write_shapes", lambda out, **_: shutil.copytree(shapes_root, out))
    # The shortest training whose last round is not its first.
    monkeypatch.setattr(importlib.import_module("gpu_check_step"), "ROUND", 2)
    check = dataclasses.replace(check, sizes=dataclasses.replace(check.sizes, fall=4))
    sections = named(gpu_check, "environment", KERNELS, STEP, STAGE, "demo", "several GPUs", SPEED, TABLE)
    with pretend_gpu():
        verdict = gpu_check.judge(check, sections)
    found = verdict.sections
    assert str(verdict) == "accepted", verdict
    assert {name: one["state"] for name, one in found.items() if one["state"] != "ok"} == {"several GPUs": "skipped"}
    assert found["environment"]["capability"] == "9.0"
    assert found[KERNELS]["passed"] == 3
    # 16 bits round, and the GPU crops otherwise.
    assert 0 < found[STEP]["compared"]["fast"]["terms as trained"]["median"] < 3e-2
    assert found[STAGE]["crops"]["worst_levels"] == 2
    assert found[STAGE]["regions"]["same"] >= 0.98
    assert found["demo"]["AP50"]["plain"]["novel"] == 4.0
    assert 1 <= found[SPEED]["waits_per_step"] <= 3
    assert "benchmarks/kernel.py" in commands
    assert f"{STEP}: ok" in capsys.readouterr().out.splitlines()
    json.dumps(found)


def shifted_backward(*dtypes):
    """A kernel that is wrong in some types."""

    def backward(pooling, pooled_grad, boxes, image_index):
        stand_ins.pool_backward(
            dataclasses.replace(pooling, maps=tuple(one.inner for one in pooling.maps)),
            pooled_grad.inner,
            boxes.inner + 2 * (pooled_grad.dtype in dtypes),
            image_index.inner,
        )

    return backward


@pytest.mark.parametrize(
    ("dtypes", "what"),
    [((torch.float32, torch.bfloat16), "gradients in float32"), ((torch.bfloat16,), "gradients as trained")],
)
def test_one_broken_kernel_refuses_the_machine_and_the_table_comes(gpu_check, check, commands, dtypes, what):
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ezsd.kernels.triton_pool.pool_backward", shifted_backward(*dtypes))
        verdict = gpu_check.judge(check, named(gpu_check, STEP, TABLE))
    assert str(verdict).startswith(f"refused: {STEP}: head fast: {what}: ")
    assert verdict.sections[TABLE]["state"] == "ok"
    assert "benchmarks/kernel.py" in commands


def test_a_gpu_that_is_lost_is_asked_no_more_and_other_processes_are(gpu_check, check, commands, monkeypatch, capsys):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(_):
        monkeypatch.setattr(gpu_check, "answers", lambda device: False)
        monkeypatch.setattr(torch.cuda, "empty_cache", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nat line 3")

    sections = [gpu_check.Section("first", fail), gpu_check.Section("second", lambda _: {}), *named(gpu_check, TABLE)]
    verdict = gpu_check.judge(check, sections)
    assert verdict.against == [
        "first: RuntimeError: CUDA error: an illegal memory access was encountered",
        "second: not run: the GPU answers no more since 'first'",
    ]
    assert verdict.sections[TABLE]["state"] == "ok"
    assert "benchmarks/kernel.py" in commands
    assert "Traceback" in capsys.readouterr().err


def test_what_is_not_installed_is_named_and_refuses(gpu_check, check):
    section = gpu_check.Section("stage", lambda _: {}, needs=("torch", "a_module_that_is_not"))
    verdict = gpu_check.judge(check, [section])
    assert verdict.sections["stage"]["state"] == "skipped"
    assert "stage: needs a_module_that_is_not, not installed; pip install" in str(verdict)


def test_an_older_gpu_skips_the_kernels_with_a_reason(gpu_check, check, commands):
    with pretend_gpu(capability=(7, 5)):
        verdict = gpu_check.judge(check, named(gpu_check, "environment", KERNELS, TABLE))
    reasons = {name: one.get("reason", "") for name, one in verdict.sections.items()}
    assert str(verdict) == "accepted"
    assert "capability 7.5" in reasons[KERNELS]
    assert "capability 7.5" in reasons[TABLE]
    assert not commands


def test_a_gpu_with_little_memory_is_refused_for_what_was_not_compared(gpu_check, check):
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**29, 2**34))
        verdict = gpu_check.judge(check, named(gpu_check, STEP, STAGE, SPEED))
    reason = "needs 2 GiB of GPU memory, 0.5 are free"
    assert verdict.against == [f"{STEP}: {reason}", f"{STAGE}: {reason}"]
    # Figures alone refuse nothing.
    assert verdict.sections[SPEED]["state"] == "skipped"


def test_a_gpu_that_triton_cannot_launch_on_keeps_its_figures(gpu_check, check, monkeypatch, capsys):
    def fail(*_):
        raise gpu_check.BackendError("Triton cannot launch a kernel")

    monkeypatch.setattr(gpu_check, "require_backend", fail)
    with pretend_gpu():
        verdict = gpu_check.judge(check, named(gpu_check, "environment"))
    assert str(verdict) == "refused: environment: Triton cannot launch a kernel"
    assert verdict.sections["environment"]["gpu"] == "pretend GPU"
    assert "    capability: 9.0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("pytest", "FAILED tests/kernels/gpu_cases.py::test_x[a-1]\n1 failed, 3 passed in 2s\n", 1, "test_x[a-1]"),
        ("pytest", "no module named pytest\n", 1, "pytest ended with 1"),
        ("pytest", "no tests ran in 0.1s\n", 0, "ran no case"),
        ("pytest", "SKIPPED [1] a.py:9: needs 6 GiB\n3 passed, 1 skipped in 2s\n", 0, "skipped: needs 6 GiB"),
        ("demo", DEMO.replace("86.0", "60.0"), 0, "AP50 of distilled novel is 60.0"),
        ("demo", DEMO.replace(" 4.0", "44.0"), 0, "AP50 of plain novel is 44.0"),
        ("demo", "no scores\n", 0, "printed no AP50"),
        ("demo", "ezsd: something\n\n", 2, "ezsd demo ended with 2: ezsd: something"),
    ],
)
def test_what_a_command_finds_wrong_refuses(gpu_check, check, name, text, code, said):
    check.command = lambda words, seconds=0: gpu_check.Done(code, text)
    verdict = gpu_check.judge(check, named(gpu_check, KERNELS if name == "pytest" else name))
    assert said in str(verdict)
    assert str(verdict).startswith("refused: ")


def test_commands_show_what_they_print_and_end_in_time(gpu_check, capsys):
    done = gpu_check.command(["-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.code, sorted(done.text.split())) == (3, ["err", "out"])
    assert "    out\n" in capsys.readouterr().out


# As torchrun: its processes are in sessions of their own, write where it does, and end when it is asked to end.
LAUNCHER = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
if sys.argv[1] == "asks":
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), child.wait(), print("asked", flush=True), sys.exit(1)))
if sys.argv[1] == "refuses":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] != "is gone":
    time.sleep(60)
"""


@pytest.mark.parametrize("launcher", ["asks", "dies", "refuses", "is gone"])
def test_a_command_ends_in_time_with_its_processes_of_other_sessions(gpu_check, launcher, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    began = time.monotonic()
    done = gpu_check.command(["-c", LAUNCHER, launcher], 2.0)
    assert time.monotonic() - began < 30
    with pytest.raises(gpu_check.Failed, match="killed, after 2 s"):
        done.require("it")
    assert ("asked" in done.text) == (launcher == "asks")
    for process in done.text.split()[:2]:
        # Whoever adopts an orphan may let it be a zombie for a while.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert Path("/proc", process, "stat").read_text().split()[2] in "ZX"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        # As test_scripts.py does with every script.
        pytest.param([BENCHMARKS / "kernel.py", "--help"], 0, "--rounds", marks=pytest.mark.slow),
        (["-m", "pytest", "CASES_ALONE", "tests/kernels/gpu_cases.py"], 2, "needs a GPU"),
    ],
)
def test_what_the_sections_run_starts(gpu_check, words, code, said):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which `make gpu-check` tests")
    words = [part for word in words for part in (gpu_check.CASES_ALONE if word == "CASES_ALONE" else (word,))]
    done = gpu_check.command(words)
    assert done.code == code, done.text
    assert said in done.text


def test_a_run_is_used_and_resumed(gpu_check, check, shapes_root, shapes_store, shapes_run, tmp_path):
    """With the command itself, on the CPU."""

    def command(words, seconds=0):
        done = ezsd(*words[2:])
        return gpu_check.Done(done.returncode, done.stdout + done.stderr)

    demo = tmp_path / "demo"
    (demo / "runs").mkdir(parents=True)
    (demo / "data").symlink_to(shapes_root)
    (demo / "cache").symlink_to(shapes_store)
    shutil.copytree(shapes_run.folder, demo / "runs/distilled")
    here = dataclasses.replace(check, device=torch.device("cpu"), command=command)
    verdict = gpu_check.judge(here, named(gpu_check, "detect, eval --crops, resume"))
    assert str(verdict) == "accepted"
    assert verdict.sections["detect, eval --crops, resume"]["resumed"]["losses_apart"] == 0.0


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_the_verdict_is_the_last_line_the_exit_code_and_a_row(gpu_check, broken, code, monkeypatch, tmp_path, capsys):
    def section(check):
        if broken:
            raise gpu_check.Failed("it is broken")
        return {"figure": 1.5}

    monkeypatch.setattr(gpu_check, "SECTIONS", (gpu_check.Section("one", section),))
    monkeypatch.setattr(gpu_check.judge, "__defaults__", (gpu_check.SECTIONS,))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(tmp_path)])
    with pretend_gpu():
        assert gpu_check.main() == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("refused: one: it is broken" if broken else "accepted")
    row = json.loads((tmp_path / "gpu_check.jsonl").read_text())
    assert (row["device"], row["accepted"]) == ("pretend GPU", not broken)
    assert row["sections"]["one"]["state"] == ("FAILED" if broken else "ok")


def test_without_a_gpu_nothing_is_judged(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(tmp_path)])
    assert gpu_check.main() == 2
    assert "needs a GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_folder_with_old_runs_is_refused(gpu_check, monkeypatch, tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--work", str(tmp_path)])
    with pretend_gpu():
        assert gpu_check.main() == 2
    assert "is no empty folder" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_a_rehearsal_ends_with_0_or_1_and_leaves_no_row(gpu_check, broken, code, monkeypatch, tmp_path, capsys):
    def section(check):
        if broken:
            raise gpu_check.Failed("it is broken")
        return {}

    monkeypatch.setattr(gpu_check.judge, "__defaults__", ((gpu_check.Section("one", section),),))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--results", str(tmp_path)])
    assert gpu_check.main() == code
    assert "accepts no machine" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
