"""Presets, one for each published experiment."""
