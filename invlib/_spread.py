"""Restarts that several processes share: who runs which, and how they put together what they found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from invlib.errors import ConfigError

if TYPE_CHECKING:
    from invlib.matching import GradientMatching


class Workers(Protocol):
    """The processes that share restarts, as each of them sees it."""

    @property
    def rank(self) -> int:
        """The number of this process."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum of what all processes give: float64 on the CPU, of one shape."""
        ...


_WORKERS: ContextVar[Workers | None] = ContextVar("workers", default=None)


@contextmanager
def spread_over(workers: Workers) -> Iterator[None]:
    """Within this context the restarts of an attack are shared out to these processes."""
    token = _WORKERS.set(workers)
    try:
        yield
    finally:
        _WORKERS.reset(token)


def workers() -> Workers | None:
    """Return who shares the restarts, or None where this process runs them all."""
    return _WORKERS.get()


def share(count: int) -> list[int]:
    """Return which of so many restarts this process runs."""
    team = _WORKERS.get()
    return list(range(count)) if team is None else list(range(team.rank, count, team.size))


def largest_share(count: int) -> int:
    """Return how many of so many restarts a process runs at most."""
    team = _WORKERS.get()
    return count if team is None else -(-count // team.size)


def whole(mine: Tensor) -> Tensor:
    """Return a tensor of which each process filled in its own part, and left the rest at zero."""
    team = _WORKERS.get()
    return mine if team is None else team.total(mine.double().cpu()).to(mine)


def agree(
    attack: GradientMatching, starts: list[Tensor], target: list[Tensor], *, callback: bool, checkpoint: bool
) -> None:
    """Make sure that all processes run one attack, which can be shared.

    Args:
        attack: what this process is about to run.
        starts: all starting points.
        target: the observed update.
        callback: whether somebody wants to be told of every step.
        checkpoint: whether the state is to be written.

    Raises:
        ConfigError: another process runs another attack, or this one cannot be shared.
    """
    team = _WORKERS.get()
    if team is None:
        return
    asked = {
        "callback": callback,
        "checkpoint": checkpoint,
        "tolerance": attack.tolerance is not None,
        "patience": attack.patience is not None,
    }
    unable = [name for name, given in asked.items() if given]
    if unable:
        raise ConfigError(
            f"GradientMatching has {' and '.join(unable)} where {team.size} processes share its restarts; "
            "expected none of callback, checkpoint, tolerance and patience"
        )
    facts = [float(attack.steps), float(attack.restarts), float(attack.prune)]
    facts += [float(tensor.double().norm()) for tensor in (*starts, *target)]
    table = torch.zeros(team.size, len(facts), dtype=torch.float64)
    table[team.rank] = torch.tensor(facts, dtype=torch.float64)
    table = team.total(table)
    for rank, theirs in enumerate(table):
        # Another machine may round another way.
        if not torch.allclose(theirs, table[0], rtol=1e-3, atol=0.0, equal_nan=True):
            raise ConfigError(
                f"worker {rank} runs another attack than worker 0, or on another observation or from other "
                "starts; expected the same in all processes that share restarts"
            )
