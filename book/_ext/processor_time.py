"""Time the pages by the processor and not by the clock, so that other work on the machine does not count."""

import os

from jupyter_cache.executors import utils
from sphinx.application import Sphinx


def spent() -> float:
    """Return the processor seconds of all processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


class ProcessorTimer:
    """Take the place of jupyter-cache's timer; a page's kernel has ended when the timer stops."""

    def __enter__(self) -> None:
        """Start."""
        self._before = spent()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.last_split = spent() - self._before


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    utils.Timer = ProcessorTimer
    return {"parallel_read_safe": True, "parallel_write_safe": True}
