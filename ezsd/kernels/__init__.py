"""The fused RoI-align, projection and cosine operators."""
