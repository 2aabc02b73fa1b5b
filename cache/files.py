"""Files on disk: atomic writes, fsync, sha256, locks, room, errors of the system, failpoints of the tests."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from ezsd.cache.errors import StoreError, StoreUnreadable

fcntl: ModuleType | None
resource: ModuleType | None
# Windows has neither. Stores are read without them.
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import resource
except ImportError:
    resource = None

FAILPOINTS: tuple[str, ...] = (
    "plan.half_written",
    "plan.before_rename",
    "plan.after_rename",
    "whole.half_written",
    "whole.before_rename",
    "whole.after_rename",
    "block.half_written",
    "block.before_rename",
    "block.after_rename",
    "shard.half_written",
    "shard.before_rename",
    "shard.after_rename",
    "record.before_rename",
    "record.after_rename",
    "block.dropped",
    "metadata.before_rename",
    "metadata.after_rename",
    "commit.before_rename",
    "commit.after_rename",
    "journal.half_removed",
    "journal.removed",
)
"""Places where a test can have the process killed, in the order a build reaches them."""

_hits: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Kill this process if EZSD_FAILPOINT asks for it: `name`, or `name:3` for the third time it is reached.

    EZSD_FAILSIGNAL names another signal than SIGKILL, such as SIGSTOP: whoever tests may then send what he likes.
    """
    wanted = os.environ.get("EZSD_FAILPOINT")
    if not wanted:
        return
    _hits[name] = _hits.get(name, 0) + 1
    target, _, hit = wanted.partition(":")
    if target == name and _hits[name] == int(hit or 1):
        os.kill(os.getpid(), signal.Signals[os.environ.get("EZSD_FAILSIGNAL", "SIGKILL")])


_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def disk_room(store: Path, needed: int) -> Iterator[None]:
    """Turn a full disk into a StoreError that names the `needed` bytes; what was finished stays as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreError(
            f"{store}: the disk is full ({error.strerror}): {needed:,} bytes were to be written here, {_free(store):,} "
            "are free; nothing is damaged, make room and run the same command again"
        ) from error


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which may be still to be made."""
    return shutil.disk_usage(folder).free if folder.exists() else _free(folder.parent)


@contextlib.contextmanager
def writable(store: Path) -> Iterator[None]:
    """Turn a folder that cannot be written to into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise StoreError(
            f"{store}: cannot be written to ({error.strerror}); choose another folder: `path=NEW`"
        ) from error


@contextlib.contextmanager
def copied_to(folder: Path, needed: int) -> Iterator[None]:
    """Turn what the system says of files that a copy brings into a folder into a StoreError; `needed` bytes in all."""
    try:
        with disk_room(folder, needed):
            yield
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder}: cannot be read or written ({error.strerror or error}); what has come stays: "
            "mend that and run the same command again, or choose another folder"
        ) from error


def require_room(store: Path, needed: int) -> None:
    """Refuse work that cannot fit on the disk of `store`, before any of it is done."""
    free = shutil.disk_usage(store).free
    if free < needed:
        raise StoreError(
            f"{store}: {needed:,} bytes are still to be written here, but only {free:,} are free; "
            f"make room for {needed - free:,} more and run the same command again"
        )


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    size: int
    sha256: str


def write_unhashed(
    path: Path, parts: Iterable[bytes | memoryview], *, point: str | None = None, flush: bool = True
) -> None:
    """Write a new file and flush it to the disk, or leave that to the caller.

    `point` names a failpoint `POINT.half_written`, reached after each part.
    """
    with placed(path), path.open("xb") as file:
        for part in parts:
            file.write(part)
            if point:
                failpoint(f"{point}.half_written")
        file.flush()
        if flush:
            os.fsync(file.fileno())


@contextlib.contextmanager
def placed(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_new(
    path: Path, parts: Iterable[bytes | memoryview], *, point: str | None = None, flush: bool = True
) -> FileDigest:
    """Write a new file as `write_unhashed` does, and return its size and sha256."""
    digest, size = hashlib.sha256(), 0

    def watched() -> Iterator[bytes | memoryview]:
        nonlocal size
        for part in parts:
            digest.update(part)
            size += len(part)
            yield part

    write_unhashed(path, watched(), point=point, flush=flush)
    return FileDigest(size, digest.hexdigest())


def file_digest(path: Path) -> FileDigest:
    """Size and sha256 of a file on disk."""
    with os.fdopen(open_to_read(path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), digest.hexdigest())


def read_bytes(file: Path) -> bytes:
    """A small file of a store that must be there.

    Raises:
        StoreUnreadable: the system does not let it be read.
        StoreError: it is missing, or too long for what it is.
    """
    # A buffered file would first have room made for as many bytes as are allowed, and a journal has thousands of files.
    parts, left = [], MOST_UNSTATED + 1
    try:
        descriptor = open_to_read(file)
        try:
            while left and (part := os.read(descriptor, min(left, _READ_BYTES))):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(file, error) from error
    data = b"".join(parts)
    if len(data) > MOST_UNSTATED:
        raise StoreError(f"{file}: is longer than the {MOST_UNSTATED:,} bytes it may have; it is not read")
    return data


def read_if_there(file: Path) -> bytes | None:
    """Read a small file as `read_bytes` does; None for a missing file."""
    try:
        return read_bytes(file)
    except StoreError as error:
        if isinstance(error.__cause__, ABSENT):
            return None
        raise


MOST_UNSTATED = 256 * 2**20
"""Most bytes of a file that is read at once: a mark with a million files is smaller."""


_READ_BYTES = 2**16
"""Bytes of a small file that are read at once."""

FileState: TypeAlias = tuple[int, ...]
"""State of a file, told without a look at its bytes, see `file_state`."""


def file_state(file: Path | str) -> FileState | None:
    """Device, inode, size, and times of the last change of a file and of its inode; None for a missing one.

    Files that are replaced by a rename and never written to in place differ in it when their bytes do, as far as the
    file system tells: NFS may answer for some seconds from its attribute cache.
    """
    try:
        found = os.stat(file)
    except ABSENT:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_to_read(file: Path) -> int:
    """A descriptor to read a file through; where all are in use, the limit is raised as far as is allowed.

    Raises:
        OSError: it cannot be had, or this is not a file: the wait for a pipe in a store would never end.
    """
    try:
        descriptor = os.open(file, _READ)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        _raise_limit()
        descriptor = os.open(file, _READ)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    raise OSError(errno.EINVAL, "is not a regular file", str(file))


def open_files_limit() -> int | None:
    """Most files that this process may have open at once; None for any number, and where the system does not say."""
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if resource is None or limit == resource.RLIM_INFINITY else limit


def _raise_limit() -> None:
    """Let this process open as many files as it may; where the system refuses, the next `os.open` says so."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = _DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < raised:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


