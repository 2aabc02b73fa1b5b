"""`python -m ezsd`: the same as the command `ezsd`."""

from ezsd.cli import main

if __name__ == "__main__":
    main()
