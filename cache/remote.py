"""A store behind a URL: s3://, gs://, https://, memory:// and whatever else fsspec reaches.

Keys, endpoints and the like come from where fsspec and its libraries look for them: the environment, or
`~/.config/fsspec`. Arrays are read through zarr-python.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from cache.arrays import RowArray, ZarrArray
from cache.durable import MOST_UNSTATED, FileDigest, discard, make_folders, write_atomic
from cache.mark import ARRIVING, COMMIT, TRANSFER, CommitMark, parse_mark
from cache.names import inside, require_inside
from cache.schema import StoreError, StoreIncomplete

if TYPE_CHECKING:
    import zarr

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PIECE = 8 * 2**20
_BLOCKS = {"block_size": _PIECE, "cache_type": "none"}
_STREAM = {"block_size": 0, "size": 1}
"""How fsspec reads a file of a web server in one request: without a block size it asks for no ranges, whose answers it
takes whole however long they are, and with any size it asks for none."""
_GONE = (404, 410)
"""What a web server answers for a file that it does not have."""
_TOGETHER = 32
"""Small files asked for at once."""


class RemotePlace:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet.

        Raises:
            StoreError: fsspec or the library for this kind of URL is not installed, or there is none.
        """
        self.files, root = _filesystem(url)
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self.stated: Mapping[str, FileDigest] = {}
        """The files that a commit mark lists, once one was read: no more than the stated bytes are read of each."""

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """A file's name as the file system has it; StoreError where a link takes it out of the store's folder."""
        return str(inside(Path(self._root), name)) if self._is_folder else f"{self._root}/{name}"

    @property
    def _is_folder(self) -> bool:
        return self.url.startswith(_FILE)

    @property
    def _is_web(self) -> bool:
        return "http" in self.files.protocol

    def mark(self) -> CommitMark:
        """See `Place`."""
        return self.committed()[0]

    def committed(self) -> tuple[CommitMark, bytes]:
        """The commit mark, and the bytes that it is in; see `Place`."""
        data = self.read_if_there(COMMIT)
        if data is not None:
            mark = parse_mark(data, f"{self.url}/{COMMIT}")
            self.stated = mark.files
            if self._is_folder:
                require_inside(Path(self._root), mark.files)
            return mark, data
        if self.read_if_there(TRANSFER) is not None:
            raise StoreIncomplete(f"{self.url}: not all files were copied here; run the same `ezsd cache push` again")
        raise StoreError(
            f"{self.url}: is not a store (no {COMMIT} there); `ezsd cache push STORE {self.url}` makes one"
        )

    def size_problems(self, mark: CommitMark) -> list[str]:
        """See `Place`."""
        problems = []
        sizes = self.sizes(mark.files)
        for name, expected in mark.files.items():
            size = sizes.get(name)
            if size is None:
                problems.append(f"{self.url}/{name}: is not there")
            elif size != expected.size:
                problems.append(f"{self.url}/{name}: is {size} bytes long, expected {expected.size}")
        return problems

    def sizes(self, names: Iterable[str] = ()) -> dict[str, int]:
        """Sizes of the files that are there; on a web server, which has no list, of those named alone."""
        with self.errors():
            if self._is_web:
                wanted = list(names)
                with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="sizes") as pool:
                    found = dict(zip(wanted, pool.map(self._size, wanted), strict=True))
                return {name: size for name, size in found.items() if size is not None}
            # Listings are remembered, and the files may have changed since.
            self.files.invalidate_cache()
            listed = self.files.find(self._root, detail=True)
            return {path.removeprefix(f"{self._root}/"): info["size"] for path, info in listed.items()}

    def _size(self, name: str) -> int | None:
        try:
            return int(self.files.info(self.path(name))["size"])
        except FileNotFoundError as error:
            self._require_reached(error)
            return None

    def _require_reached(self, error: FileNotFoundError) -> None:
        """Raise what is behind it: fsspec says "not found" whatever a web server answers, and also where none does."""
        cause = error.__cause__
        absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _GONE
        if self._is_web and cause is not None and not absent:
            raise cause from None

    def read_file(self, name: str) -> bytes:
        """See `Place`."""
        data = self.read_if_there(name)
        if data is None:
            raise StoreError(f"{self.url}/{name}: is not there; the store is damaged")
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """See `Place`; StoreError where a file is longer than its commit mark says."""
        with self.errors():
            try:
                return b"".join(self._pieces(name))
            except FileNotFoundError as error:
                self._require_reached(error)
                return None

    def digest(self, name: str) -> FileDigest:
        """See `Place`; reads the whole file over the network."""
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces(name):
            digest.update(piece)
            size += len(piece)
        return FileDigest(size, digest.hexdigest())

    def digests(self, names: Iterable[str]) -> Iterator[tuple[str, FileDigest]]:
        """See `Place`; many files at once, for each request waits for the network."""
        wanted = list(names)
        with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="digests") as pool:
            yield from zip(wanted, pool.map(self.digest, wanted), strict=True)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, some megabytes at a time.

        Raises:
            StoreError: it is longer than its commit mark says, or cannot be read.
        """
        with self.errors():
            yield from self._pieces(name)

    def _pieces(self, name: str) -> Iterator[bytes]:
        most = self.stated[name].size if name in self.stated else MOST_UNSTATED
        left = most
        with self.files.open(self.path(name), "rb", **(_STREAM if self._is_web else _BLOCKS)) as file:
            # One byte more is asked for: a server says what it likes about a file's size, and may never stop.
            while piece := file.read(min(_PIECE, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise StoreError(
                        f"{self.url}/{name}: is longer than the {most:,} bytes it may have; it is not read"
                    )
                yield piece

    def write_sign(self, name: str, data: bytes) -> None:
        """Write a small file that says what is here: all of it or nothing, as an object store does it by itself."""
        with self.errors():
            if not self._is_folder:
                self.files.pipe_file(self.path(name), data)
                return
            scratch = Path(self.path(ARRIVING))
            make_folders(scratch)
            try:
                write_atomic(Path(self.path(name)), data, scratch=scratch, point="push_sign")
            finally:
                discard(scratch)

    def open_array(self, name: str) -> RowArray:
        """See `Place`."""
        import zarr

        with self.errors():
            array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise StoreError(f"{self.url}/{name}: is no array; the store is damaged")
        return ZarrArray(array, f"{self.url}/{name}", self.errors)

    @cached_property
    def _group(self) -> "zarr.Group":
        import zarr
        from zarr.storage import FsspecStore, LocalStore

        # The copy of all metadata in the root makes this one request.
        if self._is_folder:
            return zarr.open_group(LocalStore(self._root, read_only=True), mode="r", zarr_format=3)
        return zarr.open_group(FsspecStore.from_url(self.url, read_only=True), mode="r", zarr_format=3)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Make one line of whatever the libraries below raise; what went wrong stays in it.

        Raises:
            StoreError: instead of it.
        """
        try:
            yield
        except StoreError:
            raise
        # Each library has exceptions of its own for a network that fails, and none can be imported here.
        except Exception as error:
            raise StoreError(f"{self.url}: cannot be reached: {type(error).__name__}: {error}") from error


