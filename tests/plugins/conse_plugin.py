"""A plug-in teacher around a stand-in for CLIP that lies outside the project (EZSD_CONSE names its folder)."""

import hashlib
import os
import sys
from pathlib import Path

import torch


def factory(device="cpu"):
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
                digest.update(weight.numpy().tobytes() + bias.numpy().tobytes())
            digest.update(self.class_text.numpy().tobytes())
            return {"name": self.name, "weights_sha256": digest.hexdigest(), "input_size": self.input_size}

    teacher = Teacher(device)
    # Depthwise convolutions are several times quicker in this layout on a CPU.
    teacher.convs = [(w.contiguous(memory_format=torch.channels_last), b) for w, b in teacher.convs]
    return teacher