def _flags(*names: str) -> int:
    """Flags of `os.open` by name, without those that this system does not have."""
    return sum(getattr(os, name, 0) for name in names)


_READ = os.O_RDONLY | _flags("O_CLOEXEC", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT")
_DESCRIPTORS = 2**16
"""The new limit of open files where any number is allowed."""
ABSENT = (FileNotFoundError, NotADirectoryError)
"""Errors of the system about a missing file."""

_CURES = {
    errno.EMFILE: "this process has too many files open: raise its limit (`ulimit -n`) and run the same command again",
    errno.ENFILE: "this machine has too many files open: end other programs, or have its limit (fs.file-max) raised",
    errno.EACCES: "you may not read it: ask its owner, or change its mode (`chmod -R u+rX` on the store)",
    errno.EPERM: "you may not read it: ask its owner",
    errno.EIO: "the disk or the network has a fault, see the system's log, and run the same command again; if the file "
    "stays so, remove it: `repair()`, or the build that goes on, makes it anew",
    errno.ESTALE: "the file server replaced it: run the same command again, or mount its file system anew",
    errno.ENOMEM: "the system has no memory for it, or no more maps (vm.max_map_count): give it more and run the same "
    "command again",
}


def unreadable(file: Path | str, error: OSError) -> StoreError:
    """The error for an unreadable file of a store: damage only where the file is missing."""
    if isinstance(error, ABSENT):
        return StoreError(f"{file}: is missing; the store is damaged: {MENDED}")
    cure = _CURES.get(error.errno or 0, "nothing is known to be damaged: mend that and run the same command again")
    return StoreUnreadable(f"{file}: cannot be read ({error.strerror or error}); {cure}")


def system_error(error: BaseException) -> OSError | None:
    """The system's error behind an exception of a library; None where the bytes are at fault.

    An OSError without a number is a codec's word for bytes that it cannot decode, unless its kind says more.
    """
    if isinstance(error, OSError) and (error.errno is not None or isinstance(error, _SAID_BY_KIND)):
        return error
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, str(error) or os.strerror(errno.ENOMEM))
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return OSError(errno.EAGAIN, str(error))
    if isinstance(error, ImportError):
        return OSError(0, str(error))
    return None if error.__cause__ is None else system_error(error.__cause__)


_SAID_BY_KIND = (*ABSENT, ConnectionError, PermissionError, TimeoutError)


MENDED = "`verify(deep=True)` lists all damage, `repair()` mends it"
"""Advice for a damaged store."""
PUSHED = "push the store again, which sends what is damaged"
"""Advice for a damaged store behind a URL."""


def require_can_write(where: Path) -> None:
    """Refuse to write on a system without POSIX locks, which has no flush of folders either.

    Raises:
        StoreError: it is such a system.
    """
    if fcntl is None:
        raise StoreError(
            f"{where}: cannot be written to on this system, whose Python has no fcntl (POSIX file locks); stores can "
            "be read here, write them on Linux or macOS"
        )


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk.

    Raises:
        StoreError: the file system cannot do that, or this system cannot.
        OSError: the disk is full or refuses; it names the path.
    """
    require_can_write(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        with placed(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        raise StoreError(
            f"{path}: cannot be flushed to the disk ({error.strerror}): its file system does not offer that, and what "
            "is written there would be lost with the power; choose a folder on another file system"
        ) from error
    finally:
        os.close(handle)


_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)
"""Errors with which a file system says that it does not know a call."""


_TOGETHER = 8
"""Flushes under way at once."""


def sync_together(paths: Iterable[Path]) -> None:
    """Flush files and folders, several at a time: the file system then writes its own journal once for many."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        for _ in pool.map(sync, paths):
            pass


