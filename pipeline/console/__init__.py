"""Between the command line and the rest: arguments, defaults, messages."""
