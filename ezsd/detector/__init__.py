"""The detector: backbone, proposals, heads."""