_FILE = "file://"


def _folder_of(url: str) -> str:
    """The folder that a `file://` URL means, as `Path.as_uri` writes it: `%20` is a space, `%25` a per cent sign."""
    host, slash, path = url.removeprefix(_FILE).partition("/")
    if host not in ("", "localhost"):
        raise StoreError(
            f"{url}: names the host {host!r}, and file:// reaches this machine alone; write file:///FOLDER, with three "
            "slashes and the whole path"
        )
    folder = os.fsdecode(unquote_to_bytes(slash + path))
    if not folder or "\0" in folder:
        raise StoreError(f"{url}: names no folder; write file:///FOLDER, with three slashes and the whole path")
    return folder


def _filesystem(url: str) -> tuple[Any, str]:
    protocol, _, place = url.partition("://")
    if not place.strip("/"):
        raise StoreError(f"{url}: names no place of a store; write the whole URL, such as {protocol}://PLACE/STORE")
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem
    except ImportError as error:
        raise StoreError(f"{url}: needs fsspec; install it with `pip install fsspec`") from error
    if url.startswith(_FILE):
        # fsspec does not decode these, and would take "::" in a decoded one for a chain of file systems.
        return LocalFileSystem(), _folder_of(url)
    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        cure = f"`pip install 'ezsd[{extra}]'`" if extra else "the library it names"
        raise StoreError(f"{url}: a library for {protocol}:// is missing ({error}); install {cure}") from error
    except ValueError as error:
        raise StoreError(f"{url}: fsspec knows no {protocol}:// ({error})") from error
    if "file" in files.protocol and "://" in url and protocol not in files.protocol and "::" not in protocol:
        # fsspec takes a scheme of one letter for a drive, and would make a folder of that name here.
        raise StoreError(f"{url}: fsspec knows no {protocol}://; expected s3://, gs://, https://, file:// or the like")
    return files, str(root)
