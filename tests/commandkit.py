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
    "ezsd.pipeline.console.arguments",
    "ezsd.pipeline.console.store_messages",
    "ezsd.pipeline.training.train",
    "distributed",
    "fsspec.implementations.local",
    "open_clip",
    "zarr",
    # Typer loads these when it first reads a command line, which takes as long as all the rest of a small command.
    "pydantic.fields",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "pydantic.types",
    "zoneinfo",
    # Progress bars.
    "rich.progress",
    "rich.spinner",
    # Charts of a report.
    "matplotlib.backends.backend_svg",
)
_lock = threading.Lock()
_servers = []


def ezsd(*words, cwd=None, timeout=240, faults=(), **environment):
    """Run a command to its end: exit code, standard output and standard error, as `subprocess.run` gives them.

    `faults`: names of functions of tests/faults/faultkit.py with their arguments, called in the command's process.
    """
    with _lock:
        server, process, *ends = _ask(words, cwd, faults, environment)
        texts = ["", ""]
        readers = [threading.Thread(target=_read, args=(end, texts, n)) for n, end in enumerate(ends)]
        for reader in readers:
            reader.start()
        server.settimeout(timeout)
        try:
            code = int(server.recv(64))
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            server.settimeout(None)
            server.recv(64)
            raise subprocess.TimeoutExpired(words, timeout, *texts) from None
        except BaseException:
            # Its exit code would be taken for the next command's process.
            os.kill(process, signal.SIGKILL)
            _servers.remove(server)
            server.close()
            raise
        server.settimeout(None)
        for reader in readers:
            reader.join()
    return subprocess.CompletedProcess(words, code, *texts)


class Begun:
    """A command that has begun, in a process group of its own as a shell starts it; used as a `subprocess.Popen` is.

    No other command begins before it has ended.
    """

    def __init__(self, *words, cwd=None, faults=(), **environment):
        self.args, self.returncode = words, None
        _lock.acquire()
        try:
            self._server, self.pid, out, err = _ask(words, cwd, faults, environment, own_group=True)
        except BaseException:
            _lock.release()
            raise
        self.stdout, self.stderr = os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8")
        self._ending = threading.Thread(target=self._await)
        self._ending.start()

    def _await(self):
        self.returncode = int(self._server.recv(64))
        _lock.release()

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._ending.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _ask(words, cwd, faults, environment, *, own_group=False):
    """Have the server begin a command: the server, the command's process, and its two outputs to be read."""
    server = _server()
    out, err = os.pipe(), os.pipe()
    request = {"words": [str(word) for word in words], "cwd": str(cwd or ROOT), "faults": faults, "group": own_group}
    request["environment"] = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    socket.send_fds(server, [json.dumps(request).encode()], [out[1], err[1]])
    os.close(out[1])
    os.close(err[1])
    return server, int(server.recv(64)), out[0], err[0]


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
    from PIL import Image

    torch.set_num_threads(1)
    # Its readers of all formats.
    Image.init()
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
        for stream in streams:
            os.close(stream)
        asking.send(str(process).encode())
        asking.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())


def _become(request, out, err):
    """Be the command, in this process."""
    from ezsd import cli

    if request["group"]:
        os.setpgid(0, 0)
        # A shell has Ctrl-C ignored by what it starts in the background, as these tests may be.
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
    # Python reads it when it starts, which this process has done long ago.
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [folder for folder in folders if folder and folder not in sys.path]
    for name, *arguments in request["faults"]:
        getattr(import_module("tests.faults.faultkit"), name)(*arguments)
    sys.argv = ["ezsd", *request["words"]]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # As Python ends, but for the last part, which takes half a second of a core to free what torch has loaded.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
