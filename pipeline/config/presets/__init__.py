"""One preset per published experiment."""
