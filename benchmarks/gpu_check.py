"""Is this machine's GPU fit for ezsd? `make gpu-check`, or `python benchmarks/gpu_check.py`.

One call: what the machine has; kernels against float64; a training step and stage one against the CPU; the demo with
detection, evaluation and a resume after it; several processes where there are several GPUs; then waits, speed, memory
and the table of kernel.py. Each section ends with a line, "ok", "FAILED" or "skipped", and a failed one stops none
after it. The last line is "accepted", or "refused" with what failed: exit code 0 or 1, and 2 without a GPU. All of it
is a row of results/gpu_check.jsonl.

`--rehearse` goes through all sections on the CPU, with small sizes, and accepts nothing; exit code 0, or
1 if one failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# cuBLAS reads it when it is first used, and is deterministic only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import driver
import gpu_check_step
import torch
from gpu_check_step import Differs

from ezsd.errors import BackendError
from ezsd.kernels import require_backend
from ezsd.pipeline.doctor import compiler, version_of
from ezsd.precision import has_bfloat16

Row = driver.Row
PACKAGES = ("torch", "torchvision", "triton", "numpy", "zarr", "numcodecs", "dask", "open_clip_torch", "pycocotools")
"""Distributions whose versions are told."""
RUNS_EZSD = ("zarr", "numcodecs", "dask", "open_clip", "pycocotools", "rich", "typer")
"""Modules that the `ezsd` command needs."""
INSTALL = 'pip install -e ".[test]"'
MARGIN = 0.03
"""How far beside the recorded AP50 of seeds the demo may be: devices round differently, and training amplifies it."""
CASES_ALONE = ("--noconftest", "-o", "addopts=", "--import-mode=importlib", "-W", "default", "-q", "-rfsE")
"""Options of pytest: neither the suite's fixtures nor its plug-ins, which need more packages; and what a library warns
of on a GPU refuses none."""
RESUMED = 0.01
"""Largest relative difference of a loss after a resume: a GPU adds in no fixed order."""
SHARED = 0.02
"""Largest relative difference of a parameter's gradient between several processes and one, in 16 bits."""
LONGEST = 1500
"""Seconds that a command may take."""
GRACE = 40
"""Seconds for it to end when it is asked to; torchrun gives its processes 30."""
MARK = "EZSD_GPU_CHECK"
"""Environment variable by which a command's processes are found."""


class Failed(Exception):
    """What a section found to be wrong, and the figures it has all the same."""

    def __init__(self, reason: str, found: Row | None = None) -> None:
        super().__init__(reason)
        self.found = found or {}


class Skipped(Exception):
    """Why a section does not apply to this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is done."""

    batches: int = 5
    images: int = 4
    """Of a batch."""
    fall: int = 20
    """Steps in which the loss has to fall."""
    step_images: int = 16
    """Of the step that is timed."""
    steps: int = 20
    """That are timed."""
    crop: int = 224
    """Side of the compared crops, pixels."""
    shapes: int = 8
    """Images whose regions are compared."""
    photos: int = 12
    """Images by which stage one is timed."""
    search: tuple[str, ...] = ("proposals.search=coarse-to-fine",)
    demo: tuple[str, ...] = ()
    """Settings of the demo other than the preset's."""
    judged: bool = True
    """Whether the demo's AP50 is held against the recorded ones."""
    rounds: int = 50
    """Of the table."""


SMALL = Sizes(
    batches=2,
    images=1,
    fall=8,
    step_images=2,
    steps=2,
    crop=64,
    shapes=2,
    photos=1,
    search=("proposals.search=exhaustive", "proposals.stride=400", "build.batch_size=16"),
    demo=(
        *("adapt.steps=4", "proposer.steps=4", "proposer.max_proposals=10", "proposals.max_regions=4"),
        *("train.steps=6", "train.warmup_steps=2"),
    ),
    judged=False,
    rounds=2,
)


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    text: str
    """What it printed, errors too."""

    def require(self, what: str) -> str:
        """What it printed. Failed says its last line, if it has failed."""
        if self.code:
            last = next((line for line in reversed(self.text.splitlines()) if line.strip()), "it printed nothing")
            raise Failed(f"{what} ended with {self.code}: {last.strip()}")
        return self.text


