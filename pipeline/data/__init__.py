"""Datasets, images, annotations."""
