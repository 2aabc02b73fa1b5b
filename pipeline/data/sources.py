"""Places that pictures to detect in come from: image files, URLs, videos, cameras. Loads nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
"""Endings of the names of videos, in lower case and with the dot."""
WRITTEN_VIDEOS = {".avi": "MJPG", ".m4v": "mp4v", ".mkv": "mp4v", ".mov": "mp4v", ".mp4": "mp4v"}
"""Codec by the ending of a video that is written."""
FRAME_DIGITS = 6
"""Digits of a frame's number in names."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Camera:
    """A camera of this machine."""

    number: int

    def __str__(self) -> str:
        return f"camera-{self.number}"


Source: TypeAlias = Path | str | Video | Camera
"""An image file, the URL of an image, a video or a camera."""


def is_video(name: str | os.PathLike[str]) -> bool:
    """Test whether a name has the ending of a video."""
    return os.fsdecode(name).lower().endswith(VIDEO_ENDINGS)


def file_name(source: Source) -> str:
    """Last part of a source's path or URL, with its ending; a camera's has none."""
    if isinstance(source, str):
        return PurePosixPath(unquote(urlsplit(source).path)).name or "image"
    return str(source) if isinstance(source, Camera) else Path(str(source)).name


def frame_name(name: str, frame: int | None) -> str:
    """A name with the number of a frame behind it, such as "clip_000012"; without one the name itself."""
    return name if frame is None else f"{name}_{frame:0{FRAME_DIGITS}d}"