def command(words: Sequence[object], seconds: float = LONGEST) -> Done:
    """Run Python with these arguments in the repository, show what it prints, and end it after some time."""
    # Nothing that lies where it runs may stand in for a package: -P; so scripts are told where driver.py is.
    folders = [str(driver.ROOT), str(driver.ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-P", *map(str, words)],
        cwd=driver.ROOT,
        env=environment | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=show, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        in_time = ended(process, reader, seconds)
    # In a session of its own, Ctrl-C does not reach it.
    except BaseException:
        end(process, mark)
        raise
    if not in_time:
        end(process, mark)
        reader.join(GRACE)
        return Done(process.returncode or -signal.SIGTERM, "".join([*lines, f"killed, after {seconds:.0f} s\n"]))
    return Done(process.returncode, "".join(lines))


def show(output: IO[str], lines: list[str]) -> None:
    """Print and keep what a command prints, until all of its processes have closed it."""
    with output:
        for line in output:
            print(f"    {line}", end="", flush=True)
            lines.append(line)


def ended(process: subprocess.Popen[str], reader: threading.Thread, seconds: float) -> bool:
    """Whether a command and its output end within some time."""
    began = time.monotonic()
    reader.join(seconds)
    try:
        process.wait(max(seconds - (time.monotonic() - began), 0))
    except subprocess.TimeoutExpired:
        return False
    return not reader.is_alive()


def end(process: subprocess.Popen[str], mark: str) -> None:
    """Ask a command to end, which has torchrun end its processes; then kill what is left, in whatever session it is."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    killed = [handle for left in marked(mark) if (handle := kill(left)) is not None]
    process.wait()
    # A killed process is there for a moment, and has the GPU's memory until it is gone.
    until = time.monotonic() + GRACE
    for handle in killed:
        select.select([handle], [], [], max(until - time.monotonic(), 0))
        os.close(handle)


def kill(process: int) -> int | None:
    """Kill a process. Return a handle that can be read once it has ended; None if it had ended before."""
    try:
        handle = os.pidfd_open(process)
    except OSError:
        # It has ended; or this system has no handles.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return None
    # It may have ended meanwhile; its handle says so.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    return handle


def marked(mark: str) -> list[int]:
    """Processes that have a mark in their environment; also those whose parent is gone."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        # Others' processes are not ours to read, and some end meanwhile.
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@dataclass(kw_only=True)
class Check:
    """What the sections know of the machine."""

    device: torch.device
    work: Path
    results: Path
    sizes: Sizes
    command: Callable[..., Done] = command
    no_triton: str | None = None
    """Why the kernels cannot run on a GPU that they are not for."""
    lost: str | None = None
    """Section after which the GPU answered no more."""

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal."""
        return self.device.type == "cuda"

    def ezsd(self, *words: object, seconds: float = LONGEST) -> str:
        """What an `ezsd` command printed. Failed says that it has failed."""
        return self.command(["-m", "ezsd", *words], seconds).require(f"ezsd {words[0]}")


def environment(check: Check) -> Row:
    """Versions, GPU, driver, compiler; and whether a first kernel runs."""
    found: Row = {"python": sys.version.split()[0], "compiler": compiler(), "driver": driver_version()}
    found |= {name: version_of(name) for name in PACKAGES}
    if not check.on_gpu:
        return found
    free, total = torch.cuda.mem_get_info(check.device)
    found |= {
        "gpu": torch.cuda.get_device_name(check.device),
        "gpus": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(check.device))),
        "bf16": has_bfloat16(check.device),
        "cuda": torch.version.cuda,
        "free_gib": round(free / 2**30, 1),
        "total_gib": round(total / 2**30, 1),
    }
    try:
        require_backend("triton", check.device)
    except BackendError as error:
        if has_bfloat16(check.device):
            raise Failed(str(error), found) from error
        check.no_triton = str(error)
        found["kernels"] = check.no_triton
    return found


def driver_version() -> str | None:
    """Version of the GPU's driver; None where there is none to ask."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0].strip() or None


def kernels(check: Check) -> Row:
    """The operators against float64, in a process of its own."""
    require_triton(check)
    done = check.command(["-m", "pytest", *CASES_ALONE, "tests/kernels/gpu_cases.py"])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", done.text)}
    if done.code:
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.text, re.MULTILINE)
        named = f": {', '.join(failed[:3])}{' and others' if len(failed) > 3 else ''}" if failed else ""
        raise Failed(f"{counts.get('failed', 0)} of the cases failed, pytest ended with {done.code}{named}")
    if not counts.get("passed"):
        raise Failed("pytest ran no case")
    if counts.get("skipped"):
        reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.text, re.MULTILINE)
        raise Failed(f"{counts['skipped']} of the cases were skipped: {'; '.join(reasons)}", dict(counts))
    return counts


