"""A plug-in backbone: the convolutions of the stand-in teacher's MobileNetV2, whose file lies outside the project.

They are folded: batch normalisation is in weights and biases. TensorFlow pads them, and scales pixels to [-1, 1).
"""

import torch.nn.functional as F
from torch import nn

# Expansion, output channels, repeats and first stride of the blocks, after a first convolution of stride 2.
BLOCKS = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
ENDS = (0, 1, 2, 4, 6)
"""Last group of blocks of each of the strides 2, 4, 8, 16, 32."""


class Same(nn.Conv2d):
    """Convolution with TensorFlow's padding: an odd number of rows or columns has the odd one at the end."""

    def forward(self, images):
        size, stride = self.kernel_size[0], self.stride[0]
        lacking = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in images.shape[:-3:-1]]
        return super().forward(F.pad(images, [pad for n in lacking for pad in (n // 2, n - n // 2)]))


class MobileNetV2(nn.Module):
    """The tensors of the file have the numbers of the convolutions, "00.weight" and on."""

    strides = (8, 16, 32)
    mean = std = (128 / 255,) * 3

    def __init__(self):
        super().__init__()
        self.groups = [[[self.add(3, 32, 3, 2)]]]
        channels = 32
        for expansion, outputs, repeats, first in BLOCKS:
            group = []
            for stride in (first, *[1] * (repeats - 1)):
                wide = channels * expansion
                block = [self.add(channels, wide, 1)] if expansion > 1 else []
                group.append([*block, self.add(wide, wide, 3, stride, wide), self.add(wide, outputs, 1)])
                channels = outputs
            self.groups.append(group)

    def add(self, inputs, outputs, size, stride=1, groups=1):
        name = f"{len(self._modules):02d}"
        self.add_module(name, Same(inputs, outputs, size, stride, groups=groups))
        return name

    def forward(self, images):
        ((stem,),), *groups = self.groups
        last, maps = F.relu6(self._modules[stem](images)), []
        for number, group in enumerate(groups):
            for block in group:
                last = self.block(last, block)
            if number in ENDS[2:]:
                maps.append(last)
        return maps

    def block(self, images, names):
        *inner, outer = (self._modules[name] for name in names)
        out = images
        for convolution in inner:
            out = F.relu6(convolution(out))
        out = outer(out)
        return images + out if out.shape == images.shape else out

    def stages(self):
        (stem, *groups), begins = self.groups, (0, *(end + 1 for end in ENDS))
        by_stage = [groups[begin:end] for begin, end in zip(begins, begins[1:], strict=False)]
        by_stage[0] = [stem, *by_stage[0]]
        return [
            [p for group in stage for block in group for name in block for p in self._modules[name].parameters()]
            for stage in by_stage
        ]

    def fingerprint(self):
        return {"name": "mobilenet-v2-tf", "version": 1}

    def load_state_dict(self, state, *options, **named):
        """All but the last two, which make logits of the last map."""
        own = {key: value for key, value in state.items() if key.partition(".")[0] in self._modules}
        return super().load_state_dict(own, *options, **named)
