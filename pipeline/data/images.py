"""Reading of image files: one rule for all parts, and one line for each way in which it fails."""

from __future__ import annotations

import io
import logging
import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, Union
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ezsd.errors import quantity
from ezsd.pipeline.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

Exif: TypeAlias = Literal["turn", "ignore", "legacy"]
"""Rule for an image's EXIF orientation.

"turn": the image is turned as viewers show it, unless only its stored size is the one that annotations state.
"ignore": never. "legacy": never, and every mode goes through Pillow's `convert("RGB")`: the rule of stores that do not
say how they read images.
"""

ImageLike: TypeAlias = Union[str, os.PathLike[str], Image.Image, NDArray[Any], "Tensor"]
"""Forms of an image that `to_image` accepts."""


class ImageFile(Protocol):
    """An image file by its name: a `Path`, or what opens like one."""

    def open(self, mode: Literal["rb"], /) -> AbstractContextManager[IO[bytes]]:
        """Open the file for reading its bytes. OSError when they cannot be read."""

    def is_file(self) -> bool:
        """Test whether the file exists."""


_BEYOND = 0.01
"""Tolerance by which floating values may be outside [0, 1]."""

log = logging.getLogger("ezsd")

MAX_PIXELS = 180_000_000
"""Larger images are refused; as RGB they would fill 540 MB."""
MAX_URL_BYTES = 256 * 2**20
"""Larger files behind URLs are refused."""
URL_SECONDS = 60.0
"""Time that an image behind a URL may take to arrive, seconds."""
# The limit is our own: Pillow's would warn on stderr at half of it, and has no cure to offer.
Image.MAX_IMAGE_PIXELS = None
# Of EXIF nothing but the orientation is read; what else in it is cut short harms nobody.
warnings.filterwarnings("ignore", message="(Possibly c|C)orrupt EXIF data", category=UserWarning)

ALPHA_COLOUR = "white"
"""Colour that transparent pixels are composited on."""

SIXTEEN_BITS = "16-bit grey, divided by 257 and rounded"
ALPHA = f"transparency, composited on {ALPHA_COLOUR}"

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
_WIDE_MODES = {"I": "32-bit integers", "F": "32-bit floats"}

_ORIENTATION = 0x0112
FORMATS = (
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
"""Formats that are read, by Pillow's names. Pillow knows others: it starts Ghostscript for EPS, which runs the file."""
_STRIP = 2**22
"""Pixels that are converted at a time."""
_STORED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: shown[:, ::-1].swapaxes(0, 1),
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: shown[::-1].swapaxes(0, 1),
}
"""For each EXIF orientation a view of shown pixels (H, W, 3) as they are stored."""
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, ArithmeticError, LookupError, TypeError),
    *(AttributeError, AssertionError, struct.error, zlib.error),
)
"""Errors of Pillow's decoders about damaged files: SyntaxError of a broken table of EXIF, ValueError of a broken head
of a PNG, and most others of whatever they do not check. Too little memory says nothing about an image."""

_NAMED = 3
"""Most images that one error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Reading of an image file, as far as its first bytes determine it."""

    size: tuple[int, int]
    """Width and height as read, pixels."""
    stored: tuple[int, int]
    """Width and height as stored, pixels."""
    orientation: int
    """Orientation by EXIF, 1 to 8; 1 where it says nothing."""
    turned: bool
    """True if the orientation is applied."""
    conversion: str
    """`SIXTEEN_BITS`, `ALPHA`, or "" where nothing but the colour space can change."""

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height as viewers show the image, pixels."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def require_size(self, path: ImageFile | str, stated: tuple[int, int], exif: Exif) -> None:
        """ImageError, which names EXIF where that explains it, for an image of another size than annotations state."""
        if self.size == stated:
            return
        text = f"{path}: the annotations say {stated[0]} x {stated[1]} pixels, the file has {_by(self.size)}"
        if self.shown != self.size:
            turned = f"{_by(self.shown)} when turned by its EXIF orientation ({self.orientation})"
            ignored = ', which this dataset ignores (exif = "ignore")' if exif == "ignore" else ""
            text += f", or {turned}{ignored}"
        raise ImageError(text)


