"""A store behind a URL: s3://, gs://, https://, memory:// and whatever else fsspec reaches.

Keys, endpoints and the like come from where fsspec and its libraries look for them: the environment, or
`~/.config/fsspec`.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from ezsd.cache.errors import StoreError, StoreIncomplete
from ezsd.cache.files import (
    MOST_UNSTATED,
    PUSHED,
    FileDigest,
    copied_to,
    discard,
    make_folders,
    system_error,
    unreadable,
    write_atomic,
)
from ezsd.cache.format.commit_mark import ARRIVING, COMMIT, TRANSFER, CommitMark, parse_mark
from ezsd.cache.format.names import ROOT, inside, require_inside
from ezsd.cache.format.schema import Schema
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.format.zarr_bytes import consolidated
from ezsd.cache.storage.arrays import RowArray, ZarrArray, zarr_errors
from ezsd.cache.storage.direct import direct_spec
from ezsd.cache.storage.remote_arrays import RemoteArray

if TYPE_CHECKING:
    import fsspec
    import zarr

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PIECE = 8 * 2**20
_BLOCKS = {"block_size": _PIECE, "cache_type": "none"}
_STREAM = {"block_size": 0, "size": 1}
"""Options for one request per file of a web server: without a block size fsspec asks for no ranges, whose answers it
takes whole however long they are, and with any size it asks for none."""
_PARTIAL = 206
"""Status of a web server's answer with the requested range."""
_GONE = (404, 410)
"""Statuses of a web server's answer for a missing file."""
_OF_THE_HUB = (".gitattributes", "README.md")
"""Files at the root of a repository of the Hugging Face Hub."""
_TOGETHER = 32
"""Small files asked for at once."""


