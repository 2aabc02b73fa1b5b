"""Drawing of boxes, masks and captions over an image; for reports, `ezsd detect --out` and the README's picture."""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from ezsd.errors import quantity
from ezsd.pipeline.inference.fonts import font_for

BASE_COLOUR = "#2ecc71"
"""Colour of base classes; bright, for dark letters and a dark rim."""
NOVEL_COLOUR = "#ff5cae"
"""Colour of novel classes; lighter and bluer than the green also for eyes that do not tell red from green."""

READABLE_SIDE = 384
"""Long side that smaller images are enlarged towards, pixels."""
_DARK = "#101010"

Corners = tuple[float, float, float, float]


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    captions: Sequence[str],
    colours: str | Sequence[str] = BASE_COLOUR,
    *,
    scale: float | None = None,
    masks: Sequence[NDArray[np.bool_]] | None = None,
) -> Image.Image:
    """Draw boxes with captions over an image.

    Captions evade each other, the first ones first: give the most important boxes first.

    Args:
        image: (3, H, W) uint8 RGB.
        boxes: xyxy in the image's pixels, (N, 4); parts outside are cut off.
        captions: one per box, (N,); "" draws the box alone.
        colours: of box and caption strip, one for all or one per box; anything Pillow reads.
        scale: side of the picture over side of the image; None enlarges small images, see `fit_scale`.
        masks: one per box, (H, W), whose outline is drawn; None for none.

    Returns:
        A new RGB picture of about scale * W x scale * H pixels.

    Raises:
        ArgumentError: `EZSD_FONT` names no font file.
        ValueError: not an image, or not one box, caption, colour and mask each.
    """
    _require_drawable(image, boxes, captions, colours)
    if masks is not None and [np.shape(mask) for mask in masks] != [tuple(image.shape[1:])] * len(boxes):
        raise ValueError(f"{quantity(len(boxes), 'box needs', 'boxes need')} as many masks of the image's size")
    height, width = image.shape[1:]
    factor = fit_scale(width, height) if scale is None else scale
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    pixels = image.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    canvas = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    corners = _clipped(boxes, width, height) * factor
    each = [colours] * len(corners) if isinstance(colours, str) else list(colours)
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(min(size) / 130))
    # The last box is drawn first, so that the most important one lies on top.
    for number, (box, colour) in reversed(list(enumerate(zip(corners.tolist(), each, strict=True)))):
        _box_outline(draw, box, colour, line)
        if masks is not None:
            _mask_outline(canvas, masks[number], colour, line)
    letters = max(12.0, min(size) / 25)
    taken: list[Corners] = []
    for box, caption, colour in zip(corners.tolist(), captions, each, strict=True):
        if caption.strip():
            taken.append(_write(draw, letters, box, caption, colour, taken))
    return canvas


def jpeg_bytes(picture: Image.Image, **options: int) -> bytes:
    """A picture as a JPEG, with Pillow's options of one."""
    data = io.BytesIO()
    picture.save(data, "JPEG", optimize=True, **options)
    return data.getvalue()


def jpeg_url(picture: Image.Image, **options: int) -> str:
    """A picture as the data URL of a JPEG, with Pillow's options of one."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(picture, **options)).decode()}"


def fit_scale(width: int, height: int, side: int = READABLE_SIDE) -> float:
    """Enlargement of an image, at least 1, that brings its long side near `side` pixels.

    Whole numbers keep small images' pixels alike: 128 pixels become 384 at scale 3.
    """
    return float(max(1, side // max(width, height)))


def _require_drawable(image: Tensor, boxes: Tensor, captions: Sequence[str], colours: str | Sequence[str]) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (3, H, W) uint8 and not empty, got {tuple(image.shape)} {image.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), got {tuple(boxes.shape)}")
    if len(captions) != len(boxes):
        raise ValueError(f"{quantity(len(boxes), 'box needs', 'boxes need')} as many captions, got {len(captions)}")
    if not isinstance(colours, str) and len(colours) != len(boxes):
        raise ValueError(
            f"{quantity(len(boxes), 'box needs', 'boxes need')} one colour, or as many, got {len(colours)}"
        )


def _clipped(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes cut to the image, (N, 4) float64."""
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    return boxes.detach().cpu().double().clamp(min=0).minimum(limit)


def _box_outline(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, line: int) -> None:
    """Draw a frame of `line` pixels with a dark rim, which shows on any background."""
    x1, y1, x2, y2 = (round(v) for v in box)
    right, bottom = max(x2 - 1, x1), max(y2 - 1, y1)
    draw.rectangle((x1 - 1, y1 - 1, right + 1, bottom + 1), outline=_DARK, width=line + 2)
    draw.rectangle((x1, y1, right, bottom), outline=colour, width=line)


def _mask_outline(canvas: Image.Image, mask: NDArray[np.bool_], colour: str, line: int) -> None:
    """Draw the inner edge of a mask, `line` pixels wide, with a dark rim."""
    whole = Image.fromarray(mask).convert("L").resize(canvas.size, Image.Resampling.NEAREST)
    # Beyond the picture there is nothing: the edge is drawn there too.
    padded = ImageOps.expand(whole, border=line + 2, fill=0)
    for width, ink in ((line + 2, _DARK), (line, colour)):
        inner = padded.filter(ImageFilter.MinFilter(2 * width + 1))
        edge = ImageOps.crop(ImageChops.subtract(padded, inner), border=line + 2)
        canvas.paste(ink, mask=edge)


def _write(
    draw: ImageDraw.ImageDraw,
    size: float,
    box: Sequence[float],
    caption: str,
    colour: str,
    taken: Sequence[Corners],
) -> Corners:
    """Write one caption, with letters of `size` pixels, on a strip; returns the strip, xyxy."""
    picture_width, picture_height = draw.im.size
    padding = 3
    whole, font = font_for(" ".join(caption.split()), size)
    text = _shorten(draw, font, whole, picture_width - 2 * padding)
    # Scripts differ in height.
    _, top, _, bottom = draw.textbbox((0, 0), f"Ag{text}", font=font)
    strip_width = draw.textlength(text, font=font) + 2 * padding
    strip_height = bottom - top + 2 * padding
    strips = [
        (x, y, x + strip_width, y + strip_height)
        for x, y in _caption_positions(box, strip_width, strip_height, picture_width, picture_height)
    ]
    best = min(strips, key=lambda strip: sum(_shared_area(strip, other) for other in taken))
    draw.rectangle(best, fill=colour)
    draw.text((best[0] + padding, best[1] + padding - top), text, font=font, fill=_DARK)
    return best


def _shorten(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, width: float) -> str:
    """Shorten a text that is wider than `width` pixels to its beginning and an ellipsis."""
    if draw.textlength(text, font=font) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda n: draw.textlength(f"{text[:n]}...", font=font))
    return f"{text[: max(fitting - 1, 0)]}..."


def _caption_positions(
    box: Sequence[float], width: float, height: float, picture_width: int, picture_height: int
) -> Iterator[tuple[float, float]]:
    """Upper left corners for a strip, the preferred first: above the box, below, inside; left or right end."""
    x1, y1, x2, y2 = box
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            inside_x = min(max(x, 0.0), max(picture_width - width - 1, 0.0))
            yield inside_x, min(max(y, 0.0), max(picture_height - height - 1, 0.0))


def _shared_area(a: Corners, b: Corners) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