def image_endings() -> tuple[str, ...]:
    """Endings of the names of images that are read, in lower case and with the dot."""
    # MPO is JPEG with more pictures behind the first.
    return tuple(ending for ending, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))


@cache
def _known_formats() -> tuple[str, ...]:
    """Formats of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def look(path: ImageFile, stated: tuple[int, int] | None = None, exif: Exif = "turn") -> Reading:
    """Find how an image is read, without reading its pixels.

    Args:
        path: the file.
        stated: width and height by the annotations; None where there are none.
        exif: the dataset's rule.

    Raises:
        ImageError: it is missing, no image, too large, or of a mode that cannot be read.
    """
    with opened_image(path) as image:
        return _reading(path, image, stated, exif)


def read_pixels(path: ImageFile, stated: tuple[int, int] | None = None, exif: Exif = "turn") -> NDArray[np.uint8]:
    """The pixels of an image, (H, W, 3) uint8 RGB; the only place where image files are decoded.

    Modes of 8 bits become RGB. 16-bit grey is divided by 257 and rounded. Transparency is composited on `ALPHA_COLOUR`.
    Of several frames the first is read.

    Args:
        path: the file.
        stated: width and height by the annotations, which the image must have; None takes any size.
        exif: the dataset's rule.

    Raises:
        ImageError: it is missing, damaged, no image, too large, of a mode that cannot be read or of another size.
    """
    with opened_image(path) as image:
        return _pixels(path, image, stated, exif)


def _pixels(path: ImageFile | str, image: Image.Image, stated: tuple[int, int] | None, exif: Exif) -> NDArray[np.uint8]:
    reading = _reading(path, image, stated, exif)
    if stated is not None:
        reading.require_size(path, stated, exif)
    if exif == "legacy":
        _warn_of_legacy(path, image)
    image.load()
    pixels = np.empty((reading.size[1], reading.size[0], 3), np.uint8)
    stored = _STORED[reading.orientation if reading.turned else 1](pixels)
    # A large image and copies of it in other modes would not fit in 2 GB.
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        rgb = strip.convert("RGB") if exif == "legacy" else _to_rgb(strip, reading.conversion)
        stored[top:bottom] = np.asarray(rgb)
    return pixels


def reads_as_before(path: ImageFile, reading: Reading) -> bool:
    """Test whether the mode's rule makes the same pixels as `convert("RGB")`; decodes images with transparency.

    Raises:
        ImageError: it has transparency and is damaged.
    """
    if reading.conversion != ALPHA:
        return not reading.conversion
    with opened_image(path) as image:
        return _opaque(image.convert("RGBA"))


def _reading(path: ImageFile | str, image: Image.Image, stated: tuple[int, int] | None, exif: Exif) -> Reading:
    if exif == "legacy":
        return Reading(size=image.size, stored=image.size, orientation=1, turned=False, conversion="")
    orientation = _orientation(image)
    shown = image.size[::-1] if orientation >= 5 else image.size
    turned = exif == "turn" and orientation > 1 and stated in (None, shown)
    return Reading(
        size=shown if turned else image.size,
        stored=image.size,
        orientation=orientation,
        turned=turned,
        conversion=_conversion(path, image),
    )


_told: set[str] = set()
"""Warnings that `_warn_of_legacy` has given in this process."""


def _warn_of_legacy(path: ImageFile | str, image: Image.Image) -> None:
    """Say once for each kind that an image is read otherwise than a new store would read it."""
    kinds = {
        f"an EXIF orientation ({_orientation(image)})": _orientation(image) > 1,
        f"pixels of mode {image.mode}": image.mode not in _EIGHT_BIT_MODES or image.has_transparency_data,
    }
    for kind, there in kinds.items():
        if there and kind not in _told:
            _told.add(kind)
            log.warning(
                "%s: has %s, which the store was built without heeding, and is read the same way now; build the store "
                "again to read such images by the rule of docs/datasets.md",
                path,
                kind,
            )


def _orientation(image: Image.Image) -> int:
    """Orientation by EXIF or XMP ahead of the pixels, 1 to 8; 1 where they state none that is known.

    What follows a PNG's pixels does not count: `look` and `read_pixels` must agree. Pillow itself turns TIFF files.
    """
    if image.format == "TIFF":
        return 1
    said = Image.Image.getexif(image).get(_ORIENTATION)
    return said if said in _STORED else 1


def _conversion(path: ImageFile | str, image: Image.Image) -> str:
    if image.mode in _SIXTEEN_BIT_MODES:
        return SIXTEEN_BITS
    if image.mode not in (*_EIGHT_BIT_MODES, *_ALPHA_MODES):
        meaning = f" ({_WIDE_MODES[image.mode]})" if image.mode in _WIDE_MODES else ""
        raise ImageError(
            f"{path}: has pixels of mode {image.mode}{meaning}, expected 8 bits per channel or 16-bit grey. Scale them "
            "to 0..255 and save the image as 8-bit grey or RGB"
        )
    return ALPHA if image.has_transparency_data else ""


def _to_rgb(image: Image.Image, conversion: str) -> Image.Image:
    if conversion == SIXTEEN_BITS:
        wide = np.asarray(image).astype(np.uint32)
        grey = ((wide + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[wide == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if conversion == ALPHA:
        rgba = image.convert("RGBA")
        if not _opaque(rgba):
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, ALPHA_COLOUR), rgba)
        return rgba.convert("RGB")
    return image.convert("RGB")


def _opaque(rgba: Image.Image) -> bool:
    return rgba.getchannel("A").getextrema() == (255, 255)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def most_bad_images(share: float, images: int) -> int:
    """Largest number of images that a build may leave out, given `BuildConfig.max_bad_images`."""
    return int(share * images)


def require_few_bad(bad: Mapping[int, str], most: int) -> None:
    """Stop a build when more images cannot be read than it may leave out.

    Args:
        bad: by id, why.
        most: how many may be left out.

    Raises:
        ImageError: names the first ones.
    """
    if len(bad) > most:
        named = [bad[image] for image in sorted(bad)[:_NAMED]] + ["..."] * (len(bad) > _NAMED)
        raise ImageError(
            f"{quantity(len(bad), 'image')} cannot be read, build.max_bad_images allows {most}: {'; '.join(named)}; "
            "mend them or raise the limit, and run the same command again"
        )


@contextmanager
def opened_image(path: ImageFile | str, file: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """An image file; only its start is read before somebody asks for more.

    Args:
        path: the file, or what errors call it.
        file: its content, where it is not a file of this machine.

    Raises:
        ImageError: it is missing, no image or too large, or damage shows within the context.
    """
    with _image_errors(path), ExitStack() as stack:
        if file is None:
            # Pillow maps a file of this machine.
            opened = path if isinstance(path, Path | str) else stack.enter_context(path.open("rb"))
        else:
            opened = file
        image = stack.enter_context(Image.open(opened, formats=_known_formats()))
        _require_pixels(path, image)
        yield image


@contextmanager
def _image_errors(path: ImageFile | str) -> Iterator[None]:
    """Turn what Pillow says of an image into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: is not an image of a format that is read ({', '.join(FORMATS)})") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read: {reason}") from error


