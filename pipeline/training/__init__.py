"""Stage two: a detector trained from a store."""
