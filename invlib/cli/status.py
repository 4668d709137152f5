"""How every command ends: its exit status, and one line for what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable

from invlib.errors import InvlibError

INTERRUPTED = 130


def exit_status(command: Callable[[], int]) -> int:
    """Run a command and return its exit status: 2 for an `InvlibError`, 130 for Ctrl-C."""
    try:
        return command()
    except InvlibError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