def require_triton(check: Check) -> None:
    """Skip what is about the kernels where they cannot run."""
    require_gpu(check)
    if check.no_triton is not None:
        raise Skipped(check.no_triton)


def training_step(check: Check) -> Row:
    """Terms and gradients of both heads against the CPU, then the loss of 20 steps."""
    require_free(check, 2, Failed)
    sizes = check.sizes
    with exact_products():
        compared = gpu_check_step.compare(check.device, count=sizes.batches, images=sizes.images)
    falls = gpu_check_step.falls(check.device, images=sizes.images, steps=sizes.fall)
    return {"compared": compared, "falls": falls}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Context without TF32, which would be no float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def stage_one(check: Check) -> Row:
    """Crops, embeddings and regions against the CPU, and the same bytes twice."""
    import gpu_check_stage

    require_free(check, 2, Failed)
    return {
        "crops": gpu_check_stage.crops(check.device, size=check.sizes.crop),
        "embeddings": gpu_check_stage.embeddings(check.device),
        "regions": gpu_check_stage.regions(check.device, folder(check, "regions"), images=check.sizes.shapes),
    }


def folder(check: Check, name: str) -> Path:
    """A folder of a section's own."""
    found = check.work / name
    found.mkdir(parents=True, exist_ok=True)
    return found


def require_free(check: Check, gib: float, otherwise: type[Failed | Skipped] = Skipped) -> None:
    """Skip a section for which the GPU has too little memory; Failed where a machine is not accepted without it."""
    if not check.on_gpu:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(check.device)[0] / 2**30
    if free < gib:
        raise otherwise(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


def demo(check: Check) -> Row:
    """The whole pipeline, AP50 beside the recorded one."""
    settings = [word for one in check.sizes.demo for word in ("--set", one)]
    text = check.ezsd("demo", "--out", check.work / "demo", "--device", check.device.type, *settings)
    found = scores(text)
    if check.sizes.judged:
        require_recorded(found)
    return {"AP50": found}


def scores(text: str) -> dict[str, dict[str, float]]:
    """AP50 by arm and group, as the demo prints them. Failed if it has not."""
    number = r"\s+(\d+\.\d)"
    found = {
        arm: dict(zip(("base", "novel", "all"), map(float, numbers), strict=True))
        for arm, *numbers in re.findall(rf"^(distilled|plain){3 * number}\s*$", text, re.MULTILINE)
    }
    if found.keys() != {"distilled", "plain"}:
        raise Failed("ezsd demo printed no AP50 of its two runs")
    return found


def recorded() -> dict[str, tuple[float, float]]:
    """Least and largest AP50 of the demo's arms in the rows of the ablation on the shapes, by what it is of."""
    rows = [row for row in driver.read("ablation") if row.get("dataset") == "shapes" and row.get("tag") == "test seeds"]
    ranges = {}
    for name, arm, group in (
        ("distilled base", "ours", "base"),
        ("distilled novel", "ours", "novel"),
        ("plain base", "none", "base"),
        ("plain novel", "none", "novel"),
    ):
        values = [row["AP50"][group] for row in rows if row["arm"] == arm]
        ranges[name] = (min(values), max(values))
    return ranges


def require_recorded(found: dict[str, dict[str, float]]) -> None:
    """Failed says what is below the recorded range; or above it, where nothing was learned of novel names."""
    for name, (low, high) in recorded().items():
        arm, group = name.split()
        value = found[arm][group] / 100
        if value < low - MARGIN or (name == "plain novel" and value > high + MARGIN):
            raise Failed(
                f"demo: AP50 of {name} is {100 * value:.1f}, recorded are {100 * low:.1f} to {100 * high:.1f}, and "
                f"{100 * MARGIN:.0f} points beside that are allowed"
            )


def afterwards(check: Check) -> Row:
    """Detection, evaluation of crops, and a resumed run, after the demo."""
    run, images = check.work / "demo/runs/distilled", check.work / "demo/data/val"
    if not run.is_dir():
        raise Failed("the demo has left no run")
    device = ("--device", check.device.type)
    first = sorted(images.glob("*.png"))[0]
    document = check.ezsd("detect", first, "--run", run, "--classes", "ring,star", "--json", *device)
    check.ezsd("eval", "--run", run, "--crops", *device)
    return {"detect_bytes": len(document), "resumed": resumed(check, device)}


def resumed(check: Check, device: tuple[str, ...]) -> Row:
    """A short run that loses its last checkpoint and makes its last steps again. Failed if their losses are others."""
    from ezsd.pipeline.runs.run import Run

    run, store = check.work / "resumed", check.work / "demo/cache"
    settings = ("--set", "train.steps=6", "--set", "train.checkpoint_every=4", "--set", "train.pseudo_confidence=0")
    words = ("train", "--cache", store, "--run", run, *device, *settings)
    check.ezsd(*words)
    expected = [line["loss"] for line in Run.open(run).read_metrics()]
    shutil.rmtree(run / "checkpoints/step-00000006")
    if "resuming" not in check.ezsd(*words):
        raise Failed("ezsd train began anew, where it had a checkpoint")
    again = [line["loss"] for line in Run.open(run).read_metrics()]
    apart = max(gpu_check_step.relative(*pair) for pair in zip(again, expected, strict=True))
    if not apart <= RESUMED:
        raise Failed(f"a resumed run has losses {again[-2:]} where the unbroken one had {expected[-2:]}")
    return {"losses_apart": apart}


def several(check: Check) -> Row:
    """One step by all GPUs beside one of one process that accumulates as many batches."""
    count = torch.cuda.device_count() if check.on_gpu else 2
    if count < 2:
        raise Skipped("there is one GPU")
    from ezsd.pipeline.runs.run import Run

    # Momentum after one step of SGD is the gradient.
    settings = [
        "train.steps=1",
        f"train.batch_size={2 * count}",
        "train.reference_batch_size=0",
        "train.rng=image",
        "train.optimizer=sgd",
        "train.learning_rate=1e-3",
        "train.pseudo_confidence=0",
    ]

    def words(name: str, *more: str) -> list[object]:
        chosen = [word for one in (*settings, *more) for word in ("--set", one)]
        run = ("--cache", check.work / "demo/cache", "--run", check.work / name, "--device", check.device.type)
        return ["ezsd", "train", *run, *chosen]

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "--"]
    check.command([*launcher, *words("together")], 600).require("torchrun")
    check.command(["-m", *words("alone", f"train.grad_accumulation={count}")], 600).require("ezsd train")
    together, alone = (Run.open(check.work / name).finished().optimiser() for name in ("together", "alone"))
    expected = {name: value for name, value in alone.items() if name.endswith("momentum_buffer")}
    apart = gpu_check_step.of_gradients(together, expected)
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= SHARED:
        raise Failed(
            f"{count} processes have another gradient than one: {worst} by {apart[worst]:.1e}, {SHARED} allowed"
        )
    return {"processes": count, "largest": apart[worst], "of": worst}


