"""Copying a complete store to a URL and from one, so that a copy is whole, or refused and gone on with."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ezsd.cache.errors import StoreError
from ezsd.cache.files import (
    FileDigest,
    copied_to,
    discard,
    failpoint,
    file_digest,
    make_folders,
    open_to_read,
    read_bytes,
    read_if_there,
    rename,
    require_can_write,
    require_room,
    scratch_name,
    sync,
    unreadable,
    write_new,
)
from ezsd.cache.format.commit_mark import (
    ARRIVING,
    COMMIT,
    ENVIRONMENT,
    LOCK,
    TRANSFER,
    CommitMark,
    parse_environment,
    parse_mark,
)
from ezsd.cache.format.names import files_below, inside
from ezsd.cache.format.sealed_json import is_sealed
from ezsd.cache.journal.entries import lock_store
from ezsd.cache.reader import Store
from ezsd.cache.storage.remote import RemotePlace
from ezsd.cache.tools.hub import is_repository, not_as_committed, push_to_repository, require_as_committed

_PIECE = 8 * 2**20


def push(store: str | os.PathLike[str], url: str) -> int:
    """Copy a store to a URL; files that are there already with the right bytes are not sent again.

    Those that are there are read and compared with their digests, also in a copy that is complete. Nothing there is
    changed before the files to be sent were compared with theirs.

    Args:
        store: a complete store's folder.
        url: place of the copy, in any file system fsspec can write to.

    Returns:
        Number of listed files that were sent, 1 where it was the mark or the environment record alone; 0 when the copy
        was complete before.

    Raises:
        StoreError: the store is not whole, another one or this very folder is at the URL, or the URL cannot be reached.
    """
    source = Store(store)
    there = RemotePlace(url)
    _require_elsewhere(source.path, there)
    data = read_bytes(source.path / COMMIT)
    mark = parse_mark(data, str(source.path / COMMIT))
    there.stated = mark.files
    # Whatever a file of this name holds, only a record of a build is sent.
    source.environment  # noqa: B018
    environment = read_if_there(inside(source.path, ENVIRONMENT))
    complete, started = _state(there, data)
    if environment is not None and there.read_if_there(ENVIRONMENT) == environment:
        # It is not sent again.
        environment = None
    if is_repository(there):
        return push_to_repository(source.path, there, mark, data, environment, complete=complete)
    good = _present(there, mark)
    missing = [name for name in mark.files if name not in good]
    require_as_committed(source.path, mark, missing)
    if environment is not None:
        there.write_sign(ENVIRONMENT, environment)
    if not complete or missing:
        _send_all(source.path, there, mark, data, missing, complete=complete)
    elif started:
        # Stopped between the last two steps.
        _remove(there, TRANSFER)
    return len(missing) or int(not complete or environment is not None)


def _require_elsewhere(source: Path, there: RemotePlace) -> None:
    """Refuse a target in the store's own folder, and any folder on a system that cannot write to one."""
    if not there.is_folder:
        return
    require_can_write(Path(there.path("")))
    with there.errors():
        is_within = Path(there.path("")).resolve().is_relative_to(source.resolve())
    if is_within:
        raise StoreError(f"{there}: is the folder of the store to be copied, or lies in it; choose another URL")


def _send_all(
    source: Path, there: RemotePlace, mark: CommitMark, data: bytes, missing: Sequence[str], *, complete: bool
) -> None:
    """Send what is missing at the target, which is no store until its mark is written."""
    with there.sending(len(data)):
        there.files.makedirs(there.path(""), exist_ok=True)
    there.write_sign(TRANSFER, data)
    if complete:
        # Nobody opens a copy that is being mended.
        _remove(there, COMMIT)
    send = _send_to_folder if there.is_folder else _send
    for name in missing:
        send(inside(source, name), there, name, mark.files[name])
        failpoint("push.after_file")
    if there.is_folder:
        with there.sending(0):
            for parent in {Path(there.path(name)).parent for name in mark.files}:
                sync(parent)
    # The mark makes it a store: last.
    there.write_sign(COMMIT, data)
    _remove(there, TRANSFER)


def _remove(there: RemotePlace, name: str) -> None:
    with there.errors():
        there.files.rm_file(there.path(name))


def _state(there: RemotePlace, data: bytes) -> tuple[bool, bool]:
    """True for a copy of this very store at the target that says it is complete, and for one that was begun."""
    found = there.read_if_there(COMMIT)
    # One that is damaged is nobody's, and is written again.
    if found is not None and found != data and is_sealed(found):
        raise StoreError(f"{there}: holds another store; choose another URL, or remove that one first")
    started = there.read_if_there(TRANSFER)
    if started is not None and started != data and is_sealed(started):
        raise StoreError(f"{there}: another store is being copied there; choose another URL, or remove what is there")
    return found == data, started is not None


def _present(there: RemotePlace, mark: CommitMark) -> set[str]:
    """Names of the store's files that are at the target with their digests; StoreError for files of somebody else."""
    sizes = there.sizes()
    known = mark.files.keys() | {COMMIT, TRANSFER, ENVIRONMENT}
    foreign = sorted(name for name in sizes.keys() - known if not name.startswith(f"{ARRIVING}/"))
    if foreign:
        raise StoreError(f"{there}: holds {foreign[0]!r}, which is not a file of this store; choose another URL")
    sized = [name for name, expected in mark.files.items() if sizes.get(name) == expected.size]
    return {name for name, found in there.digests(sized) if found == mark.files[name]}