class RemotePlace:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet.

        Raises:
            StoreError: fsspec or the library for this kind of URL is not installed, or there is none.
        """
        self._files, root = _filesystem(url)
        self._process = os.getpid()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self._schema: Schema | None = None
        self.stated: Mapping[str, FileDigest] = {}
        """The files that a commit mark lists, once one was read: no more than the stated bytes are read of each."""

    def __str__(self) -> str:
        return self.url

    @property
    def files(self) -> "fsspec.AbstractFileSystem":
        """The file system of fsspec, of this process: a connection is of no use in a child process."""
        if self._process != os.getpid():
            self._files, self._process = _filesystem(self.url)[0], os.getpid()
        return self._files

    def path(self, name: str) -> str:
        """A file's name as the file system has it; StoreError where a link takes it out of the store's folder."""
        return str(inside(Path(self._root), name)) if self.is_folder else f"{self._root}/{name}"

    @property
    def is_folder(self) -> bool:
        """True for a folder of this machine."""
        return "local" in self.files.protocol

    @property
    def not_ours(self) -> tuple[str, ...]:
        """Names of files that the other side puts beside a store."""
        return _OF_THE_HUB if self.is_on_hub else ()

    @property
    def is_on_hub(self) -> bool:
        """True for the Hugging Face Hub."""
        return "hf" in self.files.protocol

    @property
    def checks_when_read(self) -> bool:
        """True for a web server, which has no list of sizes: to look at each file would be a request for each."""
        return self._is_web

    @property
    def _is_web(self) -> bool:
        return "http" in self.files.protocol

    def mark(self) -> CommitMark:
        """The commit mark; StoreIncomplete or StoreError where there is none."""
        return self.committed()[0]

    def committed(self) -> tuple[CommitMark, bytes]:
        """The commit mark, and the bytes that it is in; see `Place`."""
        data = self.read_if_there(COMMIT)
        if data is not None:
            mark = parse_mark(data, f"{self.url}/{COMMIT}")
            self.stated, self._schema = mark.files, mark.schema
            if self.is_folder:
                require_inside(Path(self._root), mark.files)
            return mark, data
        if self.read_if_there(TRANSFER) is not None:
            raise StoreIncomplete(f"{self.url}: not all files were copied here; run the same `push(...)` again")
        raise StoreError(f"{self.url}: is not a store (no {COMMIT} there); `push(STORE, {self.url})` makes one")

    def folders(self) -> list[str]:
        """URLs of the folders directly below this one.

        Raises:
            StoreError: it is a web server's, which has no list of them, or there is no such folder.
        """
        if self._is_web:
            raise StoreError(f"{self.url}: a web server lists no folders; give the URL of a store to `info()`")
        found = [name for name, kind in self._listing() if kind == "directory"]
        # Of all URLs these alone are decoded.
        is_quoted = self.url.startswith(_FILE)
        return [self.url_of(quote_from_bytes(os.fsencode(name)) if is_quoted else name) for name in found]

    def names(self) -> list[str]:
        """Names of the files directly below the URL."""
        return [name for name, kind in self._listing() if kind == "file"]

    def _listing(self) -> list[tuple[str, str]]:
        """Name and kind of what is directly below the URL, in order."""
        with self.errors():
            # Listings are remembered, and the files may have changed since.
            self.files.invalidate_cache()
            found = self.files.ls(self._root, detail=True)
        return sorted((str(at["name"]).rstrip("/").rpartition("/")[2], str(at["type"])) for at in found)

    def size_problems(self, mark: CommitMark) -> list[str]:
        """Describe each file that is missing or not as long as it was, one line each."""
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
        return {name: at["size"] for name, at in self.details().items()}

    def details(self) -> dict[str, Mapping[str, Any]]:
        """All that the file system lists of each file below the URL, by name; none of a web server's."""
        with self.errors():
            # Listings are remembered, and the files may have changed since.
            self.files.invalidate_cache()
            listed = self.files.find(self._root, detail=True)
            return {path.removeprefix(f"{self._root}/"): at for path, at in listed.items()}

    def _size(self, name: str) -> int | None:
        try:
            size = self.files.info(self.path(name))["size"]
            return self._counted_size(name) if size is None else int(size)
        except FileNotFoundError as error:
            self._require_reached(error)
            return None

    def _counted_size(self, name: str) -> int:
        """Size of a file whose server does not state it, found by reading the file: one byte too many is the most."""
        most = self.stated[name].size if name in self.stated else MOST_UNSTATED
        with self.files.open(self.path(name), "rb", **_STREAM) as file:
            return sum(map(len, _up_to(file, most + 1)))

    def _require_reached(self, error: FileNotFoundError) -> None:
        """Raise what is behind it: fsspec says "not found" whatever a web server answers, and also where none does."""
        cause = error.__cause__
        absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _GONE
        if self._is_web and cause is not None and not absent:
            raise cause from None

    def read_file(self, name: str) -> bytes:
        """A small file; StoreError if it cannot be read, or is not what the commit mark that was read says."""
        data = self.read_if_there(name)
        if data is None:
            raise self._absent(name)
        if name in self.stated and hashlib.sha256(data).hexdigest() != self.stated[name].sha256:
            raise StoreError(
                f"{self.url_of(name)}: its bytes are not those that were committed (sha256 differs); the store is "
                f"damaged: {PUSHED}"
            )
        return data

    def url_of(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}"

    def stated_size(self, name: str) -> int | None:
        """The size that the commit mark states; None for a file that it does not list."""
        return self.stated[name].size if name in self.stated else None

    def workers(self) -> ThreadPoolExecutor:
        """The threads of this process that fetch."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(_TOGETHER, thread_name_prefix="fetch")
        return self._pool[1]

    def _absent(self, name: str) -> StoreError:
        return StoreError(f"{self.url}/{name}: is not there; the store is damaged: {PUSHED}")

    def read_if_there(self, name: str) -> bytes | None:
        """A small file, or None where there is none; StoreError where a file is longer than its commit mark says."""
        with self.errors():
            try:
                return b"".join(self._pieces(name))
            except FileNotFoundError as error:
                self._require_reached(error)
                return None

    def digest(self, name: str) -> FileDigest:
        """Size and sha256 of a file as it is now; reads the whole file over the network."""
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces(name):
            digest.update(piece)
            size += len(piece)
        return FileDigest(size, digest.hexdigest())

    def digests(self, names: Iterable[str]) -> Iterator[tuple[str, FileDigest]]:
        """Size and sha256 of many small files, many at once: each request waits for the network."""
        wanted = list(names)
        with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="digests") as pool:
            yield from zip(wanted, pool.map(self.digest, wanted), strict=True)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, some megabytes at a time.

        Raises:
            StoreError: it is not there, is longer than its commit mark says, or cannot be read.
        """
        with self.errors():
            try:
                yield from self._pieces(name)
            except FileNotFoundError as error:
                self._require_reached(error)
                raise self._absent(name) from error

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
        with self.sending(len(data)):
            if not self.is_folder:
                self.files.pipe_file(self.path(name), data)
                return
            scratch = Path(self.path(ARRIVING))
            make_folders(scratch)
            try:
                write_atomic(Path(self.path(name)), data, scratch=scratch, point="push_sign")
            finally:
                discard(scratch)

    def fetch(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` (exclusive) of a file; None where there is no such file.

        Raises:
            StoreError: more is sent than was asked for, or nothing.
        """
        if start >= stop:
            return b""
        # What is read ahead of its own accord is of no use here.
        exact = partial(self.files.cat_file, cache_type="none") if self.is_on_hub else self.files.cat_file
        read = self._web_range if self._is_web else exact
        with self.errors():
            try:
                data: bytes = read(self.path(name), start=start, end=stop)
            except FileNotFoundError as error:
                self._require_reached(error)
                return None
        if len(data) > stop - start:
            raise StoreError(f"{self.url}/{name}: more is sent than the {stop - start:,} bytes asked for")
        return data

    def _web_range(self, path: str, start: int, end: int) -> bytes:
        """A web server's answer to a range, cut to the range: a server may send more."""
        headers = {**self.files.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        with self.files.open(path, "rb", **_STREAM, headers=headers) as file:
            part = file.r.status == _PARTIAL
            # One that knows no ranges sends all of the file.
            for _ in _up_to(file, 0 if part else start):
                pass
            return b"".join(_up_to(file, end - start + part))

    def open_array(self, name: str) -> RowArray:
        """An array of the store, by its path; straight from its shards where its layout allows, else through zarr."""
        try:
            spec = direct_spec(consolidated(self._root_metadata, name), name)
        except StoreError as error:
            raise StoreError(f"{self.url}/{error}") from error
        if spec is None:
            return self._through_zarr(name)
        return RemoteArray(spec, self, partial(self._through_zarr, name), whole=not self._holds_rows(name))

    def _holds_rows(self, array: str) -> bool:
        """True if an array of the store whose mark was read holds rows of images."""
        return self._schema is not None and self._schema.holds_rows(array)

    @cached_property
    def _root_metadata(self) -> dict[str, Any]:
        # The copy of all metadata in the root makes this one request.
        return parse_json(self.read_file(ROOT), self.url_of(ROOT))

    def _through_zarr(self, name: str) -> ZarrArray:
        import zarr

        errors = partial(zarr_errors, f"{self.url}/{name}", PUSHED)
        with errors():
            array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise StoreError(f"{self.url}/{name}: is not an array; the store is damaged")
        return ZarrArray(array, f"{self.url}/{name}", errors)

    @cached_property
    def _group(self) -> "zarr.Group":
        import zarr

        from ezsd.cache.storage.fetch import Listed

        return zarr.open_group(
            Listed(self.fetch, self.read_file, self.stated, self._holds_rows), mode="r", zarr_format=3
        )

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
            raise self._failure(error) from error

    @contextmanager
    def sending(self, needed: int) -> Iterator[None]:
        """Turn errors of writing `needed` bytes into StoreErrors; for a folder also a full disk."""
        with self.errors(), copied_to(Path(self._root), needed) if self.is_folder else nullcontext():
            yield

    def _failure(self, error: Exception) -> StoreError:
        refused = system_error(error)
        if refused is not None and (self.is_folder or isinstance(error, MemoryError | RuntimeError | ImportError)):
            return unreadable(refused.filename or self._root, refused)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if _is_undecodable(error):
            return StoreError(f"{self.url}: what is sent cannot be decoded ({reason}); the store is damaged: {PUSHED}")
        return StoreError(f"{self.url}: cannot be reached: {reason}")


_UNDECODABLE = ("ContentEncodingError", "PayloadEncodingError", "content-encoding")
"""Message of aiohttp's error; an answer that is cut short has one of its own."""


def _is_undecodable(error: BaseException | None) -> bool:
    """True if there was an answer and its bytes are at fault."""
    return error is not None and (
        isinstance(error, EOFError | UnicodeError | gzip.BadGzipFile | zlib.error)
        or any(words in f"{type(error).__name__} {error}" for words in _UNDECODABLE)
        or _is_undecodable(error.__cause__)
    )


def _up_to(file: IO[bytes], most: int) -> Iterator[bytes]:
    """The next bytes of a file, at most so many; a stream gives fewer at a time than it is asked for."""
    while most > 0 and (piece := file.read(min(_PIECE, most))):
        most -= len(piece)
        yield piece


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
