"""CLIP proposals: anchors, their scores, and which of them are kept."""