def step_speed(check: Check) -> Row:
    """Waits of the host, steps per second and peak memory of a training step."""
    require_gpu(check)
    require_free(check, 4)
    return gpu_check_step.speed(check.device, images=check.sizes.step_images, steps=check.sizes.steps)


def require_gpu(check: Check) -> None:
    """Skip in a rehearsal."""
    if not check.on_gpu:
        raise Skipped("a rehearsal has no GPU")


def crop_speed(check: Check) -> Row:
    """Crops per second of stage one beside those of its encoder."""
    import gpu_check_stage

    require_free(check, 8)
    sizes = check.sizes
    return gpu_check_stage.speed(check.device, folder(check, "crops"), images=sizes.photos, settings=sizes.search)


def table(check: Check) -> Row:
    """The table of kernel.py, whose gates are the operator's; a baseline that fails is a row."""
    if check.no_triton is not None:
        raise Skipped(check.no_triton)
    # A GPU that is lost to this process refuses this too, and may serve another.
    if check.lost is None:
        torch.cuda.empty_cache()
    options = ["--rounds", check.sizes.rounds, "--tag", "gpu-check", "--results", check.results]
    done = check.command([driver.ROOT / "benchmarks/kernel.py", *options])
    done.require("benchmarks/kernel.py")
    return {"lines": done.text.count("\n")}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the check."""

    name: str
    run: Callable[[Check], Row]
    needs: tuple[str, ...] = ()
    """Modules that it cannot do without."""
    in_process: bool = True
    """Whether it uses the GPU itself, and not by other processes."""


SECTIONS = (
    Section("environment", environment),
    Section("kernels against float64", kernels, ("pytest",), in_process=False),
    Section("training step against the CPU", training_step),
    Section("stage one against the CPU", stage_one, RUNS_EZSD),
    Section("demo", demo, RUNS_EZSD, in_process=False),
    Section("detect, eval --crops, resume", afterwards, RUNS_EZSD, in_process=False),
    Section("several GPUs", several, RUNS_EZSD, in_process=False),
    Section("waits, speed and memory of a step", step_speed),
    Section("crops beside the encoder's", crop_speed, RUNS_EZSD),
    Section("table of the kernels", table, in_process=False),
)


@dataclass
class Verdict:
    """What the sections came to."""

    sections: Row = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    """What speaks against the machine, a clause each."""

    def __str__(self) -> str:
        return f"refused: {'; '.join(self.against)}" if self.against else "accepted"


def judge(check: Check, sections: Sequence[Section] = SECTIONS) -> Verdict:
    """Go through the sections and print a line for each."""
    verdict = Verdict()
    for section in sections:
        print(f"{section.name} ...", flush=True)
        began = time.perf_counter()
        state, reason, figures = outcome(section, check)
        verdict.sections[section.name] = {
            "state": state,
            **({"reason": reason} if reason else {}),
            "seconds": round(time.perf_counter() - began, 1),
            **figures,
        }
        if state == "FAILED" or (state == "skipped" and missing(section)):
            verdict.against.append(f"{section.name}: {reason}")
        for name, value in figures.items():
            print(f"    {name}: {value if isinstance(value, str) else json.dumps(value)}")
        print(f"{section.name}: {state}{f' ({reason})' if reason else ''}", flush=True)
    return verdict


def missing(section: Section) -> list[str]:
    """Modules of a section that are not installed."""
    return [name for name in section.needs if importlib.util.find_spec(name) is None]


def outcome(section: Section, check: Check) -> tuple[str, str, Row]:
    """State of a section, why, and its figures."""
    absent = missing(section)
    if absent:
        return "skipped", f"needs {', '.join(absent)}, not installed; {INSTALL}", {}
    if section.in_process and check.lost is not None:
        return "FAILED", f"not run: the GPU answers no more since {check.lost!r}", {}
    found: Row = {}
    try:
        return "ok", "", section.run(check)
    except Skipped as reason:
        return "skipped", str(reason), {}
    except Failed as error:
        reason, found = str(error), error.found
    except Differs as error:
        reason = str(error)
    # Whatever it is, the sections after it have their say.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if section.in_process and check.on_gpu and check.lost is None and not answers(check.device):
        check.lost = section.name
    return "FAILED", reason, found


def answers(device: torch.device) -> bool:
    """Whether a GPU still does something: an illegal access takes it away from its process."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