def make_folders(path: Path) -> None:
    """Create a folder and its parents, each flushed to the disk; existing ones are left alone."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def rename(source: Path, target: Path, *, point: str | None = None, flush: bool = True) -> None:
    """Move a finished file or folder to its place; nothing in between is ever visible.

    Args:
        source: on the same disk.
        target: the new path.
        point: prefix of the failpoints passed on the way.
        flush: without it the move may still be lost with the machine's power: the caller flushes the folder later.
    """
    if point:
        failpoint(f"{point}.before_rename")
    source.rename(target)
    if flush:
        sync(target.parent)
    if point:
        failpoint(f"{point}.after_rename")


def write_atomic(
    path: Path, data: bytes, *, scratch: Path | None = None, point: str | None = None, flush: bool = True
) -> FileDigest:
    """Write a file so that `path` holds its old or its new bytes, never a part.

    Args:
        path: the file; with `scratch` its folder is made.
        data: all of its bytes.
        scratch: a folder on the same disk, to prepare the file in under a name of its own; without it the file is
            prepared beside `path`, as `.NAME.partial`, by one process at a time.
        point: prefix of the failpoints passed on the way.
        flush: without it all may still be lost with the machine's power, or half of it be there after that: the
            caller flushes the file, its folder and those above it, before anything says that they are there.

    Raises:
        OSError: the disk is full or refuses; it names the file.
    """
    if scratch is None:
        temporary = path.with_name(f".{path.name}.partial")
        discard(temporary)
    else:
        if flush:
            make_folders(path.parent)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = scratch_name(scratch, path.name)
    try:
        digest = write_new(temporary, [data], flush=flush)
        rename(temporary, path, point=point, flush=flush)
    finally:
        discard(temporary)
    return digest


def scratch_name(scratch: Path, label: str) -> Path:
    """A name below `scratch` that no other process uses."""
    return scratch / f"{label}-{os.getpid()}-{secrets.token_hex(4)}"


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_held: set[tuple[int, str]] = set()


class FileLock:
    """An exclusive or shared lock on a file; the system frees it when the process ends, however it ends.

    A record lock (not flock): forked worker processes must not keep it alive after the owner's death. Such locks do not
    exclude the own process, so those that this process holds are remembered beside them.
    """

    def __init__(self, path: Path, *, busy: Callable[[str], Exception], shared: bool = False, owner: str = "") -> None:
        """Lock the file `path`, without waiting.

        Args:
            path: the file; made if it is absent.
            busy: the error to raise where another process holds the lock, from the text in the file.
            shared: beside others that share it.
            owner: text for the file, which tells others who holds the lock.

        Raises:
            StoreError: a link is in its place, or the file system, or this system, has no locks.
            OSError: the file cannot be opened or locked; it names the file.
        """
        require_can_write(path)
        self._path, self._busy = path, busy
        self.shared = shared
        self._key = (os.getpid(), str(path.resolve()))
        if self._key in _held:
            raise busy(owner)
        while not self._try():
            pass
        _held.add(self._key)
        if owner:
            with placed(path):
                os.ftruncate(self._handle, 0)
                os.write(self._handle, owner.encode())

    def _try(self) -> bool:
        """Lock the file; False when its last owner removed it meanwhile, and the lock is on nothing."""
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | _flags("O_NOFOLLOW"), 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise StoreError(f"{self._path}: is a link, expected a file of ezsd's own; remove it") from error
        try:
            self._lock(shared=self.shared)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(self._handle, _OWNER_BYTES).decode(errors="replace")
            os.close(self._handle)
            raise self._busy(owner) from error
        except BaseException:
            os.close(self._handle)
            raise
        try:
            if os.fstat(self._handle).st_ino == self._path.stat().st_ino:
                return True
        except FileNotFoundError:
            pass
        os.close(self._handle)
        return False

    def _lock(self, *, shared: bool) -> None:
        """Lock the open file; PermissionError or BlockingIOError where another process holds it."""
        assert fcntl is not None
        try:
            with placed(self._path):
                fcntl.lockf(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (*_NOT_OFFERED, errno.ENOLCK):
                raise
            raise StoreError(
                f"{self._path}: cannot be locked ({error.strerror}): its file system offers no locks here; have them "
                "switched on (NFS: its lock service; Lustre: mount with `-o flock`), or choose a folder on another one"
            ) from error

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def share(self) -> None:
        """Let others share the lock from now on.

        Raises:
            StoreError: the file system has no locks any more.
            OSError: the system refuses for another reason; it names the file.
        """
        self._lock(shared=True)
        self.shared = True

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._key in _held and self._key[0] == os.getpid():
            _held.discard(self._key)
            os.close(self._handle)


_OWNER_BYTES = 1024
"""Longest text read from the file of a lock."""
