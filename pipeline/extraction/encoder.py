"""Boxes of an image turned into crops and embeddings, in batches that the memory holds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ezsd.crops import crop_boxes, distinct_crops, normalised_crops
from ezsd.errors import TeacherError, quantity
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.devices import is_out_of_memory, more_memory, said_instead
from ezsd.teacher.open_clip import OpenClipTeacher, Teacher, encode_crops
from ezsd.transfer import to_device

log = logging.getLogger("ezsd")

SHORT = 16
"""Batches are never shorter: a matrix product of few rows adds in another order."""


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Compute with one thread meanwhile: sums are then added in one order, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class CropEncoder:
    """Encoder of an image's boxes: crops them and shows the crops to the teacher.

    On a CPU an embedding depends only on its crop, whatever is encoded beside it: batches never cross an image, and
    short ones are filled up. So images may be encoded in any order and by any number of processes, and a batch may be
    halved. A GPU's libraries choose kernels by the size of a batch, and the last bit may differ with it.

    Args:
        teacher: looks at crops.
        config: how boxes are cropped, and how many crops the teacher is shown at once.
    """

    def __init__(self, teacher: Teacher, config: Config) -> None:
        self.teacher, self._crops = teacher, config.proposals
        self.batch = config.build.batch_size
        """Crops per call of the teacher; halved, for good, where the memory is too small."""

    @torch.no_grad()
    def encode(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, int]:
        """Unit embeddings (R, D) float32 of boxes, and how many crops were encoded. The host waits for nothing.

        Boxes with the same crop share one pass. The embeddings are where the pixels are.

        Args:
            pixels: (3, H, W) uint8, where the teacher is.
            boxes: (R, 4) in pixels of the image, on the CPU.

        Raises:
            TeacherError: the memory is too small for the shortest batch.
        """
        _, height, width = pixels.shape
        ratio, surround = self._crops.crop_ratio, self._crops.padding
        first, crop = distinct_crops(boxes, ratio=ratio, surround=surround, width=width, height=height)
        parts = [torch.zeros(0, self.teacher.embed_dim, device=pixels.device)]
        done = 0
        while done < len(first):
            chunk = boxes[first[done : done + self.batch]]
            part = self._embed(pixels, chunk)
            if isinstance(part, str):
                self._halve(part, pixels.device)
                continue
            parts.append(part)
            done += len(chunk)
        embedding = torch.cat(parts)
        return embedding[to_device(crop, embedding.device)], len(first)

    def _embed(self, pixels: Tensor, boxes: Tensor) -> Tensor | str:
        """Embeddings of one batch; `said_instead` when the memory is too small for it."""
        filled = torch.cat([boxes, boxes[:1].expand(max(0, SHORT - len(boxes)), 4)])
        try:
            # A plug-in need not say where it computes; scores are made where the pixels are.
            return to_device(self._shown(pixels, filled).float()[: len(boxes)], pixels.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return said_instead(error)

    def _shown(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        size, ratio, surround = self.teacher.input_size, self._crops.crop_ratio, self._crops.padding
        if pixels.device.type == "cpu" or not isinstance(self.teacher, OpenClipTeacher):
            return encode_crops(self.teacher, crop_boxes(pixels, boxes, size=size, ratio=ratio, surround=surround))
        gain, shift, dtype = self.teacher.gain, self.teacher.shift, self.teacher.dtype
        return self.teacher.encode_normalised(
            normalised_crops(
                pixels, boxes, size=size, ratio=ratio, surround=surround, gain=gain, shift=shift, dtype=dtype
            )
        )

    def _halve(self, said: str, device: torch.device) -> None:
        """Called once the failed batch's own memory is free again."""
        if self.batch <= SHORT:
            raise TeacherError(
                f"teacher {self.teacher.name}: out of memory with {self.batch} crops at once{said}, and fewer are not "
                f"shown; {more_memory(device)}"
            )
        self.batch = max(SHORT, self.batch // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %s at once", quantity(self.batch, "crop"))
