"""The fused RoI-align, projection and cosine operators."""

from ezsd.kernels.backend import device_obstacle, require_backend, resolve_backend
from ezsd.kernels.ops import roi_align, roi_align_cosine, roi_embed, roi_embed_cosine
from ezsd.kernels.pooling import Pooling

__all__ = [
    "Pooling",
    "device_obstacle",
    "require_backend",
    "resolve_backend",
    "roi_align",
    "roi_align_cosine",
    "roi_embed",
    "roi_embed_cosine",
]