def _require_pixels(path: ImageFile | str, image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError(
            f"{path}: has {_by(image.size)} = {pixels:,} pixels, at most {MAX_PIXELS:,} are read. Scale it down or cut "
            "it into tiles, and its boxes with it"
        )


def to_image(source: ImageLike) -> Tensor:
    """(3, H, W) uint8 RGB of whatever holds an image.

    Args:
        source: a file or a URL of fsspec, read as `read_pixels` reads; a PIL image, by the same rules, so one that was
            opened from a file is turned by its EXIF orientation; an array (H, W, 3) RGB or (H, W) uint8; or a tensor
            (3, H, W) RGB, uint8 or floating in [0, 1].

    Raises:
        ImageError: it cannot be read, or is something else.
    """
    image = _to_image(source)
    if not image.numel():
        raise ImageError(f"expected an image of at least one pixel, found {image.shape[2]} x {image.shape[1]}")
    return image


def _to_image(source: ImageLike) -> Tensor:
    import torch

    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        if text.startswith("file:///"):
            return read_image(Path(url2pathname(urlsplit(text).path)))
        return to_tensor(_fetched(text)) if "://" in text else read_image(Path(text))
    if isinstance(source, Image.Image):
        return to_tensor(_pixels_of_picture(source))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,)):
            raise ImageError(f"expected an array (H, W, 3) or (H, W) uint8, found {source.shape} {source.dtype}")
        return to_tensor(np.array(source) if source.ndim == 3 else np.stack([source] * 3, axis=2))
    if isinstance(source, torch.Tensor):
        return _pixels_of_tensor(source)
    raise ImageError(f"expected a path, URL, PIL image, array or tensor, found {type(source).__name__}")


