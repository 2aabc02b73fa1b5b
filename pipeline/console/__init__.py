"""The command line's side of the work: arguments, defaults, options, messages."""
