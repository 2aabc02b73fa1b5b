"""Where a store lies, and how its arrays are read."""
