"""Access to a store's files and arrays, in a folder or behind a URL."""
