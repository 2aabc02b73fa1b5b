"""Re-normalisation: tune a teacher's LayerNorms, and nothing else, on crops of base classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ezsd.choices import AdaptLoss
from ezsd.teacher.open_clip import Teacher, encode_crops
from ezsd.transfer import to_device


def adaptation_loss(logits: Tensor, label: Tensor, *, loss: AdaptLoss) -> Tensor:
    """Mean classification loss of crops among the base classes.

    Args:
        logits: scaled cosines, (R, C).
        label: position of each crop's class name, (R,) int64.
        loss: "bce" is the reference's binary cross-entropy with one-hot targets, mean over crops and names;
            "softmax_ce" is cross-entropy over the names.
    """
    if loss == "bce":
        # Unlike `one_hot` it looks at no value, so that the host need not wait for one.
        target = label[:, None] == torch.arange(logits.shape[1], device=label.device)
        return F.binary_cross_entropy_with_logits(logits, target.float())
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

    A loss is given once the next step is on its way, so that a GPU does not idle meanwhile.

    Args:
        teacher: all of its weights except `parameters` stay frozen.
        batches: pairs of crops (R, 3, S, S), see `encode_crops`, and labels (R,) into `names`.
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
        before: Tensor | None = None
        for pixels, label in batches:
            if before is not None and text.requires_grad:
                text = teacher.encode_text(names)
            logits = teacher.logit_scale * encode_crops(teacher, pixels) @ text.T
            value = adaptation_loss(logits, to_device(label, logits.device), loss=loss)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimiser.step()
            if before is not None:
                yield before.item()
            before = value.detach()
        if before is not None:
            yield before.item()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@torch.no_grad()
def crop_accuracy(teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """Correctness of the teacher's predicted class of each crop, (R,) bool.

    Crops and labels are as in `tune_layer_norms`. The predicted class has the text embedding of the largest cosine.
    """
    text = teacher.encode_text(names)
    found = [((encode_crops(teacher, crops) @ text.T).argmax(1), label) for crops, label in batches]
    if not found:
        return torch.zeros(0, dtype=torch.bool)
    return torch.cat([guess for guess, _ in found]).cpu() == torch.cat([label for _, label in found])


def flatten(parameters: Mapping[str, Tensor]) -> tuple[NDArray[np.float32], list[dict[str, object]]]:
    """Concatenate parameters to one float32 row; also returns their names and shapes in the same order."""
    table: list[dict[str, object]] = [{"name": name, "shape": list(p.shape)} for name, p in parameters.items()]
    if not parameters:
        return np.zeros(0, np.float32), table
    values = torch.cat([p.detach().float().reshape(-1) for p in parameters.values()]).cpu()
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
