"""A plug-in teacher around a stand-in for CLIP that lies outside the project (EZSD_CONSE names its folder)."""

import hashlib
import os
import sys
from pathlib import Path

import torch


def factory(device="cpu", dtype=torch.float32):
    """Its embeddings are no CLIP's: figures made with it are never CLIP's figures."""
    folder = Path(os.environ["EZSD_CONSE"])
    sys.path.insert(0, str(folder))
    from conse_teacher import ConseTeacher

    class Teacher(ConseTeacher):
        def layer_norms(self, *, vision_only=False):
            return {}

        def fingerprint(self):
            digest = hashlib.sha256()
            for weight, bias in self.convs:
                digest.update(weight.float().numpy().tobytes() + bias.float().numpy().tobytes())
            digest.update(self.class_text.numpy().tobytes())
            return {"name": self.name, "weights_sha256": digest.hexdigest(), "input_size": self.input_size}

        def _logits(self, pixels):
            return super()._logits(pixels.to(dtype)).float()

    teacher = Teacher(device)
    # Depthwise convolutions are several times quicker in this layout on a CPU.
    teacher.convs = [(w.to(dtype, memory_format=torch.channels_last), b.to(dtype)) for w, b in teacher.convs]
    return teacher


def bfloat16_factory(device="cpu"):
    """The same in bfloat16: three times as many crops a second on a CPU with AMX, other numbers."""
    return factory(device, torch.bfloat16)
