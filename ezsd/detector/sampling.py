"""Balanced sampling of positive and negative regions, all images of a batch at once and without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ezsd.boxes import iou
from ezsd.transfer import to_device

_INDEX_BITS = 30
"""Bits of a key that hold the position, below 32 of the hash."""
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRegions:
    """Regions of a batch that the box head learns from; S slots per image, the first of them for objects."""

    boxes: Tensor
    """(B, S, 4); one of a slot that does not count is any box with positive sides."""
    labels: Tensor
    """(B, S) int64; background is the number of classes."""
    targets: Tensor
    """The ground-truth box of each, (B, S, 4); zeros for background."""
    objects: Tensor
    """Position of each region's object in its image's ground truth, (B, S) int64; -1 for background."""
    counted: Tensor
    """Marks the slots that hold a region, (B, S) bool."""
    object_slots: int
    """Number of slots of each image, from the first on, that may hold a region on an object."""

    @property
    def image_index(self) -> Tensor:
        """Image of each slot, (B, S) int64."""
        return image_of_rows(self.labels)


@dataclass(frozen=True, slots=True)
class Draw:
    """Positions drawn for each image, positives first."""

    rows: Tensor
    """(B, S) int64."""
    positive: Tensor
    """Marks the drawn positives, (B, S) bool."""
    counted: Tensor
    """Marks all that were drawn, (B, S) bool; the others are positions of no meaning."""


def worth_computing(marks: Tensor) -> Tensor | slice:
    """Rows to compute of the marked ones, (N,) bool: these alone on a CPU, all on a GPU.

    Their number is the host's to know: it would wait for a GPU, which computes the others meanwhile.
    """
    return slice(None) if marks.is_cuda else torch.nonzero(marks)[:, 0]


def image_of_rows(rows: Tensor) -> Tensor:
    """Image of each row of a batch's rows (B, N): (B, N) int64."""
    return torch.arange(len(rows), device=rows.device)[:, None].expand(rows.shape)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors (N, ...) of each image as one (B, most, ...), zeros below, and marks (B, most) of what is theirs.

    There is at least one row per image.
    """
    most = max(1, *(len(one) for one in rows))
    padded = rows[0].new_zeros(len(rows), most, *rows[0].shape[1:])
    for slot, one in zip(padded, rows, strict=True):
        slot[: len(one)] = one
    numbers = to_device(torch.tensor([len(one) for one in rows]), padded.device)
    return padded, torch.arange(most, device=padded.device) < numbers[:, None]


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's global state for a training step: a training that goes on draws as one that was never killed.

    Args:
        seed: seed of the training, any whole number.
        step: steps done.

    Returns:
        At least 0 and below 2 ** 63.
    """
    return (seed * 1_000_003 + step) % 2**63


def image_seeds(seeds: Sequence[int] | None, images: int, device: torch.device) -> Tensor:
    """Seed of each image, (B,) int64; None takes them from torch's global state."""
    drawn = torch.randint(2**62, (images,)) if seeds is None else torch.tensor(seeds)
    return to_device(drawn, device)


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """Keys whose order is random: a hash of seed and position, no two alike, the same on every device.

    Args:
        seeds: of each image, (B,) int64, at least 0.
        count: number of positions, at most 2 ** 30.

    Returns:
        (B, count) int64, at least 0.
    """
    position = torch.arange(count, device=seeds.device)
    # Hashed before it meets the positions, or neighbouring seeds would swap neighbouring positions.
    word = _hash(position ^ _hash(seeds & _WORD)[:, None])
    return _hash(word ^ (seeds >> 32)[:, None]) << _INDEX_BITS | position


def _hash(word: Tensor) -> Tensor:
    """Mix 32 bits in int64, (...); constants by C. Wellons, "Prospecting for Hash Functions" (lowbias32)."""
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    # The constant 0x846CA68B less 2 ** 32: the product stays within 64 bits, and its lower half is the same.
    word = (word ^ (word >> 15)) * (0x846CA68B - (1 << 32)) & _WORD
    return word ^ (word >> 16)


