"""The fused RoI-align, projection and cosine operators."""

from ezsd.kernels.backend import Backend, BackendError, require_backend, resolve_backend
from ezsd.kernels.geometry import Metric
from ezsd.kernels.operators import roi_align, roi_align_cosine, roi_embed

__all__ = [
    "Backend",
    "BackendError",
    "Metric",
    "require_backend",
    "resolve_backend",
    "roi_align",
    "roi_align_cosine",
    "roi_embed",
]
