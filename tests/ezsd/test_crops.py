"""What a teacher sees of a box, against Pillow."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ezsd.crops import _windows, crop_boxes, distinct_crops, normalised_crops, with_least_side
from ezsd.kernels import crops
from ezsd.proposals.select import faithful_anchors

WIDTH, HEIGHT = 90, 70
NASTY = {
    "inside": (20.3, 11.7, 52.1, 40.9),
    "whole image": (0, 0, WIDTH, HEIGHT),
    "upper left corner": (0, 0, 13.5, 9.2),
    "lower right corner": (70.5, 61.0, WIDTH, HEIGHT),
    "one pixel wide": (44, 5, 45, 66),
    "one pixel high": (3, 30, 88, 31),
    "one pixel": (30, 30, 31, 31),
    "portrait": (10, 2, 21, 69),
    "landscape": (1, 50, 89, 61),
    "thinner than a pixel": (40.2, 20.0, 40.4, 50.0),
    "already of the right size": (20, 20, 52, 52),
}


def windows_of(boxes, **options):
    return [tuple(window) for window in _windows(boxes, surround="black", **options).tolist()]


@pytest.fixture(scope="module")
def image():
    """Noise over a gradient, one half saturated: bicubic overshoot has to be cut off there."""
    generator = np.random.default_rng(3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([x * 2, y * 3, x + y], 2) + generator.normal(0, 40, (HEIGHT, WIDTH, 3))
    pixels[:, WIDTH // 2 :] = np.where(generator.random((HEIGHT, WIDTH - WIDTH // 2, 1)) < 0.5, 0, 255)
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(2, 0, 1)


def pillow_crop(image, box, *, size, ratio, surround="black"):
    """The specification, one box at a time: enlarge, round outwards, clamp, black square, bicubic."""
    height, width = image.shape[1:]
    x1, y1, x2, y2 = np.array(box, np.float32)
    if surround == "context":
        x, y, half = (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1) / 2
        x1, y1, x2, y2 = x - half, y - half, x + half, y + half
    x1, y1, x2, y2 = float(x1), float(y1), float(x2), float(y2)
    dx, dy = (x2 - x1) * (ratio - 1) / 2, (y2 - y1) * (ratio - 1) / 2
    left, top = max(math.floor(x1 - dx), 0), max(math.floor(y1 - dy), 0)
    right, bottom = min(math.ceil(x2 + dx), width), min(math.ceil(y2 + dy), height)
    window = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, right, bottom))
    side = max(window.size)
    square = Image.new("RGB", (side, side))
    square.paste(window, ((side - window.width) // 2, (side - window.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("ratio", [1.0, 1.2])
@pytest.mark.parametrize("surround", ["black", "context"])
@pytest.mark.parametrize("box", NASTY.values(), ids=NASTY)
def test_crops_agree_with_pillow(image, box, surround, ratio, size):
    found = crop_boxes(image, torch.tensor([box]), size=size, ratio=ratio, surround=surround)
    assert found.dtype == torch.uint8
    expected = pillow_crop(image, box, size=size, ratio=ratio, surround=surround).astype(int)
    difference = np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected)
    # Both round fixed-point weights, not at the same place.
    assert difference.mean() <= 1
    assert difference.max() <= 4


@pytest.mark.parametrize("size", [24, 32, 224])
@pytest.mark.parametrize("ratio", [1.0, 1.2])
@pytest.mark.parametrize("surround", ["black", "context"])
def test_all_windows_at_once_agree_with_pillow_to_a_grey_level(image, surround, ratio, size, monkeypatch):
    # As on a GPU without Triton, and in several goes.
    monkeypatch.setattr("ezsd.kernels.crops._ELEMENTS", 3 * HEIGHT * size * 4)
    boxes, (gain, shift) = torch.tensor(list(NASTY.values())), (torch.ones(3), torch.zeros(3))
    options = {"size": size, "ratio": ratio, "surround": surround}
    found = normalised_crops(image, boxes, **options, gain=gain, shift=shift, dtype=torch.uint8)
    for box, crop, torchs in zip(NASTY.values(), found, crop_boxes(image, boxes, **options), strict=True):
        expected = torch.from_numpy(pillow_crop(image, box, **options).copy()).permute(2, 0, 1)
        assert (crop.int() - expected.int()).abs().max() <= 1
        assert (crop.int() - torchs.int()).abs().max() <= 4
    scaled = normalised_crops(image, boxes, **options, gain=gain / 100, shift=shift - 1, dtype=torch.float32)
    torch.testing.assert_close(scaled, found.float() / 100 - 1)


@pytest.mark.parametrize("shape", [(40, 97), (97, 40), (1, 50), (50, 1)])
def test_crops_of_other_image_shapes_agree_with_pillow(shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    box = (0, 0, shape[1], shape[0])
    found = (
        crop_boxes(image, torch.tensor([box]).float(), size=32, ratio=1.2, surround="black")[0].permute(1, 2, 0).numpy()
    )
    assert np.abs(found.astype(int) - pillow_crop(image, box, size=32, ratio=1.2)).mean() <= 1


def test_the_margin_is_black_and_the_box_in_the_middle():
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    crop = crop_boxes(white, torch.tensor([[40.0, 10.0, 60.0, 90.0]]), size=80, ratio=1.0, surround="black")[0]
    assert (crop[:, :, 30:50] == 255).all()
    assert (crop[:, :, :30] == 0).all()
    assert (crop[:, :, 50:] == 0).all()


def test_with_context_the_box_stays_in_the_middle_of_what_lies_around_it():
    image = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    image[:, 10:90, 40:60] = 255
    crop = crop_boxes(image, torch.tensor([[40.0, 10.0, 60.0, 90.0]]), size=80, ratio=1.0, surround="context")[0]
    assert torch.equal(crop, image[:, 10:90, 10:90])


def test_ratio_enlarges_about_the_centre():
    windows = windows_of(torch.tensor([[20.0, 30.0, 40.0, 40.0]]), ratio=1.2, width=WIDTH, height=HEIGHT)
    assert windows == [(18, 29, 42, 41)]


def test_crops_keep_the_order_of_the_boxes(image):
    boxes = torch.tensor(list(NASTY.values()), dtype=torch.float32)
    # Windows of one size, of one longer side, and more of them than are resampled at once.
    alike = torch.tensor([[x, x % 7, x + wide, x % 7 + 12] for x in range(20) for wide in (12, 7)])
    boxes = torch.cat([boxes, alike])
    together = crop_boxes(image, boxes, size=16, ratio=1.2, surround="black")
    for box, crop in zip(boxes, together, strict=True):
        assert torch.equal(crop_boxes(image, box[None], size=16, ratio=1.2, surround="black")[0], crop)


def test_the_image_is_left_alone(image):
    before = image.clone()
    crop_boxes(image, torch.tensor([[0.0, 0.0, WIDTH, HEIGHT]]), size=16, ratio=1.2, surround="black")
    assert torch.equal(image, before)


@pytest.mark.parametrize("surround", ["black", "context"])
def test_no_boxes_make_no_crops(image, surround):
    options = {"size": 32, "ratio": 1.2, "surround": surround}
    assert crop_boxes(image, torch.zeros(0, 4), **options).shape == (0, 3, 32, 32)
    scale = {"gain": torch.ones(3), "shift": torch.zeros(3), "dtype": torch.bfloat16}
    assert normalised_crops(image, torch.zeros(0, 4), **options, **scale).shape == (0, 3, 32, 32)


coordinate = st.floats(-50, 150, width=32)


@given(
    corners=st.tuples(coordinate, coordinate, coordinate, coordinate),
    ratio=st.floats(1, 2),
    width=st.integers(1, 100),
    height=st.integers(1, 100),
)
def test_windows_are_never_empty_and_inside_the_image(corners, ratio, width, height):
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    box = torch.tensor([[x1, y1, x2, y2]])
    ((left, top, right, bottom),) = windows_of(box, ratio=ratio, width=width, height=height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(
    corner=st.tuples(st.floats(0, 60, width=32), st.floats(0, 50, width=32)),
    extent=st.tuples(st.floats(0.125, 30, width=32), st.floats(0.125, 20, width=32)),
    ratio=st.floats(1, 2),
)
def test_windows_cover_the_enlarged_box_and_less_than_a_pixel_more(corner, extent, ratio):
    box = torch.tensor([[*corner, corner[0] + extent[0], corner[1] + extent[1]]])
    ((left, top, right, bottom),) = windows_of(box, ratio=ratio, width=WIDTH, height=HEIGHT)
    x1, y1, x2, y2 = box[0].tolist()
    dx, dy = (x2 - x1) * (ratio - 1) / 2, (y2 - y1) * (ratio - 1) / 2
    slack = 1 + 1e-9
    assert max(x1 - dx, 0) - slack < left <= max(x1 - dx, 0) + 1e-9
    assert max(y1 - dy, 0) - slack < top <= max(y1 - dy, 0) + 1e-9
    assert min(x2 + dx, WIDTH) - 1e-9 <= right < min(x2 + dx, WIDTH) + slack
    assert min(y2 + dy, HEIGHT) - 1e-9 <= bottom < min(y2 + dy, HEIGHT) + slack


@pytest.mark.parametrize("surround", ["black", "context"])
def test_boxes_share_a_crop_where_their_crops_are_the_same_pixels(image, surround):
    boxes = faithful_anchors(WIDTH, HEIGHT)[::11]
    boxes = torch.cat([boxes, boxes[:40], boxes[5:9] + 1e-4])
    settings = {"ratio": 1.2, "surround": surround}
    first, crop = distinct_crops(boxes, **settings, width=WIDTH, height=HEIGHT)
    whole = crop_boxes(image, boxes, size=24, **settings)
    assert torch.equal(crop_boxes(image, boxes[first], size=24, **settings)[crop], whole)
    assert len(first) < len(boxes) - 40
    assert first.tolist() == sorted(set(first.tolist()))
    assert crop[first].tolist() == list(range(len(first)))


def test_without_boxes_there_are_no_crops():
    first, crop = distinct_crops(torch.zeros(0, 4), ratio=1.0, surround="black", width=WIDTH, height=HEIGHT)
    assert len(first) == len(crop) == 0


def test_a_least_side_widens_about_the_centre_what_is_shorter():
    boxes = torch.tensor([[4.0, 4, 6, 20], [4, 4, 14, 14], [0, 0, 1, 1]])
    wide = with_least_side(boxes, 10)
    assert wide.tolist() == [[0, 4, 10, 20], [4, 4, 14, 14], [-4.5, -4.5, 5.5, 5.5]]
    assert torch.equal(with_least_side(boxes, 0), boxes)


def test_wide_images_are_cropped_within_the_bound_of_numbers_held(monkeypatch):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                self.seen = max(self.seen, result.numel())
            return result

    image = torch.randint(0, 256, (3, 4, 4000), dtype=torch.uint8)
    windows = torch.tensor([[0, 0, 8, 4]] * 40, dtype=torch.int32)
    wanted = crops.eager(image, windows, torch.ones(3), torch.zeros(3), 16, torch.uint8)
    monkeypatch.setattr(crops, "_ELEMENTS", 2**18)
    with Largest() as largest:
        found = crops.eager(image, windows, torch.ones(3), torch.zeros(3), 16, torch.uint8)
    assert 2**16 < largest.seen <= 2**18
    assert torch.equal(found, wanted)
