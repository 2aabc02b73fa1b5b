"""Sources of a dataset's images: a folder, or tar files whose members are read in place."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ezsd.data.annotations import ImageRecord, require_image_name, resolve_image_path
from ezsd.errors import AnnotationError
from ezsd.pipeline.data.images import Exif, ImageFile, read_pixels, to_tensor
from ezsd.pipeline.data.tar_files import TarFiles, TarMember
from ezsd.pipeline.errors import DatasetError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

_TAR = re.compile(r"(.*\.(?:tar|tgz|tar\.\w+))(?:/(.*))?")
"""A place that names tar files, and a folder in them."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
"""Numbers of shards, as WebDataset writes them."""
_MOST_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class ImageSource(ABC):
    """Images of one part of a dataset, found by the `file_name` of its annotations. It can be pickled."""

    exif: Exif
    """The dataset's rule for EXIF."""

    @property
    @abstractmethod
    def exists(self) -> bool:
        """True if the folder or the tar files exist."""

    @property
    @abstractmethod
    def roots(self) -> tuple[str, ...]:
        """Prefixes of the source's file names in messages, without the slash."""

    @abstractmethod
    def find(self, file_name: str) -> ImageFile:
        """The file of an image, which need not be there.

        Raises:
            AnnotationError: the name is none of a file in this source.
            DatasetError: the source itself cannot be read, or has two files of the name.
        """

    @abstractmethod
    def identity(self, file_name: str) -> Hashable:
        """Identity of a file, equal for all its names; None for anything but a regular file.

        Raises:
            AnnotationError: see `find`, as of DatasetError.
            ImageError: the file is not there.
        """

    @abstractmethod
    def elsewhere(self, file_name: str, root: Path) -> str | None:
        """The place below a dataset's root that has a file of this name, where this source has not."""

    def has(self, file_name: str) -> bool:
        """Test whether a name leads to a file."""
        try:
            return self.find(file_name).is_file()
        except AnnotationError:
            return False

    def read(self, record: ImageRecord) -> Tensor:
        """(3, H, W) uint8 RGB of an image that annotations name.

        Raises:
            AnnotationError: see `find`, as of DatasetError.
            ImageError: it cannot be read, or has another size than the annotations state.
        """
        return to_tensor(read_pixels(self.find(record.file_name), (record.width, record.height), self.exif))

    def portable_reason(self, error: ImageError) -> str:
        """Describe what is wrong with an image, in words that hold wherever the source is or leads to."""
        reason = str(error)
        for root in self.roots:
            reason = reason.replace(f"{root}{os.sep}", "")
        return reason


def image_source(root: Path, place: str, exif: Exif) -> ImageSource:
    """The images of a place in a dataset.

    Args:
        root: the dataset's folder.
        place: below it: a folder of images; a tar file; numbered ones, such as "images-{000..003}.tar"; or a folder
            that holds nothing else. A folder within tar files is named as one below them, "train.tar/images".
        exif: the dataset's rule.

    Raises:
        DatasetError: a range of numbers is empty, or makes more than 100,000 tar files.
    """
    found = _tar_files(root, place)
    if found is None:
        return ImageFolder(exif, root / place)
    pattern, files, folder = found
    return TarImages(exif, root / pattern, TarFiles(tuple(root / file for file in files)), folder)


def needed_files(root: Path, place: str) -> list[str]:
    """Paths below a dataset's root that reading from a place needs: the place itself, or its tar files."""
    found = _tar_files(root, place)
    return [place] if found is None else found[1]


def _tar_files(root: Path, place: str) -> tuple[str, list[str], str] | None:
    """Pattern of tar files, their names, and the folder in them, "" or with a slash; None for a folder of images."""
    if (root / place).is_dir():
        shards = _shards_in(root, place)
        return (place, shards, "") if shards else None
    named = _TAR.fullmatch(place)
    if named is None:
        return None
    folder = posixpath.normpath((named[2] or "").strip("/"))
    return named[1], _numbered(named[1]), "" if folder == "." else f"{folder}/"


