"""Files in a store's folder that no store needs: what a killed build left, and what strayed in."""

import os
from pathlib import Path

from cache.durable import BuildLock, discard
from cache.journal import journal_folder, scratch_folder
from cache.mark import LOCK, read_incomplete, read_mark, relative_files
from cache.place import unfinished_plan
from cache.verify import stray_files


def collect(path: str | os.PathLike[str]) -> dict[str, int]:
    """Remove what neither the store nor a build that may go on needs; returns its files and their bytes.

    Of a finished store that is the journal and every file that its commit mark does not list, but for the record of
    its environment and its log; of an unfinished one, pieces of work that were not finished.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: no store, or a build is at work in it.
    """
    store = Path(path).absolute()
    mark = read_mark(store) or read_incomplete(store)
    if mark is None:
        # Refuses what is no build, before a lock file would be put there.
        unfinished_plan(store)
    lock = BuildLock(store / LOCK)
    try:
        folder = scratch_folder(store) if mark is None else journal_folder(store)
        names = [f"{folder.relative_to(store).as_posix()}/{name}" for name in relative_files(folder)]
        if mark is not None:
            names += [found.name for found in stray_files(store, mark)]
        sizes = {name: (store / name).stat().st_size for name in names}
        for name in names:
            discard(store / name)
        discard(folder)
        discard(store / LOCK)
    finally:
        lock.release()
    return sizes
