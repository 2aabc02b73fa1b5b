"""What a store's files hold: arrays, manifest and commit mark, as bytes."""
