"""One annotation file as a dataset: where its images are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ezsd.data.annotations import resolve_image_path
from ezsd.data.stream import open_json
from ezsd.pipeline.errors import DatasetError


def find_images(path: Path, root: Path | None) -> tuple[Path, str]:
    """The image folder of an annotation file: the one that has the first image which the file lists.

    Looked at are `root` and the folders in it; without `root`, the file's own folder, the folders in it, the folder
    above and the folders in that. Of folders beside each other that have an image of that name, the one is taken with
    whose name the file's ends: images of instances_train.json are in train, though val has numbers from 1 on too.

    Args:
        path: a COCO-format JSON file.
        root: folder to look in.

    Returns:
        A root folder, and the place of the images below it.

    Raises:
        DatasetError: no folder has that image, or two folders beside each other have one of its name.
        AnnotationError: its name is none of a file below a folder, or the file is not JSON.
    """
    folder = path.parent if root is None else root
    if not folder.is_dir():
        raise DatasetError(f"`data_root={folder}`: no such folder")
    name = _first_image(path)
    if name is None:
        # What is wrong with the file is said by whoever reads it.
        return folder, "."
    for places in _places(folder, above=root is None):
        found = [place for place in places if resolve_image_path(place, name).is_file()]
        if len(found) > 1:
            found = [place for place in found if path.stem.endswith(place.name)] or found
        if len(found) > 1:
            both = f"{found[0]} and {found[1]} both have its first image {name}"
            raise DatasetError(f"{path}: {both}; give the right one as `data_root`")
        if found:
            return folder, path_from(folder, found[0])
    raise DatasetError(
        f"{path}: its first image {name} is neither in {folder} nor in a folder of it; give `data_root=DIR`"
    )


def path_from(folder: Path, path: Path) -> str:
    """Path that leads from a folder to a file or folder, also where a link leads to that folder."""
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    # The system follows links before it goes up, so that a path of their names alone would lead elsewhere.
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def _places(folder: Path, *, above: bool) -> Iterator[list[Path]]:
    yield [folder]
    yield _folders(folder)
    if above:
        parent = folder.absolute().parent
        yield [parent]
        yield _folders(parent)


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def _first_image(path: Path) -> str | None:
    """`file_name` of the first image; None where the file says none."""
    with open_json(path) as reader:
        if reader.peek() != "{":
            return None
        for key in reader.members():
            if key != "images" or reader.peek() != "[":
                reader.value()
                continue
            first = next(reader.entries(), None)
            name = first.get("file_name") if isinstance(first, dict) else None
            return name if isinstance(name, str) and name else None
    return None
