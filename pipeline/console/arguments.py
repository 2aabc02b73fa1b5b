"""Checks of a command's arguments before anything heavy is loaded."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from ezsd.choices import Logger
from ezsd.errors import VocabularyError
from ezsd.pipeline.config.names import with_todays_names
from ezsd.pipeline.config.schema import at_test_time, from_tables
from ezsd.pipeline.data.images import image_endings
from ezsd.pipeline.data.sources import VIDEO_ENDINGS, WRITTEN_VIDEOS, Camera, Source, Video, file_name, is_video
from ezsd.pipeline.errors import ArgumentError, ImageError
from ezsd.pipeline.files import read_object
from ezsd.vocabulary import (
    IMAGENET_TEMPLATES,
    canonical,
    parse_classes,
    prompts,
    require_characters,
    require_different,
)

WRITTEN_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings of pictures that are written: other formats that Pillow knows take few colours or small pictures alone."""
SAVED = {
    "coco": "found.json",
    "csv": "found.csv",
    "fiftyone": "found",
    "yolo": "labels",
    "yolo-scores": "labels",
}
"""Formats of `ezsd detect --save`, each with a place to show: a file, or a folder without an ending."""


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
    kept = _lines_of_file(where, file)
    if not kept:
        raise ArgumentError(f"{where}: holds no class name; expected one a line")
    return [_one_name(f"{where}: line {number}", line) for number, line in kept]


def _lines_of_file(where: str, file: Path) -> list[tuple[int, str]]:
    """Numbers and texts of the lines of a list, without blank ones and those that begin with "#"."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{where}: is not UTF-8 text: {error}") from error
    lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _one_name(where: str, name: str) -> str:
    try:
        require_characters(name)
    except VocabularyError as error:
        raise VocabularyError(f"{where}: {error}") from None
    if not name.strip():
        raise VocabularyError(f"{where}: the name is empty")
    return canonical(name.strip())


def find_sources(places: Sequence[str | Path]) -> list[Source]:
    """Images, videos and cameras among files, folders, patterns, URLs, lists and numbers; nothing of them is read.

    A pattern is what a shell would have expanded, such as "photos/*.jpg". A folder gives its images and videos by name.
    A list is a text file, whose name ends in ".txt", with one path or URL a line; blank lines and those that begin with
    "#" are left out, and a path that leads nowhere is tried from the list's folder. A number is a camera. A file that
    is there is a file, whatever its name looks like.

    What is given twice is there once.

    Raises:
        ImageError: a file that is named here is missing.
        ArgumentError: a folder holds no file with an image's or a video's ending, a pattern matches nothing, a list
            cannot be read or is empty, a URL is a video's, a chain of several or none, or a text has a control
            character.
    """
    sources: list[Source] = []
    for given in places:
        text = str(given)
        _require_printable(text, "source")
        if _is_url(text):
            sources.append(_of_url(text))
            continue
        if re.fullmatch(r"\d{1,3}", text) and not os.path.lexists(text):
            sources.append(Camera(int(text)))
            continue
        for place in _expanded(text):
            if os.path.isdir(place):
                sources += _folder_sources(place)
            elif not os.path.isfile(place):
                raise ImageError(f"{place}: no such image")
            elif place.suffix.lower() == ".txt":
                sources += _listed_sources(place)
            else:
                sources.append(_of_path(place))
    return list(dict.fromkeys(sources))


def is_named_itself(sources: Sequence[Source], places: Sequence[str]) -> bool:
    """Test whether there is one source, and it was named, not its folder, pattern or list."""
    if len(sources) != 1 or len(set(places)) != 1:
        return False
    return isinstance(sources[0], Camera) or str(sources[0]) in (places[0], str(Path(places[0])))


def is_image(sources: Sequence[Source]) -> bool:
    """Test whether there is one image to detect in, and no more."""
    return len(sources) == 1 and not isinstance(sources[0], Video | Camera)


def _is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def _require_printable(text: str, where: str) -> None:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ArgumentError(f"{where}: expected a path or URL, found a control character in {text!r}")


def _of_url(url: str) -> str:
    try:
        path = urlsplit(url).path
    except ValueError as error:
        raise ArgumentError(f"{url}: is no URL: {error}") from error
    if "::" in url:
        # What fsspec makes of it may read any file of this machine.
        raise ArgumentError(f"{url}: expected one URL, found a chain of several with '::'")
    if is_video(path):
        raise ArgumentError(f"{url}: is a video behind a URL, which is not read; download it and give its path")
    return url


def _of_path(path: Path) -> Path | Video:
    return Video(path) if is_video(path) else path


def _listed_sources(file: Path) -> list[Source]:
    found: list[Source] = []
    for number, line in _lines_of_file(str(file), file):
        _require_printable(line, f"{file}: line {number}")
        if _is_url(line):
            found.append(_of_url(line))
            continue
        path = Path(line)
        # Lists are written from where one works, or travel with their images.
        beside = file.parent / path
        found.append(_of_path(beside if not os.path.exists(path) and os.path.exists(beside) else path))
    if not found:
        raise ArgumentError(f"{file}: is an empty list; expected one path or URL a line")
    return found


def _expanded(text: str) -> list[Path]:
    if not glob.has_magic(text) or os.path.lexists(text):
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise ArgumentError(f"{text}: no file matches this pattern")
    return [Path(one) for one in found]


def picture_places(sources: Sequence[Source], out: str | Path | None, *, alone: bool) -> list[Path] | None:
    """Files for the pictures with boxes: `out` itself for one source, else below it by the sources' names.

    What ends in a slash is a folder, there or not. In a folder, a video becomes NAME.mp4, and what has no ending of a
    picture NAME.png.

    Raises:
        ArgumentError: a name's ending says no format that can be written, two sources have one name, or `out` is a
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
    in_folder = not alone or is_folder or out.is_dir()
    places = [out / _picture_name(source) for source in sources] if in_folder else [out]
    taken: dict[Path, Source] = {}
    for place, source in zip(places, sources, strict=True):
        _require_picture_ending(place, source)
        own = source.path if isinstance(source, Video) else source
        if isinstance(own, Path) and os.path.exists(place) and os.path.exists(own) and place.samefile(own):
            raise ArgumentError(f"--out {place}: is the image itself; choose another place")
        if taken.setdefault(place, source) != source:
            raise ArgumentError(f"--out {out}: {taken[place]} and {source} have the same name; detect them one by one")
    return places


