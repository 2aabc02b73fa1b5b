"""`ezsd report`: one HTML page about a run, with everything inside it; the same bytes for the same run.

This is evaluation: like `ezsd.pipeline.inference.evaluate` it may look at novel boxes, and nothing it makes goes back
into training.
"""

from ezsd.pipeline.report.page import write_report

__all__ = ["write_report"]
