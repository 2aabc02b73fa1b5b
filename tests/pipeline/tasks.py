"""Tasks of worker processes, in a module that costs them nothing to load."""

import os
import time


def visible(_):
    # Long enough for the other worker to take the other item.
    time.sleep(0.5)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def fail_or_wait(item):
    if item == 0:
        raise ValueError("of the first")
    time.sleep(1000)


def call_trees(_):
    """Whether Dask's worker has begun to keep call trees of what it does."""
    from distributed import get_worker

    return "profile-cycle" in get_worker().periodic_callbacks
