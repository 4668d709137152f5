"""Ctrl-C at the end of what must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Hold a first Ctrl-C back to the end of this context; a second one goes to the caller's handler at once.

    Only the main thread can do that, and only where the caller has a handler, as Python itself has.
    """
    caller, waiting = signal.getsignal(signal.SIGINT), list[FrameType | None]()
    if threading.current_thread() is not threading.main_thread() or not callable(caller):
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        waiting.append(frame)
        if len(waiting) > 1:
            signal.signal(signal.SIGINT, caller)
            waiting.clear()
            caller(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, caller)
        if waiting:
            caller(signal.SIGINT, waiting[0])