def _picture_name(source: Source) -> str:
    name = file_name(source)
    if isinstance(source, Video | Camera):
        return f"{Path(name).stem}.mp4"
    return name if isinstance(source, Path) or _is_writable(name) else f"{name}.png"


def _is_writable(name: str) -> bool:
    return Path(name).suffix.lower() in WRITTEN_PICTURES


def _require_picture_ending(place: Path, source: Source) -> None:
    if isinstance(source, Video | Camera):
        if place.suffix.lower() not in WRITTEN_VIDEOS:
            raise ArgumentError(f"--out {place}: its ending says no video format; give it one such as .mp4")
    elif not _is_writable(place.name):
        raise ArgumentError(f"--out {place}: its ending says no picture format; give it one such as .png")


def parse_class_thresholds(given: Sequence[str]) -> dict[str, float]:
    """Least scores by class, from texts such as "dog=0.5"; the last "=" counts.

    Raises:
        ArgumentError: a text is no name with a score in [0, 1], or a class has two.
    """
    found: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            least = float(value)
        except ValueError:
            least = -1.0
        if not (equals and name.strip() and 0 <= least <= 1):
            raise ArgumentError(
                f"--class-threshold {text}: expected NAME=SCORE with a score from 0 to 1, as in dog=0.5"
            )
        name = _one_name("--class-threshold", name)
        if name in found:
            raise ArgumentError(f"--class-threshold: {name!r} has two thresholds; leave one of them out")
        found[name] = least
    return found


def loggers_override(text: str | None) -> list[str]:
    """The override of `train.loggers` that a CSV list of loggers stands for; none without a list.

    Raises:
        ArgumentError: there is no such logger.
    """
    if text is None:
        return []
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = get_args(Logger)
    for name in names:
        if name not in known:
            raise ArgumentError(f"--log {text}: no logger {name!r}; known are {', '.join(known)}")
    return [f"train.loggers={json.dumps(names)}"]


def require_template(template: str | None) -> None:
    """Raise VocabularyError for a prompt template without exactly one place for the name."""
    if template is not None and template != IMAGENET_TEMPLATES:
        try:
            prompts(["a"], template)
        except VocabularyError as error:
            raise VocabularyError(f"--template: {error}") from None


def parse_outputs(given: Sequence[str], sources: Sequence[Source]) -> dict[Path, str]:
    """Format by place, from texts such as "coco=found.json".

    Args:
        given: texts "FORMAT=PLACE".
        sources: what is detected in, whose names become names of files in some formats.

    Raises:
        ArgumentError: a format is unknown, a place is missing, taken twice, a folder where a file must be or a file
            where a folder must be, a file has another ending; or two sources have one name where that is a file's.
    """
    found: dict[Path, str] = {}
    for text in given:
        kind, equals, place = text.partition("=")
        if kind not in SAVED:
            near = get_close_matches(kind, SAVED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SAVED)}"
            raise ArgumentError(f"--save {text}: no format {kind!r}; {hint}")
        if not equals or not place:
            raise ArgumentError(f"--save {text}: expected FORMAT=PLACE, as in {kind}={SAVED[kind]}")
        path = Path(place)
        in_folder = "." not in SAVED[kind]
        if in_folder and path.exists() and not path.is_dir():
            raise ArgumentError(f"--save {text}: is a file; {kind} needs a folder")
        if not in_folder and path.is_dir():
            raise ArgumentError(f"--save {text}: is a folder; give the name of a file")
        ending = Path(SAVED[kind]).suffix
        if not in_folder and path.suffix.lower() != ending:
            raise ArgumentError(f"--save {text}: is no place of {kind}; give a file that ends in {ending}")
        if path in found:
            raise ArgumentError(f"--save {text}: {found[path]} goes to the same place; choose another one")
        if kind.startswith("yolo"):
            _require_own_names(text, sources)
        if kind == "fiftyone" and any(isinstance(source, Video | Camera) for source in sources):
            raise ArgumentError(f"--save {text}: takes images, and a frame has no file; save the others as coco or csv")
        found[path] = kind
    return found


def _require_own_names(text: str, sources: Sequence[Source]) -> None:
    # The file with the names of the classes is there too.
    taken: dict[str, str] = {"classes": "the list of the classes"}
    for source in sources:
        stem = Path(file_name(source)).stem
        if stem in taken:
            raise ArgumentError(f"--save {text}: {taken[stem]} and {source} would be one file; detect them one by one")
        taken[stem] = str(source)


def _folder_sources(folder: Path) -> list[Source]:
    known = (*image_endings(), *VIDEO_ENDINGS)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in known and p.is_file())
    if not found:
        raise ArgumentError(f"{folder}: no images in this folder; folders in it are not looked into")
    return [_of_path(path) for path in found]


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
