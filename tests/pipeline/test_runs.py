"""The run folder: whole or refused, whoever else writes to it and whenever the power goes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from ezsd.pipeline.errors import DamagedFile, RunError
from ezsd.pipeline.runs.run import Run, rows_digest

ROOT = Path(__file__).resolve().parents[2]
SPEC = {"names": ["cat", "ox"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": {"train": {"steps": 9}}}
TABLES = {"text": torch.eye(2)}


def model_at(step):
    """A model and its optimiser whose every number says the step."""
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return model, optimiser


def start(folder):
    return Run.create_or_resume(folder, SPEC, TABLES)


def python(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


# One child per place: the children are forked, because importing torch takes longer than all else.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import ezsd.pipeline.runs.run as runs
    from test_runs import model_at
    torch.set_num_threads(1)
    run, calls, trained = runs.Run(Path(sys.argv[1])), [0], model_at(6)

    def dying(function, at):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    at = 0
    while True:
        at += 1
        child = os.fork()
        if child == 0:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_bytes"), (runs.shutil, "rmtree")):
                setattr(owner, name, dying(getattr(owner, name), at))
            run.save(6, *trained)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        newest = run.latest()
        values = {v.item() for t in newest.trained().values() for v in t.flatten()}
        print(at, newest.step, values == {float(newest.step)})
        if status == 0:
            break
        for old in (run.folder / "checkpoints").glob("step-00000006"):
            runs.shutil.rmtree(old)
"""


def test_a_save_killed_anywhere_leaves_the_newest_whole_checkpoint(tmp_path):
    run = start(tmp_path / "run")
    for step in (2, 4):
        run.save(step, *model_at(step))
    printed, _ = python(KILLED, run.folder).communicate(timeout=250)
    places = [line.split() for line in printed.splitlines()]
    assert len(places) > 12
    assert all(whole == "True" for _, _, whole in places)
    steps = [int(step) for _, step, _ in places]
    assert steps[0] == 4
    assert steps[-1] == 6
    assert steps == sorted(steps), "once it is in place it stays"


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "state", "list"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path, caplog, damage):
    run = start(tmp_path / "run")
    for step in (2, 4):
        run.save(step, *model_at(step))
    newest = run.folder / "checkpoints/step-00000004"
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (newest / "state.json").write_text('{"step": 4' if damage == "state" else "[4]")
    assert run.latest().step == 2
    assert f"{newest}: damaged, passed over" in caplog.text
    # Going on from step 2, the damaged one is replaced.
    run.save(3, *model_at(3))
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("names", [["../../secret"], ["{absolute}"], [], None, ["optimiser.safetensors"]])
def test_a_checkpoint_names_no_files_but_its_own(tmp_path, names):
    run = start(tmp_path / "run")
    for step in (2, 4):
        run.save(step, *model_at(step))
    secret = tmp_path / "run/secret"
    secret.write_bytes(b"mine")
    file = run.folder / "checkpoints/step-00000004/state.json"
    state = json.loads(file.read_text())
    if names:
        digest = hashlib.sha256(b"mine").hexdigest()
        extra = {name.format(absolute=secret): digest for name in names}
        state["sha256"] = extra if names == ["optimiser.safetensors"] else {**state["sha256"], **extra}
    else:
        state["sha256"] = names
    file.write_text(json.dumps(state))
    assert run.latest().step == 2


def test_what_no_training_made_stays_in_the_folder_of_checkpoints(tmp_path):
    run = start(tmp_path / "run")
    (tmp_path / "away").mkdir()
    (tmp_path / "away/mine.pt").write_bytes(b"mine")
    folder = run.folder / "checkpoints"
    (folder / "notes.txt").write_text("mine")
    (folder / "best").mkdir()
    (folder / "step-00000001").symlink_to(tmp_path / "away")
    for step in (2, 3, 4):
        run.save(step, *model_at(step))
    assert sorted(p.name for p in folder.iterdir()) == [
        "best",
        "notes.txt",
        "step-00000001",
        "step-00000003",
        "step-00000004",
    ]
    assert (tmp_path / "away/mine.pt").exists()


@pytest.mark.parametrize("gone", [True, False])
def test_tables_that_are_damaged_or_gone_are_named(tmp_path, gone):
    run = start(tmp_path / "run")
    path = run.folder / "tables.safetensors"
    path.unlink() if gone else path.write_bytes(b"{")
    with pytest.raises(RunError, match=r"tables.safetensors: is damaged or gone .*train again"):
        run.embeddings()


def test_a_checkpoint_says_what_it_is_for(tmp_path):
    run = start(tmp_path / "run")
    run.save(4, *model_at(4))
    state = json.loads((run.folder / "checkpoints/step-00000004/state.json").read_text())
    assert state["names"] == ["cat", "ox"]
    assert state["text_sha256"] == "ab"
    assert state["store_digest"] == "cd"
    assert state["config"] == SPEC["config"]


def test_an_average_is_what_is_detected_with_and_not_what_is_trained_on(tmp_path):
    run = start(tmp_path / "run")
    model, optimiser = model_at(4)
    run.save(4, model, optimiser, {name: value * 0 for name, value in model.state_dict().items()})
    latest = run.latest()
    assert not any(value.any() for value in latest.model().values())
    assert all((value == 4).all() for value in latest.trained().values())