def main() -> int:
    """Exit code: 0 accepted, 1 refused, 2 no GPU or a folder that is in use; of a rehearsal 1 if a section failed."""
    rehearse = driver.option("--rehearse", action="store_true", help="all sections on the CPU, small; accepts nothing")
    work = driver.option("--work", required=False, help="empty folder of data, stores and runs; else a temporary one")
    arguments = driver.parser(__doc__, work, rehearse, "--note").parse_args()
    if not (arguments.rehearse or torch.cuda.is_available()):
        print("gpu-check needs a GPU, and torch sees none; --rehearse goes through it on the CPU")
        return 2
    if arguments.work and arguments.work.exists() and (not arguments.work.is_dir() or any(arguments.work.iterdir())):
        print(f"--work {arguments.work} is no empty folder: old runs would be judged; name a new one")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        check = Check(
            device=torch.device("cpu") if arguments.rehearse else torch.device("cuda", 0),
            work=(arguments.work or Path(temporary)).absolute(),
            results=Path(temporary) if arguments.rehearse else arguments.results.absolute(),
            sizes=SMALL if arguments.rehearse else Sizes(),
        )
        verdict = judge(check)
    if arguments.rehearse:
        print(f"rehearsed on the CPU, which accepts no machine; {verdict}")
        return 1 if verdict.against else 0
    driver.append("gpu_check", row_of(check, verdict, arguments.note), check.results)
    print(verdict)
    return 1 if verdict.against else 0


def row_of(check: Check, verdict: Verdict, note: str) -> Row:
    """The row that is kept."""
    return {
        "device": torch.cuda.get_device_name(check.device),
        "accepted": not verdict.against,
        "refused_for": verdict.against,
        "sections": verdict.sections,
        "note": note,
    }


if __name__ == "__main__":
    sys.exit(main())
