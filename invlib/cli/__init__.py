"""Every command: options in, exit status out."""

from invlib.cli.entry import main

__all__ = [
    "main",
]
