"""Stage one: a store built from a dataset by a teacher."""