def draw_balanced(positive: Tensor, negative: Tensor, seeds: Tensor, *, count: int, share: float) -> Draw:
    """Draw for each image, without replacement: positives first, then negatives for what they leave.

    Args:
        positive: marks, (B, N) bool.
        negative: marks, (B, N) bool.
        seeds: of each image, (B,) int64.
        count: most in all.
        share: largest fraction of `count` that are positives.
    """
    keys = random_keys(seeds, positive.shape[1])
    slots, most = min(count, keys.shape[1]), min(int(count * share), keys.shape[1])
    # The largest keys, which are in order; what was not marked is below 0.
    first, second = (torch.where(marks, keys, -1).topk(size) for marks, size in ((positive, most), (negative, slots)))
    taken = (first.values >= 0).sum(1, keepdim=True)
    slot = torch.arange(slots, device=keys.device).expand(len(keys), -1)
    is_positive, place = slot < taken, (slot - taken).clamp(min=0)
    rows = second.indices.gather(1, place)
    if most:
        rows = torch.where(is_positive, first.indices.gather(1, slot.clamp(max=most - 1)), rows)
    return Draw(rows, is_positive, is_positive | (second.values.gather(1, place) >= 0))


@torch.no_grad()
def sample_regions(
    proposals: Tensor,
    proposed: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    seeds: Tensor,
    *,
    background: int,
    count: int,
    share: float,
    unknown: tuple[Tensor, Tensor] | None = None,
) -> SampledRegions:
    """Choose regions at random: IoU >= 0.5 with a ground-truth box is that object, the rest is background.

    What overlaps an `unknown` box at IoU 0.5 or more, and no ground truth, is neither: it is not chosen.

    Args:
        proposals: (B, P, 4); the ground truth is added to them.
        proposed: marks the proposals among them, (B, P) bool.
        boxes: base ground truth of each image, (N, 4).
        labels: (N,) int64 of each.
        seeds: of each image, (B,) int64.
        background: label of regions without an object.
        count: most regions per image.
        share: largest fraction on objects.
        unknown: boxes, (B, U, 4), and marks of those that may hold an object without a label, (B, U) bool.
    """
    truth, known = pad_rows(boxes)
    label, _ = pad_rows(labels)
    candidates, marks = torch.cat([proposals, truth], 1), torch.cat([proposed, known], 1)
    overlap, nearest = iou(candidates, truth).max(2)
    free = marks & (overlap < 0.5)
    if unknown is not None:
        free[:, : proposals.shape[1]] &= ~overlapped(proposals, *unknown, iou_floor=0.5)
    drawn = draw_balanced(marks & (overlap >= 0.5), free, seeds, count=count, share=share)
    objects = nearest.gather(1, drawn.rows)
    # Padding is a box of no size, whose deltas would not be finite.
    anywhere = candidates.new_ones(4).cumsum(0)
    return SampledRegions(
        boxes=torch.where(drawn.counted[:, :, None], _take(candidates, drawn.rows), anywhere),
        labels=torch.where(drawn.positive, label.gather(1, objects), background),
        targets=torch.where(drawn.positive[:, :, None], _take(truth, objects), 0),
        objects=torch.where(drawn.positive, objects, -1),
        counted=drawn.counted,
        object_slots=min(int(count * share), drawn.rows.shape[1]),
    )


def overlapped(boxes: Tensor, others: Tensor, marks: Tensor, *, iou_floor: float) -> Tensor:
    """Mark boxes (..., A, 4) whose IoU with a marked one of `others`, (..., U, 4), is `iou_floor` or more: (..., A)."""
    return ((iou(boxes, others) >= iou_floor) & marks[..., None, :]).any(-1)


def _take(boxes: Tensor, rows: Tensor) -> Tensor:
    """Boxes (B, N, 4) of rows (B, S) of each image: (B, S, 4)."""
    return boxes.gather(1, rows[:, :, None].expand(-1, -1, 4))