def _pixels_of_picture(picture: Image.Image) -> NDArray[np.uint8]:
    """Read the pixels of a PIL image; one that comes from no file was turned by whoever made it."""
    name = "the image"
    with _image_errors(name):
        _require_pixels(name, picture)
        try:
            picture.load()
        except AssertionError as error:
            raise ImageError(f"{name}: is closed; use it within its `with`, or load() it there") from error
        return _pixels(name, picture, None, "turn" if picture.format else "ignore")


def _pixels_of_tensor(source: Tensor) -> Tensor:
    import torch

    if source.ndim != 3 or len(source) != 3 or not (source.dtype == torch.uint8 or source.is_floating_point()):
        raise ImageError(
            f"expected a tensor (3, H, W), uint8 or floating in [0, 1], found {tuple(source.shape)} {source.dtype}"
        )
    pixels = source.detach().cpu()
    if pixels.dtype == torch.uint8 or not pixels.numel():
        return pixels
    least, most = float(pixels.min()), float(pixels.max())
    # A resizing may leave the range by a little.
    if not -_BEYOND <= least <= most <= 1 + _BEYOND:
        raise ImageError(f"expected floating values in [0, 1], found {least:g} to {most:g}")
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _fetched(url: str) -> NDArray[np.uint8]:
    return pixels_of_bytes(url, _bytes_of(url))


def _bytes_of(url: str) -> bytes:
    """Content of a URL, within `MAX_URL_BYTES` and `URL_SECONDS`. ImageError when it cannot be had."""
    import fsspec

    system_options: dict[str, object] = {}
    options: dict[str, object] = {}
    deadline = time.monotonic() + URL_SECONDS
    try:
        if url.lower().startswith(("http://", "https://")):
            import aiohttp

            system_options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=URL_SECONDS)}}
            # One request, whose answer is read piece by piece: a known size saves those that ask for it.
            options = {"block_size": 0, "size": 1}
        system, path = fsspec.url_to_fs(url, **system_options)
        with system.open(path, "rb", **options) as stream:
            return _limited(stream, url, deadline)
    except ImageError:
        raise
    except TimeoutError as error:
        raise ImageError(f"{url}: did not arrive within {URL_SECONDS:g} s; download it and give its path") from error
    except Exception as error:
        # Each file system's library has exceptions of its own, and none of them can be imported here.
        raise ImageError(f"{url}: cannot be read: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def pixels_of_bytes(name: str, data: bytes) -> NDArray[np.uint8]:
    """The pixels of an image file's content, see `read_pixels`; errors call it by `name`."""
    with opened_image(name, io.BytesIO(data)) as image:
        return _pixels(name, image, None, "turn")


def _limited(stream: IO[bytes], url: str, deadline: float) -> bytes:
    """Content of a stream. ImageError where there is too much of it, TimeoutError where it has not ended in time."""
    data = bytearray()
    while piece := stream.read(2**20):
        data += piece
        if len(data) > MAX_URL_BYTES:
            raise ImageError(f"{url}: has more than {MAX_URL_BYTES:,} bytes; download it and make it smaller")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(3, H, W) of pixels (H, W, 3), without a copy."""
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB of an image as viewers show it, see `read_pixels`. ImageError when it cannot be read."""
    return to_tensor(read_pixels(path))
