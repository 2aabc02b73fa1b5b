"""Contents of a store's files as bytes: arrays, manifest and commit mark."""
