"""Run folders: settings, checkpoints, metrics."""
