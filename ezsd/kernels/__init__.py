"""The fused RoI-align, projection and cosine operators."""

from ezsd.kernels.backend import Backend, BackendError, resolve_backend
from ezsd.kernels.operators import roi_align, roi_align_cosine, roi_embed
from ezsd.kernels.reference import Metric

__all__ = ["Backend", "BackendError", "Metric", "resolve_backend", "roi_align", "roi_align_cosine", "roi_embed"]
