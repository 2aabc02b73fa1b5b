"""Python programs in processes of their own, which are forks of one that has loaded torch and its company.

Each is a process as any other, but begins seconds of a core sooner: for tests of what comes after.
"""

import multiprocessing
import os
import runpy
import sys

import dask

from tests.faults.faultkit import in_network


class Fork:
    """`python WORDS...`, or `python -m WORDS...`, in a folder, an environment and, if named, a network namespace."""

    def __init__(self, words, folder, environment, *, output=os.devnull, network=None):
        context = multiprocessing.get_context("forkserver")
        words = [str(word) for word in words]
        self._process = context.Process(target=_become, args=(words, str(folder), environment, str(output), network))
        self._process.start()

    def poll(self):
        """Exit code, negative for a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=None):
        """Exit code, once it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it runs for more than {timeout} s"
        return self._process.exitcode

    def kill(self):
        self._process.kill()


def _become(words, folder, environment, output, network):
    if network is not None:
        in_network(network)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    said = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # It has read the variables of the process that this one is a fork of.
    dask.config.refresh()
    sys.argv = words
    run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
    run(words[0], run_name="__main__", **({} if words[0].endswith(".py") else {"alter_sys": True}))
