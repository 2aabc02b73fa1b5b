"""Crops turned into embeddings: each by its crop alone, in batches that the memory holds."""

import pytest
import torch

from ezsd.errors import TeacherError
from ezsd.pipeline.extraction.encoder import SHORT, CropEncoder
from ezsd.pipeline.extraction.teacher import configured_teacher
from tests.pretend_gpu import pretend_gpu


@pytest.fixture(scope="module")
def teacher(quick_config):
    return configured_teacher(quick_config.teacher, "cpu")


@pytest.fixture
def image():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 96, 96), generator=random, dtype=torch.uint8)
    corner = torch.rand(70, 2, generator=random) * 60
    return pixels, torch.cat([corner, corner + 8 + 20 * torch.rand(70, 2, generator=random)], 1)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
)


class SmallMemory:
    """The real teacher on a device that holds no more than some crops at once."""

    def __init__(self, teacher, most, error=OUT_OF_MEMORY[0]):
        self._teacher, self._most, self._error, self.seen = teacher, most, error, []

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def encode_image(self, pixels):
        if len(pixels) > self._most:
            raise self._error
        self.seen.append(len(pixels))
        return self._teacher.encode_image(pixels)


class Elsewhere:
    """The real teacher as a plug-in that gives its results on a GPU, and has no attribute `device`."""

    def __init__(self, teacher):
        self._teacher = teacher

    def __getattr__(self, name):
        if name == "device":
            raise AttributeError(name)
        return getattr(self._teacher, name)

    def encode_image(self, pixels):
        return self._teacher.encode_image(pixels).to("cuda")


def test_embeddings_of_a_teacher_that_computes_elsewhere_come_back(teacher, image, quick_config):
    with pretend_gpu():
        wanted, _ = CropEncoder(teacher, quick_config).encode(*image)
        found, _ = CropEncoder(Elsewhere(teacher), quick_config).encode(*image)
    assert found.device == image[0].device
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_large_a_batch_is_halved_for_good_and_says_the_same(error, teacher, image, with_settings, caplog):
    config = with_settings(build={"batch_size": 64})
    wanted, passes = CropEncoder(teacher, config).encode(*image)
    small = SmallMemory(teacher, 20, error)
    encoder = CropEncoder(small, config)
    found, again = encoder.encode(*image)
    assert torch.equal(found, wanted)
    assert passes == again == 70
    assert small.seen == [16, 16, 16, 16, 16]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: going on with 32 crops at once",
        "out of memory: going on with 16 crops at once",
    ]
    encoder.encode(*image)
    assert len(caplog.records) == 2


def test_a_memory_for_less_than_the_shortest_batch_is_one_clear_line(teacher, image, quick_config):
    encoder = CropEncoder(SmallMemory(teacher, SHORT - 1), quick_config)
    with pytest.raises(TeacherError, match=r"tiny-shapes: out of memory with 16 crops at once, .*; use a machine"):
        encoder.encode(*image)


def test_boxes_with_the_same_crop_share_a_pass(teacher, image, quick_config):
    pixels, boxes = image
    found, passes = CropEncoder(teacher, quick_config).encode(pixels, torch.cat([boxes, boxes.flip(0)]))
    assert passes == 70
    assert torch.equal(found[:70], found[70:].flip(0))


def test_other_errors_are_not_taken_for_it(teacher, image, quick_config):
    broken = SmallMemory(teacher, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        CropEncoder(broken, quick_config).encode(*image)
