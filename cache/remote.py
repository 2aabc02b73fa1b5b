"""A store behind a URL: s3://, gs://, https://, memory:// and whatever else fsspec reaches.

Keys, endpoints and the like come from where fsspec and its libraries look for them: the environment, or
`~/.config/fsspec`. Arrays are read through zarr-python.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cache.arrays import RowArray, ZarrArray
from cache.durable import FileDigest
from cache.mark import COMMIT, TRANSFER, CommitMark, parse_mark
from cache.schema import StoreError, StoreIncomplete

if TYPE_CHECKING:
    import zarr

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PIECE = 8 * 2**20
_TOGETHER = 32
"""Small files asked for at once."""


class RemotePlace:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet.

        Raises:
            StoreError: fsspec or the library for this kind of URL is not installed, or there is none.
        """
        self.url = url.rstrip("/")
        self.files, root = _filesystem(self.url)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """A file's name as the file system has it."""
        return f"{self._root}/{name}"

    def mark(self) -> CommitMark:
        """See `Place`."""
        data = self.read_if_there(COMMIT)
        if data is not None:
            return parse_mark(data, f"{self.url}/{COMMIT}")
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
            if "http" in self.files.protocol:
                return {name: self.files.info(self.path(name))["size"] for name in names}
            # Listings are remembered, and the files may have changed since.
            self.files.invalidate_cache()
            found = self.files.find(self._root, detail=True)
            return {path.removeprefix(f"{self._root}/"): info["size"] for path, info in found.items()}

    def read_file(self, name: str) -> bytes:
        """See `Place`."""
        data = self.read_if_there(name)
        if data is None:
            raise StoreError(f"{self.url}/{name}: is not there; the store is damaged")
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """See `Place`."""
        with self.errors():
            try:
                return bytes(self.files.cat_file(self.path(name)))
            except FileNotFoundError:
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
        left = list(names)
        while left:
            some, left = left[:_TOGETHER], left[_TOGETHER:]
            paths, whole = [self.path(name) for name in some], [None] * len(some)
            with self.errors():
                # Not `cat`, which looks for patterns in names.
                found = self.files.cat_ranges(paths, whole, whole)
                for data in found:
                    if isinstance(data, Exception):
                        raise data
            for name, data in zip(some, found, strict=True):
                yield name, FileDigest(len(data), hashlib.sha256(data).hexdigest())

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, some megabytes at a time."""
        with self.errors(), self.files.open(self.path(name), "rb", block_size=_PIECE, cache_type="none") as file:
            while piece := file.read(_PIECE):
                yield piece

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
        from zarr.storage import FsspecStore

        # The copy of all metadata in the root makes this one request.
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


def _filesystem(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise StoreError(f"{url}: needs fsspec; install it with `pip install fsspec`") from error
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
