"""Ctrl-C while a command still imports torch, which takes seconds: a line and status 130, no traceback.

``python -m invlib`` runs ``invlib/__init__.py`` before any code of a command, and so does the script
``invlib``: this module is the first that the package imports. In other programs it does nothing.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType


def of_a_command(words: list[str]) -> bool:
    """Say whether the words that Python was started with run a command of this package."""
    as_module = any(a == "-m" and b.partition(".")[0] == "invlib" for a, b in pairwise(words[:8]))
    return as_module or any(Path(word).name == "invlib" for word in words[:2])


def _quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if of_a_command(sys.orig_argv):
    sys.excepthook = _quietly