LOCKED = """
    import sys
    from pathlib import Path
    from ezsd.pipeline.runs.run import Run
    from test_runs import SPEC, TABLES
    with Run.claim(Path(sys.argv[1]), SPEC, TABLES):
        print("claimed", flush=True)
        sys.stdin.read()
"""


def test_a_second_training_in_the_folder_is_one_clear_line_and_a_dead_one_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    other = python(LOCKED, folder, stdin=subprocess.PIPE)
    assert other.stdout.readline() == "claimed\n"
    claim = Run.claim(folder, SPEC, TABLES)
    with pytest.raises(RunError, match=rf"another training \(process {other.pid} on .*; wait for it"):
        claim.__enter__()
    other.send_signal(signal.SIGKILL)
    other.communicate(timeout=100)
    with Run.claim(folder, SPEC, TABLES) as run:
        assert run.spec == SPEC


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    claim = Run.claim(tmp_path, SPEC, TABLES)
    with pytest.raises(RunError, match="not empty and holds no run"):
        claim.__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


FULL = """
    import resource, signal, sys
    from pathlib import Path
    from ezsd.pipeline.runs.run import Run
    from test_runs import model_at
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    run = Run(Path(sys.argv[1]))
    try:
        run.save(6, *model_at(6))
    except OSError as error:
        print(error)
    print(run.latest().step)
"""


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_there_was(tmp_path):
    run = start(tmp_path / "run")
    run.save(4, *model_at(4))
    printed, _ = python(FULL, run.folder).communicate(timeout=250)
    message, step = printed.splitlines()
    assert "model.safetensors" in message
    assert step == "4"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_an_error(tmp_path):
    run = start(tmp_path / "run")
    (run.folder / "checkpoints").chmod(0o500)
    with pytest.raises(PermissionError, match="checkpoints"):
        run.save(4, *model_at(4))


WHOLE = {
    **SPEC,
    "text_sha256": rows_digest(torch.eye(2).numpy()),
    "store": {"digest": "cd", "manifest": {}},
    "dataset": "shapes",
    "base_count": 1,
    "embed_dim": 2,
    "layer_norms": [],
    "re_normalisation": {},
    "backbone_weights": None,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": []}, "names: expected a list of names"),
        ({"names": ["cat", 3]}, "names: expected a list of names"),
        ({"base_count": 3}, "base_count: expected a number from 1 to 2, found 3"),
        ({"embed_dim": 2**40}, "embed_dim: expected a number from 1 to 65536"),
        ({"store": {"digest": 3}}, "store: expected a digest"),
        ({"layer_norms": [3]}, "layer_norms: expected a list of objects"),
        ({"config": {"train": {}}}, "has no config.train.steps"),
        ({"text_sha256": "ab"}, "holds other text rows than run.json says"),
    ],
)
def test_what_no_run_says_is_refused_and_another_folder_is_trained_in(tmp_path, changes, said):
    def read(folder):
        run = Run.open(folder)
        run.embeddings()
        run.save(9, *model_at(9))
        assert run.finished().step == 9

    Run.create_or_resume(tmp_path / "run", WHOLE | changes, TABLES)
    with pytest.raises(RunError, match=f"{said}.*; train again in another `run` folder$"):
        read(tmp_path / "run")
    Run.create_or_resume(tmp_path / "other", WHOLE, TABLES)
    read(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b'\x20\0\0\0\0\0\0\0{"a":{"dtype":"X","shape":[1],"d'])
def test_tensors_that_are_none_are_refused_though_their_digest_fits(tmp_path, content):
    run = start(tmp_path / "run")
    run.save(9, *model_at(9))
    folder = tmp_path / "run/checkpoints/step-00000009"
    state = json.loads((folder / "state.json").read_text())
    for name in state["sha256"]:
        (folder / name).write_bytes(content)
        state["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    latest = run.latest()
    for read in (latest.model, latest.trained, latest.optimiser):
        with pytest.raises(RunError, match=r"safetensors: is damaged or gone \(.*\); train again in another `run`"):
            read()


@pytest.mark.parametrize("starts", [3, [3], [{"step": "2"}], [{}]])
def test_starts_that_are_none_are_refused(tmp_path, starts):
    run = start(tmp_path / "run")
    (tmp_path / "run/environment.json").write_text(json.dumps({"starts": starts}))
    with pytest.raises(RunError, match="starts: expected a list of objects with a step"):
        run.starts()


@pytest.mark.parametrize("levels", [70, 900])
def test_nests_deeper_than_any_record_are_damage(tmp_path, levels):
    run = start(tmp_path / "run")
    run.save(8, *model_at(8))
    run.save(9, *model_at(9))
    state = tmp_path / "run/checkpoints/step-00000009/state.json"
    nest = "[" * levels + "]" * levels
    state.write_text(state.read_text().replace('"step": 9', f'"step": 9, "nest": {nest}'))
    assert run.latest().step == 8
    (tmp_path / "run/run.json").write_text(f'{{"names": {nest}}}')
    for read in (lambda: Run.open(tmp_path / "run"), lambda: start(tmp_path / "run")):
        with pytest.raises(DamagedFile, match="run.json: is damaged, JSON nested deeper than 64 levels"):
            read()
