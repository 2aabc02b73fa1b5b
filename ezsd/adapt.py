"""Re-normalisation: tune a teacher's LayerNorms, and nothing else, on crops of base classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ezsd.choices import AdaptLoss
from ezsd.teacher.open_clip import Teacher


def adaptation_loss(logits: Tensor, label: Tensor, *, loss: AdaptLoss) -> Tensor:
    """Mean classification loss of crops among the base classes.

    Args:
        logits: scaled cosines, (R, C).
        label: position of each crop's class name, (R,) int64.
        loss: "bce" is the reference's binary cross-entropy with one-hot targets, mean over crops and names;
            "softmax_ce" is cross-entropy over the names.
    """
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(label, logits.shape[1]).float())
    return F.cross_entropy(logits, label)


def tune_layer_norms(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    *,
    loss: AdaptLoss,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
) -> Iterator[float]:
    """Tune LayerNorm parameters of a teacher in place, one step per batch; yields each step's loss.

    Args:
        teacher: all of its weights except `parameters` stay frozen.
        batches: pairs of crops (R, 3, S, S), float in [0, 1], and labels (R,) into `names`.
        names: base class names; their embeddings are computed once per step, or once if none of `parameters` is theirs.
        parameters: the parameters from the teacher's `layer_norms()` to tune.
        loss: see `adaptation_loss`.
        learning_rate: of AdamW, constant.
        weight_decay: of AdamW.
        clip_norm: largest gradient norm.
    """
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        text = teacher.encode_text(names)
        for step, (pixels, label) in enumerate(batches):
            if step and text.requires_grad:
                text = teacher.encode_text(names)
            logits = teacher.logit_scale * teacher.encode_image(pixels) @ text.T
            value = adaptation_loss(logits, label.to(logits.device), loss=loss)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimiser.step()
            yield value.item()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@torch.no_grad()
def crop_accuracy(teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """Correctness of the teacher's predicted class of each crop, (R,) bool.

    Crops and labels are as in `tune_layer_norms`. The predicted class has the text embedding of the largest cosine.
    """
    text = teacher.encode_text(names)
    right = [(teacher.encode_image(pixels) @ text.T).argmax(1).cpu() == label for pixels, label in batches]
    return torch.cat(right) if right else torch.zeros(0, dtype=torch.bool)


def flatten(parameters: Mapping[str, Tensor]) -> tuple[NDArray[np.float32], list[dict[str, object]]]:
    """Concatenate parameters to one float32 row; also returns their names and shapes in the same order."""
    table: list[dict[str, object]] = [{"name": name, "shape": list(p.shape)} for name, p in parameters.items()]
    if not parameters:
        return np.zeros(0, np.float32), table
    values = torch.cat([p.detach().float().reshape(-1).cpu() for p in parameters.values()])
    return values.numpy(), table


def restore(parameters: Mapping[str, Tensor], values: NDArray[np.float32], table: list[dict[str, object]]) -> None:
    """Write values from `flatten` back into the parameters. ValueError if names or shapes are another model's."""
    wanted = [{"name": name, "shape": list(p.shape)} for name, p in parameters.items()]
    if wanted != table:
        raise ValueError(f"the store's {len(table)} parameters are not this network's {len(wanted)}")
    start = 0
    with torch.no_grad():
        for parameter in parameters.values():
            chunk = torch.from_numpy(values[start : start + parameter.numel()].copy())
            parameter.copy_(chunk.reshape(parameter.shape))
            start += parameter.numel()