def _send_to_folder(file: Path, there: RemotePlace, name: str, expected: FileDigest) -> None:
    """Copy one file to a folder, in one step: who has the old file open keeps its bytes."""
    with there.sending(expected.size):
        temporary = scratch_name(Path(there.path(ARRIVING)), name.replace("/", "."))
        make_folders(temporary.parent)
        try:
            if write_new(temporary, _pieces_of(file), point="push") != expected:
                raise not_as_committed(file)
            target = Path(there.path(name))
            make_folders(target.parent)
            rename(temporary, target, flush=False)
        finally:
            discard(temporary)


def _send(file: Path, there: RemotePlace, name: str, expected: FileDigest) -> None:
    """Copy one file up; damage to the source is found before the mark could cover it."""
    digest = hashlib.sha256()
    with there.sending(expected.size):
        there.files.makedirs(there.path(name).rpartition("/")[0], exist_ok=True)
        with there.files.open(there.path(name), "wb") as target:
            for piece in _pieces_of(file):
                digest.update(piece)
                target.write(piece)
                failpoint("push.half_written")
    if digest.hexdigest() != expected.sha256:
        raise not_as_committed(file)


def _pieces_of(file: Path) -> Iterator[bytes]:
    """The bytes of a file here; StoreUnreadable names it, whatever it is sent to."""
    try:
        with os.fdopen(open_to_read(file), "rb") as source:
            while piece := source.read(_PIECE):
                yield piece
    except OSError as error:
        raise unreadable(file, error) from error


def pull(url: str, folder: str | os.PathLike[str]) -> int:
    """Copy a store from a URL into a folder; files that are there already with the right bytes are not fetched again.

    Args:
        url: a complete store.
        folder: absent, empty, or an unfinished copy of the same store.

    Returns:
        Number of files that were fetched; 0 when the copy was complete before.

    Raises:
        StoreError: there is no store, a file does not arrive as it was committed, or the folder holds other things.
    """
    there, here = RemotePlace(url), Path(folder).absolute()
    require_can_write(here)
    mark, data = there.committed()
    with copied_to(here, sum(expected.size for expected in mark.files.values())):
        if here.exists() and not here.is_dir():
            raise StoreError(f"{here}: is a file; choose a new folder")
        return 0 if _is_copied(here, data) else _locked_pull(there, here, mark, data)


def _locked_pull(there: RemotePlace, here: Path, mark: CommitMark, data: bytes) -> int:
    make_folders(here)
    lock = lock_store(
        here, busy="another process is copying a store to here; wait for it to end, or choose another folder"
    )
    try:
        # Another copy may have ended between the first look and the lock.
        return 0 if _is_copied(here, data) else _pull(there, here, mark, data)
    finally:
        discard(here / LOCK)
        lock.release()


def _is_copied(here: Path, data: bytes) -> bool:
    """True if this very store is complete in the folder."""
    if not (here / COMMIT).exists():
        return False
    if read_bytes(here / COMMIT) != data:
        raise StoreError(f"{here}: holds another store; choose another folder")
    Store(here)
    return True


def _pull(there: RemotePlace, here: Path, mark: CommitMark, data: bytes) -> int:
    _prepare(here, data)
    missing = {name: expected for name, expected in mark.files.items() if not _is_here(here, name, expected)}
    # The sizes are the other side's word: what cannot fit is not begun.
    require_room(here, sum(expected.size for expected in missing.values()))
    for name, expected in missing.items():
        _fetch(there, here, name, expected)
    environment = there.read_if_there(ENVIRONMENT)
    if environment is not None:
        parse_environment(environment, f"{there}/{ENVIRONMENT}")
        discard(here / ENVIRONMENT)
        write_new(here / ENVIRONMENT, [environment])
    for parent in {inside(here, name).parent for name in mark.files}:
        sync(parent)
    discard(here / ARRIVING)
    rename(here / TRANSFER, here / COMMIT, point="pull_mark")
    return len(missing)


def _prepare(here: Path, data: bytes) -> None:
    """Make the folder the copy of this store, or see that it is."""
    started = here / TRANSFER
    if started.exists():
        if read_bytes(started) != data:
            raise StoreError(f"{here}: holds the unfinished copy of another store; choose another folder")
    elif others := [name for name in files_below(here) if name != LOCK and not name.startswith(f"{ARRIVING}/")]:
        raise StoreError(f"{here}: holds {others[0]!r} but no store; choose an empty or new folder")
    discard(here / ARRIVING)
    make_folders(here / ARRIVING)
    if not started.exists():
        temporary = scratch_name(here / ARRIVING, TRANSFER)
        write_new(temporary, [data])
        rename(temporary, started, point="pull_start")


def _is_here(here: Path, name: str, expected: FileDigest) -> bool:
    file = inside(here, name)
    return file.is_file() and file.stat().st_size == expected.size and file_digest(file) == expected


def _fetch(there: RemotePlace, here: Path, name: str, expected: FileDigest) -> None:
    temporary = scratch_name(here / ARRIVING, name.replace("/", "."))
    try:
        found = write_new(temporary, there.pieces(name), point="pull")
        if found != expected:
            raise StoreError(
                f"{there}/{name}: did not arrive as it was committed ({found.size} bytes, expected {expected.size}; "
                "or its sha256 differs); pull again, and if this stays so the store there is damaged"
            )
        make_folders(inside(here, name).parent)
        rename(temporary, inside(here, name), point="pull", flush=False)
    finally:
        discard(temporary)
