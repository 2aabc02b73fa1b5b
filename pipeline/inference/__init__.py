"""Trained detectors at work: evaluation, detection, pictures."""
