"""Faults of the system for one real process: locks and flushes refused, limits, small disks, lost rights.

`commandkit.ezsd(..., faults=[[NAME, ARGUMENT...], ...])` has each called in the command's own process before it begins.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_CALLS = {"x86_64": {"fcntl": 72, "read": 0}, "aarch64": {"fcntl": 25, "read": 63}}
"""Numbers of system calls."""
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_SET_LOCK = 6
_NEW_NAMESPACE, _NEW_NETWORK = 0x20000, 0x40000000
_FROM_FILES, _CAPABILITIES = 1 << 1 | 1 << 2, 0x20080522
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; the version of capget and capset."""


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def no_locks(name="ENOLCK"):
    """The kernel refuses record locks, as on a network disk whose lock service is down."""
    load, equal, end = 0x20, 0x15, 0x06
    steps = [
        (load, 0, 0, 0),
        (equal, 0, 3, _CALLS[platform.machine()]["fcntl"]),
        # The low half of the second argument.
        (load, 0, 0, 24),
        (equal, 0, 1, _SET_LOCK),
        (end, 0, 0, 0x00050000 | getattr(errno, name)),
        (end, 0, 0, 0x7FFF0000),
    ]
    program = _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("prctl", _SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)


def require_refusable_locks():
    """Skip the test where the kernel cannot be told to refuse locks."""
    machine = platform.machine()
    if machine not in _CALLS:
        pytest.skip(f"no numbers of system calls are known for {machine}")
    process = os.fork()
    if process == 0:
        try:
            no_locks()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        pytest.skip("the kernel lets nobody filter system calls here (seccomp)")


def no_folder_flush(name="EINVAL"):
    """Folders cannot be flushed, as on some FUSE and CIFS mounts."""
    flush = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        flush(handle)

    os.fsync = refuse


def limit(name, value):
    """One of the system's limits, such as RLIMIT_FSIZE (bytes) or RLIMIT_NOFILE."""
    resource.setrlimit(getattr(resource, name), (value, value))


def without_rights():
    """Root obeys the modes of files like anybody else."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()
    _call("capget", header, sets)
    for place in range(3):
        sets[place] &= ~_FROM_FILES
    _call("capset", header, sets)


def no_look_at_shared_memory():
    """A training begins to read without a look at the room in shared memory."""
    import ezsd.pipeline.training.dataloader

    ezsd.pipeline.training.dataloader._require_shared_memory = lambda *_: None


def little_memory_for_a_step(room):
    """A training's step may take so many bytes of addresses more than it finds taken."""
    from ezsd.pipeline.training.trainer import Trainer

    step = Trainer.step

    def narrow(self, batches, number):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + room, -1))
        return step(self, batches, number)

    Trainer.step = narrow


def save_the_proposer_at_every_step():
    """A build keeps the state of the network that it trains after every step, instead of every few minutes."""
    import ezsd.pipeline.extraction.proposer

    ezsd.pipeline.extraction.proposer.SAVE_SECONDS = 0


def save_checkpoints(folder):
    """Save one checkpoint of a run after another, and say each on standard output, until somebody ends that."""
    import torch

    from ezsd.pipeline.runs.run import Run

    run, step = Run(Path(folder)), 0
    model = torch.nn.Linear(64, 64)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    while True:
        step += 1
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, step)
        run.save(step, model, optimiser)
        print(step, flush=True)  # noqa: T201 - read by whoever kills it


def in_network(name):
    """See the network of a namespace that `ip netns add` has made, and no other."""
    handle = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    _call("setns", handle, _NEW_NETWORK)
    os.close(handle)


def inside(process):
    """See the disks that a process sees: those of a `small_disk`."""
    handle = os.open(f"/proc/{process}/ns/mnt", os.O_RDONLY)
    here = Path.cwd()
    _call("setns", handle, _NEW_NAMESPACE)
    os.close(handle)
    os.chdir(here)


def _call(name, *arguments):
    if getattr(_LIBC, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class SmallDisk:
    """A tmpfs of its own mount namespace, which goes with the process that holds it."""

    def __init__(self, folder, process):
        self.folder, self._process = folder, process
        self.seen = Path(f"/proc/{process}/root{folder}")
        """The disk, as this process sees it."""
        self.faults = [["inside", process]]

    def remount(self, options):
        command = ["nsenter", "-t", str(self._process), "-m", "mount", "-o", f"remount,{options}", str(self.folder)]
        subprocess.run(command, check=True)


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of `size` (as mount takes it) on a folder; skips the test where nothing may be mounted."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("mounting a small disk needs root, unshare and nsenter")
    folder.mkdir(exist_ok=True)
    script = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && exec cat'
    command = ["unshare", "-m", "sh", "-c", script, "sh", size, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"cannot mount here: {holder.stderr.read().strip()}")
        yield SmallDisk(folder, holder.pid)
