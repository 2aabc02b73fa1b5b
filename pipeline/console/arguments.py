"""Checks of a command's arguments before anything heavy is loaded."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ezsd.errors import VocabularyError
from ezsd.pipeline.config.names import with_todays_names
from ezsd.pipeline.config.schema import at_test_time, from_tables
from ezsd.pipeline.data.images import image_endings, look
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.files import read_object
from ezsd.vocabulary import (
    canonical,
    parse_classes,
    require_characters,
    require_different,
)


def require_weights(file: Path | None, *, used: bool = True) -> None:
    """Raise ArgumentError when `--weights` names no file, or nothing that uses it was asked for."""
    if file is None:
        return
    if not used:
        raise ArgumentError(
            f"--weights {file} goes with --crops, or with --set eval.teacher_weight_base or eval.teacher_weight_novel "
            "above 0: nothing else of an evaluation asks the teacher"
        )
    if not file.is_file():
        raise ArgumentError(f"--weights {file}: no such file")


def shows_teacher(run: Path, overrides: Sequence[str]) -> bool:
    """Test whether the teacher takes part in scores by the settings of a run, as overridden; False without a run."""
    file = run / "run.json"
    if not file.is_file():
        return False
    tables = with_todays_names(read_object(file).get("config"))
    return at_test_time(from_tables(tables, where=str(file)), overrides).eval.shows_teacher


def require_alone(alone: bool, classes: str | None) -> None:
    """Raise ArgumentError for `--alone` where all classes are looked for anyway."""
    if alone and classes == "all":
        raise ArgumentError(
            "--alone goes with --classes base or novel, or without --classes: beside all names there are no others"
        )


def require_output(file: Path) -> None:
    """Raise ArgumentError when no file can be written to a place: it is a folder, or there is no folder around it."""
    if file.is_dir():
        raise ArgumentError(f"--out {file}: is a folder; give the name of a file")
    if not file.parent.is_dir():
        raise ArgumentError(f"--out {file}: there is no folder {file.parent}; make it first")


def require_novel(dataset: str, novel: Sequence[str] | None) -> None:
    """Raise ArgumentError for a store of one annotation file without novel classes: no region would be kept."""
    if dataset.lower().endswith(".json") and novel is None:
        raise ArgumentError(
            f"--dataset {dataset}: all of its classes are base ones; give --novel NAMES, the classes to find without "
            "boxes, which need not be in the file"
        )


def require_one_source(
    *,
    run: Path | None,
    of_run: Mapping[str, object | None],
    detections: Path | None,
    of_file: Mapping[str, object | None],
) -> None:
    """Raise ArgumentError unless a run or a results file is given, with the options that go with it and no other."""
    if (run is None) == (detections is None):
        raise ArgumentError("give --run RUN, or --detections RESULTS.json with --annotations GT.json, and not both")
    if detections is not None and of_file["--annotations"] is None:
        raise ArgumentError("--detections needs --annotations, the ground truth to compare with")
    other, strange = ("--run", of_run) if run is None else ("--detections", of_file)
    for option, value in strange.items():
        if value is not None:
            raise ArgumentError(f"{option} goes with {other} alone")


def class_names(
    option: str, *, lists: Sequence[str] = (), files: Sequence[Path] = (), literal: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """Class names of a command line: the one grammar of all options that take them; docs/names.md states it.

    Args:
        option: the name of the option that takes `lists`, such as "--classes"; "--classes-file" takes `files`.
        lists: comma-separated names, see `parse_classes`.
        files: one name a line, as it stands: UTF-8, with or without a byte order mark, any line ends. Blank lines and
            lines that begin with "#" are left out.
        literal: names as they stand, of the option "--class".

    Returns:
        `literal`, then `lists`, then `files`, in the form of `canonical`; None when nothing was given.

    Raises:
        ArgumentError: a file cannot be read or has no name, or a list or a name in it is itself a file.
        VocabularyError: a name is empty, holds a control character or occurs twice; a list is not well-formed.
    """
    if not lists and not files and not literal:
        return None
    names = [_one_name("--class", name) for name in literal]
    for text in lists:
        names += _listed(option, text)
    for file in files:
        names += _names_of_file(f"{option}-file {file}", file)
    try:
        require_different(names)
    except VocabularyError as error:
        raise VocabularyError(f"{option}: {error}") from None
    return tuple(names)


def _listed(option: str, text: str) -> tuple[str, ...]:
    """Names of a list; ArgumentError for a file among them, which would be looked for as an object, in silence."""
    if os.path.isfile(text):
        raise ArgumentError(f"{option} {text}: is a file; give it to {option}-file")
    try:
        names = parse_classes(text)
    except VocabularyError as error:
        hint = f"; a file with one name a line goes to {option}-file" if "\n" in text else ""
        raise VocabularyError(f"{option}: {error}{hint}") from None
    for name in names:
        if os.path.isfile(name):
            raise ArgumentError(f"{option}: {name!r} is a file; give it to {option}-file")
    return names


def _names_of_file(where: str, file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{where}: is not UTF-8 text: {error}") from error
    lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1)
    kept = [(number, line.strip()) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not kept:
        raise ArgumentError(f"{where}: holds no class name; expected one a line")
    return [_one_name(f"{where}: line {number}", line) for number, line in kept]


def _one_name(where: str, name: str) -> str:
    try:
        require_characters(name)
    except VocabularyError as error:
        raise VocabularyError(f"{where}: {error}") from None
    if not name.strip():
        raise VocabularyError(f"{where}: the name is empty")
    return canonical(name.strip())


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """The image files among files, folders and patterns, those of a folder by name; each is opened, none is decoded.

    A pattern is what a shell would have expanded, such as "photos/*.jpg", unless a file has that very name.

    Raises:
        ImageError: a file is missing, no image or too large, or its mode cannot be read.
        ArgumentError: a folder holds no file with an image's ending, a pattern matches nothing, or it is a URL.
    """
    images: list[Path] = []
    for given in places:
        for place in _expanded(str(given)):
            images += _folder_images(place) if place.is_dir() else [place]
    for image in images:
        look(image)
    return images


def _expanded(text: str) -> list[Path]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ArgumentError(f"{text}: is a URL, and only files are read; download the image and give its path")
    if not glob.has_magic(text) or os.path.lexists(text):
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise ArgumentError(f"{text}: no file matches this pattern")
    return [Path(one) for one in found]


def picture_places(images: Sequence[Path], out: str | Path | None, *, alone: bool) -> list[Path] | None:
    """Files for the pictures with boxes: `out` itself for one image, else below it by the images' names.

    What ends in a slash is a folder, there or not.

    Raises:
        ArgumentError: a name's ending says no format that can be written, two images have one name, or `out` is a
            file where a folder must be.
    """
    if out is None:
        return None
    is_folder = str(out).endswith(tuple(filter(None, (os.sep, os.altsep))))
    out = Path(out)
    if (is_folder or not alone) and out.exists() and not out.is_dir():
        raise ArgumentError(
            f"--out {out}: is a file; {'several images need' if not alone else 'a slash means'} a folder"
        )
    places = [out] if alone and not is_folder and not out.is_dir() else [out / image.name for image in images]
    Image.init()
    taken: dict[Path, Path] = {}
    for place, image in zip(places, images, strict=True):
        if Image.registered_extensions().get(place.suffix.lower()) not in Image.SAVE:
            raise ArgumentError(f"--out {place}: its ending says no picture format; give it one such as .png")
        if place.exists() and place.samefile(image):
            raise ArgumentError(f"--out {place}: is the image itself; choose another place")
        if taken.setdefault(place, image) != image:
            raise ArgumentError(f"--out {out}: {taken[place]} and {image} have the same name; detect them one by one")
    return places


def _folder_images(folder: Path) -> list[Path]:
    known = image_endings()
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in known and p.is_file())
    if not found:
        raise ArgumentError(f"{folder}: no images in this folder; folders in it are not looked into")
    return found


def require_scheduler(
    scheduler: str, *, workers: int, dashboard: bool, wait: float | None = None, share: tuple[int, int] | None = None
) -> None:
    """Raise ArgumentError for a scheduler that does not exist, and for options that do not go with it."""
    address = re.fullmatch(r"(tcp|tls)://.+:\d+", scheduler)
    if address is None and scheduler not in ("local", "sync"):
        raise ArgumentError(
            f"--scheduler {scheduler}: expected local, sync, or a Dask scheduler's tcp://HOST:PORT or tls://HOST:PORT"
        )
    if workers and scheduler != "local":
        raise ArgumentError(f"--workers goes with --scheduler local alone, not with {scheduler}")
    if dashboard and scheduler == "sync":
        raise ArgumentError("--dashboard: with --scheduler sync there is no Dask to look at")
    if wait is not None and address is None:
        raise ArgumentError(f"--wait-for-workers goes with a Dask scheduler's address alone, not with {scheduler}")
    if share is not None and address is not None:
        raise ArgumentError("--blocks is for jobs without a scheduler; leave --scheduler out, or --blocks")


def parse_share(text: str) -> tuple[int, int]:
    """Number and count of a part such as "2/8"; ArgumentError for any other text."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ArgumentError(f"--blocks {text}: expected I/N with I from 1 to N, such as 1/8 to 8/8")
    return int(found[1]), int(found[2])
