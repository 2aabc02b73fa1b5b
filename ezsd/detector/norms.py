"""Batch normalisation whose statistics, scale and shift are constants."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """Frozen normalisation of torchvision, in the type of its input: under autocast too, all that follows keeps it."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise (B, C, H, W) in float32."""
        return super().forward(maps).to(maps.dtype)  # type: ignore[no-any-return]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel, (C,) both."""
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        return factor, self.bias - self.running_mean * factor


class FoldedNorm(FrozenNorm):
    """Frozen normalisation that the convolution before it does: it has the numbers, and changes nothing."""

    def forward(self, maps: Tensor) -> Tensor:
        """Hand maps on."""
        return maps


class NormedConvolution(nn.Conv2d):
    """Convolution with the frozen normalisation behind it folded into weights and bias: one pass less.

    Exact but for rounding: autocast rounds the folded numbers, where a norm of its own computes in float32.

    Args:
        convolution: gives its parameters, and the names that they have in a state.
        norm: stays where it is in the network, for its place in a state.
    """

    def __init__(self, convolution: nn.Conv2d, norm: FoldedNorm) -> None:
        # Nothing is allocated for what is replaced at once.
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            bias=convolution.bias is not None,
            device="meta",
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        # A tuple, which torch does not look into.
        self._norm = (norm,)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve (B, C, H, W) and normalise."""
        factor, bias = self._norm[0].affine()
        if self.bias is not None:
            bias = bias + self.bias * factor
        made: Tensor = self._conv_forward(maps, self.weight * factor[:, None, None, None], bias)
        return made


def fold_norms(network: nn.Module) -> None:
    """Fold frozen norms into the convolutions before them, in a network of torchvision.

    There, a norm behind a convolution among a module's parts is what its results go through next.
    """
    for module in list(network.modules()):
        parts = list(module.named_children())
        for (name, convolution), (after, norm) in zip(parts, parts[1:], strict=False):
            if type(convolution) is nn.Conv2d and type(norm) is FrozenNorm:
                folded = FoldedNorm(norm.weight.shape[0], norm.eps)
                folded.load_state_dict(norm.state_dict())
                setattr(module, after, folded)
                setattr(module, name, NormedConvolution(convolution, folded))
