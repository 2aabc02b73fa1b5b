"""Frames of videos and cameras, and writing of videos, by OpenCV. The only module where it is imported."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import rename
from ezsd.pipeline.data.images import MAX_PIXELS
from ezsd.pipeline.data.sources import WRITTEN_VIDEOS, Camera, Video
from ezsd.pipeline.errors import ArgumentError, ImageError

log = logging.getLogger("ezsd")

_USUAL_RATE = 25.0
"""Frames a second where a video or camera does not say."""
_FASTEST = 1000.0
_HEAD_BYTES = 16
_LOST = 2
"""Frames less than a header states from which on a video is said to have ended early: some headers count roughly."""


def _opencv() -> Any:  # noqa: ANN401 - a module
    # What damaged videos make FFmpeg say names no file: the errors here do.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise ArgumentError("videos and cameras need OpenCV; pip install 'ezsd[video]'") from error
    return cv2


class FrameReader:
    """Frames of a video or a camera, in order.

    Args:
        source: the video or camera.
        step: each `step`-th frame is read, from the first on; >= 1.
        most: most frames to read; None for all.

    Raises:
        ImageError: it cannot be opened, is no video, or its frames are too large.
        ArgumentError: OpenCV is not installed.
    """

    def __init__(self, source: Video | Camera, *, step: int = 1, most: int | None = None) -> None:
        self.source, self._step, self._most = source, step, most
        cv2 = _opencv()
        if isinstance(source, Video):
            _require_video(source.path)
            self._capture = cv2.VideoCapture(str(source.path.absolute()), cv2.CAP_FFMPEG)
        else:
            self._capture = cv2.VideoCapture(source.number)
        if not self._capture.isOpened():
            self.close()
            cure = "is a camera connected, and may you read it?" if isinstance(source, Camera) else "is it damaged?"
            raise ImageError(f"{source}: cannot be opened; {cure}")
        width, height, rate, stated = (
            self._capture.get(value)
            for value in (
                cv2.CAP_PROP_FRAME_WIDTH,
                cv2.CAP_PROP_FRAME_HEIGHT,
                cv2.CAP_PROP_FPS,
                cv2.CAP_PROP_FRAME_COUNT,
            )
        )
        if width * height > MAX_PIXELS:
            self.close()
            raise ImageError(
                f"{source}: has frames of {width:.0f} x {height:.0f}, at most {MAX_PIXELS:,} pixels are read"
            )
        self.rate = (rate if 0 < rate <= _FASTEST else _USUAL_RATE) / step
        """Frames a second, of those that are read."""
        self._stated = int(stated) if isinstance(source, Video) and 0 < stated < 2**53 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file or the camera go."""
        self._capture.release()

    @property
    def frames(self) -> int | None:
        """Number of frames to read, as the header states it; None for a camera without an end."""
        stated = None if self._stated is None else -(-self._stated // self._step)
        return min((number for number in (stated, self._most) if number is not None), default=None)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number from 0 and pixels (H, W, 3) uint8 RGB of each frame.

        Raises:
            ImageError: there is no frame.
        """
        read = 0
        for number in count():
            if read == self._most:
                return
            if number % self._step:
                if not self._capture.grab():
                    break
                continue
            there, frame = self._capture.read()
            if not there:
                break
            read += 1
            yield number, np.ascontiguousarray(frame[..., ::-1])
        if not read:
            raise ImageError(f"{self.source}: no frame of it can be read")
        if self._stated is not None and number <= self._stated - _LOST:
            log.warning("%s: ended after %d of the %d frames that its header states", self.source, number, self._stated)


def _require_video(path: Path) -> None:
    """ImageError unless a file begins as one of the containers that are read.

    FFmpeg would take lists of other files and addresses under any name.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    is_known = (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or head[:4] in (b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
    )
    if not is_known:
        raise ImageError(f"{path}: is not a video of a container that is read (MP4, MOV, Matroska, WebM, AVI, MPEG)")


class VideoFile:
    """A video that is written frame by frame and appears when it is whole.

    Args:
        path: its ending is one of `WRITTEN_VIDEOS`; its folder is made.
        rate: frames a second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self._rate = path, rate
        self._draft = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._writer: Any = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame (H, W, 3) uint8 RGB; all have the size of the first.

        Raises:
            ArgumentError: no video can be written there.
        """
        if self._writer is None:
            cv2 = _opencv()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter_fourcc(*WRITTEN_VIDEOS[self.path.suffix.lower()])
            size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._draft.absolute()), cv2.CAP_FFMPEG, codec, self._rate, size)
            if not self._writer.isOpened():
                self._writer = None
                raise ArgumentError(f"`out={self.path}`: no video can be written there; choose another place")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def finish(self) -> None:
        """Put the video in its place; without a frame there is none."""
        if self._writer is not None:
            self._writer.release()
            rename(self._draft, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.release()
            self._draft.unlink(missing_ok=True)
