"""How every command ends: its exit status, and one line for what a user can mend."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping

from invlib.errors import ConfigError, InvlibError

INTERRUPTED = 130
CLOSED = 141  # as a shell says of a program that was ended by a closed pipe

POSITIVE = 1e-300  # for numbers that must not be zero
SEED = (0, 2**64 - 1)
Ranges = Mapping[str, tuple[float, float]]


def exit_status(command: Callable[[], int]) -> int:
    """Run a command and return its exit status: 2 for what a user can mend, 130 for Ctrl-C, 141 unread."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes once more at its end, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (InvlibError, OSError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def check_ranges(args: argparse.Namespace, ranges: Ranges) -> None:
    """Check the numbers of a command line: option name, as argparse calls it → least and most.

    Raises:
        ConfigError: a number is out of its range.
    """
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is None or least <= value <= most:
            continue
        flag = f"--{name}" if hasattr(args, "program") else f"--{name.replace('_', '-')}"
        if value < least:
            expected = "a positive number" if least == POSITIVE else f"at least {least:,}"
        else:  # NaN too
            expected = f"at most {most:,}"
        raise ConfigError(f"{flag} is {value}; expected {expected}")
