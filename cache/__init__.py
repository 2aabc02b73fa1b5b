"""The store: sharded Zarr with provenance, numpy and zarr alone."""
