"""CLIP proposals: anchors, their scores, and the selection of regions."""
