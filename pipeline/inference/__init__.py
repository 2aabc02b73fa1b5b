"""Inference with trained detectors: detection, evaluation and drawing."""
