"""Run folders, as far as nothing heavy is needed to look at them."""

from pathlib import Path

from ezsd.pipeline.errors import ArgumentError


def require_run(folder: Path) -> None:
    """ArgumentError when a folder holds no run."""
    if not (folder / "run.json").is_file():
        raise ArgumentError(
            f"`run={folder}`: no run here (run.json is missing); `ezsd train --cache ... --run` makes one"
        )
