"""`ezsd view`: a local page that shows a run or a store, and detects in images that are dropped on it.

This is evaluation: like `ezsd.pipeline.report` it reads the novel boxes of a run's validation images; those of training
images it reads only when asked to. Nothing it shows goes back into a store or a training.
"""

from ezsd.pipeline.view.server import Viewer
from ezsd.pipeline.view.target import ViewRequest

__all__ = ["ViewRequest", "Viewer"]
