"""`ezsd` commands in processes of their own which start at once: forks of one process that has loaded everything.

Loading torch and its company takes a command seconds, and the tests run hundreds of commands. A fork is as much of a
process as any: its own memory, folder, environment, streams and exit. What happens while a command loads (which
modules, which streams, which signals) is for tests that start Python itself.
"""

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOADED = (
    "ezsd.cli",
    "ezsd.pipeline.audit",
    "ezsd.pipeline.console.audit_messages",
    "ezsd.pipeline.extraction.build",
    "ezsd.pipeline.data.check",
    "ezsd.pipeline.console.defaults",
    "ezsd.pipeline.extraction.commit",
    "ezsd.pipeline.demo",
    "ezsd.pipeline.inference.detect",
    "ezsd.pipeline.inference.evaluate",
    "ezsd.pipeline.inference.evaluation_tables",
    "ezsd.pipeline.extraction.forecast",
    "ezsd.pipeline.extraction.repair",
    "ezsd.pipeline.report",
    "ezsd.pipeline.look",
    "ezsd.pipeline.view",
    "ezsd.pipeline.console.store_messages",
    "ezsd.pipeline.training.train",
    "distributed",
    "open_clip",
    "zarr",
)
_lock = threading.Lock()
_servers = []


def ezsd(*words, cwd=None, timeout=240, faults=(), meanwhile=lambda process: None, **environment):
    """Run a command to its end: exit code, standard output and standard error, as `subprocess.run` gives them.

    `faults`: names of functions of tests/faults/faultkit.py with their arguments, called in the command's process.
    `meanwhile` is called with the command's process once it is there.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    words = [str(word) for word in words]
    with _lock:
        server = _server()
        out, err = os.pipe(), os.pipe()
        request = json.dumps({"words": words, "cwd": str(cwd or ROOT), "environment": environment, "faults": faults})
        socket.send_fds(server, [request.encode()], [out[1], err[1]])
        os.close(out[1])
        os.close(err[1])
        texts = ["", ""]
        readers = [threading.Thread(target=_read, args=(end[0], texts, n)) for n, end in enumerate((out, err))]
        for reader in readers:
            reader.start()
        process = int(server.recv(64))
        meanwhile(process)
        server.settimeout(timeout)
        try:
            code = int(server.recv(64))
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            server.settimeout(None)
            server.recv(64)
            raise subprocess.TimeoutExpired(words, timeout, *texts) from None
        server.settimeout(None)
        for reader in readers:
            reader.join()
    return subprocess.CompletedProcess(words, code, *texts)


def _read(end, texts, number):
    with open(end, encoding="utf-8") as stream:
        texts[number] = stream.read()


def _server():
    if not _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from tests.commandkit import serve; serve({theirs.fileno()})"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        _servers.append(ours)
        atexit.register(_end, ours, process)
    return _servers[0]


def _end(server, process):
    server.close()
    process.wait()


def serve(number):
    """Fork for each command, and say how it ended. Ends with whoever asks."""
    for name in LOADED:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    # Nothing that a collection would write to is shared from here on.
    gc.freeze()
    # A second thread would not be there in a fork, and what it held would stay locked.
    assert len(os.listdir("/proc/self/task")) == 1
    asking = socket.socket(fileno=number)
    while True:
        data, streams, _, _ = socket.recv_fds(asking, 2**20, 2)
        if not data:
            return
        process = os.fork()
        if process == 0:
            asking.close()
            _become(json.loads(data), *streams)
            return
        for stream in streams:
            os.close(stream)
        asking.send(str(process).encode())
        asking.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())


def _become(request, out, err):
    """Be the command, in this process."""
    from ezsd import cli

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, *arguments in request["faults"]:
        getattr(import_module("tests.faults.faultkit"), name)(*arguments)
    sys.argv = ["ezsd", *request["words"]]
    cli.main()
