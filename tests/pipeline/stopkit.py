"""Real commands in real processes, and real signals."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from typer.testing import CliRunner

from ezsd.cli import app
from tests.commandkit import Begun

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 250
RUNNING = []
"""Commands that `started` and `begun` have begun."""


def started(*words, own_group=True, env=None, python=(), stdout=subprocess.PIPE):
    """An `ezsd` command, by default in a process group of its own, as a shell starts it."""
    process = subprocess.Popen(
        [sys.executable, *python, "-m", "ezsd", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0 if own_group else None,
    )
    RUNNING.append(process)
    return process


def begun(*words, **environment):
    """An `ezsd` command that has loaded everything, for what comes after; in a process group of its own too."""
    process = Begun(*words, **environment)
    RUNNING.append(process)
    return process


def end_all():
    """Kill the commands that a failed test has left."""
    while RUNNING:
        process = RUNNING.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


class Talk:
    """What a command says on standard error, line by line as it comes."""

    def __init__(self, process):
        self.process, self.lines = process, []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        self.lines.extend(iter_lines(self.process.stderr, self.lines))

    def wait_for(self, done):
        """Until something is the case; the command must be alive until then."""
        until = time.monotonic() + WAIT_SECONDS
        while not done():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < until, self.text
            time.sleep(0.02)

    def end(self):
        """Exit code and all that was said."""
        code = self.process.wait(WAIT_SECONDS)
        self._thread.join(WAIT_SECONDS)
        self.process.stderr.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code, self.text

    @property
    def text(self):
        return "".join(self.lines)


def iter_lines(stream, lines):
    for line in stream:
        lines.append(line)
    return ()


def descendants(process):
    """Processes started by a process, and by those."""
    # Each thread has those that it started.
    children = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += [int(child) for child in thread.read_text().split()]
    return children + [deeper for child in children for deeper in descendants(child)]


def alive(process):
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def require_gone(family):
    """Every process of a family ends."""
    until = time.monotonic() + WAIT_SECONDS
    while left := [member for member in family if alive(member)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def loads_libraries(process):
    """Whether the command itself is at work: no library is loaded before."""
    return "_multiarray" in Path(f"/proc/{process.pid}/maps").read_text()


def stands_still(process):
    """Whether it has stopped itself at the failpoint that it was given."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stopped_at(failpoint, *words):
    """Exit code and words of a command at which Ctrl-C is pressed at a failpoint."""
    process = begun(*words, EZSD_FAILPOINT=failpoint, EZSD_FAILSIGNAL="SIGSTOP")
    talk = Talk(process)
    talk.wait_for(lambda: stands_still(process))
    press_ctrl_c(process)
    os.killpg(process.pid, signal.SIGCONT)
    return talk.end()


def require_stopped(ended, kept):
    """A command ended by Ctrl-C says so at once, then what is kept and what to type, and nothing else of it."""
    code, said = ended
    assert code == 130, said
    own = [line for line in said.splitlines() if line.startswith(("ezsd: ", "SIG"))]
    assert own == ["SIGINT: stopping; Ctrl-C again to stop at once", f"ezsd: stopped by SIGINT: {kept}"], said
    assert said.endswith(f"{own[-1]}\n"), said
    assert "Traceback" not in said


def run_again(*words):
    """The same command once more, to its end, in this process: to load torch anew would cost seconds."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def press_ctrl_c(process):
    """SIGINT to the whole process group, as a terminal does it."""
    os.killpg(process.pid, signal.SIGINT)
