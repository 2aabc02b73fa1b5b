"""The fused RoI-align, projection and cosine operators."""

from ezsd.kernels.backend import Backend, require_backend, resolve_backend
from ezsd.kernels.ops import roi_align, roi_align_cosine, roi_embed
from ezsd.kernels.pooling import Metric

__all__ = [
    "Backend",
    "Metric",
    "require_backend",
    "resolve_backend",
    "roi_align",
    "roi_align_cosine",
    "roi_embed",
]