def _shards_in(root: Path, place: str) -> list[str]:
    """The tar files of a folder that holds nothing else that is visible."""
    found: list[str] = []
    try:
        with os.scandir(root / place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.name.endswith(".tar"):
                    return []
                found.append(f"{place}/{entry.name}")
    except OSError:
        # Files of a folder may be readable by name where its list is not.
        return []
    return sorted(found)


def _numbered(pattern: str) -> list[str]:
    """The tar files of a pattern. DatasetError for a range without numbers, and for too many tar files."""
    start, *ranges = _RANGE.split(pattern)
    files = [start]
    for first, last, after in zip(ranges[::3], ranges[1::3], ranges[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        count = max(0, numbers.stop - numbers.start) * len(files)
        if not 0 < count <= _MOST_SHARDS:
            raise DatasetError(
                f"images = {pattern!r}: expected ranges with the smaller number first, for 1 to "
                f"{_MOST_SHARDS:,} tar files, found {{{first}..{last}}}, which makes {count:,}"
            )
        files = [f"{file}{number:0{len(first)}d}{after}" for file in files for number in numbers]
    return files


@dataclass(frozen=True, slots=True)
class ImageFolder(ImageSource):
    """Image files below a folder, see `resolve_image_path`."""

    folder: Path

    @property
    def exists(self) -> bool:
        """See `ImageSource.exists`."""
        return self.folder.exists()

    @property
    def roots(self) -> tuple[str, ...]:
        """See `ImageSource.roots`."""
        return (str(self.folder.resolve()),)

    def find(self, file_name: str) -> Path:
        """See `ImageSource.find`."""
        return resolve_image_path(self.folder, file_name)

    def identity(self, file_name: str) -> Hashable:
        """See `ImageSource.identity`."""
        path = self.find(file_name)
        try:
            found = path.stat()
        except OSError as error:
            reason = "no such image" if isinstance(error, FileNotFoundError | NotADirectoryError) else error.strerror
            raise ImageError(f"{path}: {reason}") from error
        return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None

    def elsewhere(self, file_name: str, root: Path) -> str | None:
        """A folder above, up to the dataset's, or within."""
        if "\\" in file_name:
            return None
        places = (place for place in self._others(root) if (place / file_name).is_file())
        return next((os.path.relpath(place, root) for place in places), None)

    def _others(self, root: Path) -> Iterator[Path]:
        for place in self.folder.parents:
            if place != root and root not in place.parents:
                break
            yield place
        if self.folder.is_dir():
            yield from sorted(place for place in self.folder.iterdir() if place.is_dir())


@dataclass(frozen=True, slots=True)
class TarImages(ImageSource):
    """Images in tar files, whose members are found by one pass over the headers in each process."""

    path: Path
    """Pattern of the tar files as it was given; a file of this name need not exist."""
    tars: TarFiles
    folder: str
    """Within the tar files, "" or with a slash at its end."""

    @property
    def exists(self) -> bool:
        """See `ImageSource.exists`."""
        return all(tar.exists() for tar in self.tars.paths)

    @property
    def roots(self) -> tuple[str, ...]:
        """See `ImageSource.roots`."""
        return tuple(f"{tar}/{self.folder}".rstrip("/") for tar in self.tars.paths)

    def find(self, file_name: str) -> TarMember:
        """See `ImageSource.find`."""
        require_image_name(self.path, file_name)
        forms = dict.fromkeys([file_name, *(unicodedata.normalize(form, file_name) for form in ("NFC", "NFD"))])
        found = self.tars.find(*(self.folder + form for form in forms))
        return TarMember(self.path, self.folder + file_name, None) if found is None else found

    def identity(self, file_name: str) -> Hashable:
        """See `ImageSource.identity`."""
        member = self.find(file_name)
        if not member.is_file():
            raise ImageError(f"{member}: no such image")
        return member.tar, member.offset

    def elsewhere(self, file_name: str, root: Path) -> str | None:
        """A folder in the tar files, or none where that of this source is too many."""
        if self.path.is_dir() or ".." in file_name.split("/"):
            return None
        found = self.tars.folder_of(file_name)
        return None if found is None else f"{os.path.relpath(self.path, root)}/{found}".rstrip("/")
