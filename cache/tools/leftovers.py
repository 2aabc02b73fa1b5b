"""Files in a store's folder that no store needs: leftovers of killed builds and copies, and foreign files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ezsd.cache.files import discard
from ezsd.cache.format.commit_mark import (
    ARRIVING,
    LOCK,
    TRANSFER,
    CommitMark,
    read_incomplete,
    read_mark,
)
from ezsd.cache.format.names import files_below, inside, size_of
from ezsd.cache.journal.entries import JOURNAL, lock_store, scratch_folder
from ezsd.cache.storage.locations import unfinished_plan
from ezsd.cache.tools.verify import stray_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """Sizes in bytes of the files found by `collect`, by name inside the store; a folder's name ends with a slash."""

    removed: Mapping[str, int]
    """Removed files; with `dry_run`, those to be removed."""
    kept: Mapping[str, int]
    """Foreign files that were to be kept."""


def collect(path: str | os.PathLike[str], *, strays: bool = False, dry_run: bool = False) -> Leftovers:
    """Remove what ezsd left behind in a store's folder and neither the store nor a build that may go on needs.

    Of a finished store that is all of `journal/` and `.transfer/`, and a `TRANSFER.json`; of an unfinished one, pieces
    of work that were not finished. A link is removed itself, never what it leads to.

    Args:
        path: a store, complete or not.
        strays: remove everything else too that a finished store does not list: files, links and empty folders.
        dry_run: change nothing.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: no store, or a build is at work in it.
    """
    store = Path(path).absolute()
    mark = read_mark(store) or read_incomplete(store)
    if mark is None:
        # Refuses what is no build, before a lock file would be put there.
        unfinished_plan(store)
    if dry_run:
        return _look(store, mark, strays=strays)
    lock = lock_store(store)
    try:
        found = _look(store, mark, strays=strays)
        for name in found.removed:
            _remove(store, name)
        for folder in _own_folders(store, mark):
            discard(folder)
        return found
    finally:
        discard(store / LOCK)
        lock.release()


def _look(store: Path, mark: CommitMark | None, *, strays: bool) -> Leftovers:
    own = {
        f"{folder.relative_to(store).as_posix()}/{name}": size_of(folder / name)
        for folder in _own_folders(store, mark)
        for name in files_below(folder)
    }
    if mark is None:
        return Leftovers(removed=own, kept={})
    foreign = {}
    for name in (damage.name for damage in stray_files(store, mark)):
        size = 0 if name.endswith("/") else size_of(store / name)
        if name == TRANSFER:
            own[name] = size
        elif not name.startswith(f"{ARRIVING}/"):
            foreign[name] = size
    return Leftovers(removed=own | foreign, kept={}) if strays else Leftovers(removed=own, kept=foreign)


def _own_folders(store: Path, mark: CommitMark | None) -> list[Path]:
    """Folders that hold only leftovers; one that is a link belongs to the user."""
    folders = [scratch_folder(store)] if mark is None else [store / JOURNAL, store / ARRIVING]
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _remove(store: Path, name: str) -> None:
    """Remove a file, link or empty folder, and the folders above it that nothing is left in."""
    path = inside(store, name.rstrip("/").rpartition("/")[0] or ".") / Path(name).name
    if name.endswith("/"):
        path.rmdir()
    else:
        path.unlink()
    while (path := path.parent) != store and not any(path.iterdir()):
        path.rmdir()
