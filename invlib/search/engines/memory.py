"""How much memory a step of one restart takes, measured, and how many restarts fit in what is free."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from invlib.search.problem import Measure, Problem

MARGIN = 0.8  # of what is free: allocators leave gaps, and libraries take room of their own to work in
_SURE = 1 / 8  # of what is free: functions that are no layers put out more than the estimate knows of
_STEP = 8  # times the bytes of the client's passes: on the networks of the zoo a step takes 1.4 to 4
_KEPT = 4  # tensors like its start that every restart keeps throughout: place, best, and Adam's two means


def largest(
    problem: Problem, starts: list[Tensor], step: Measure, sharpness: float | None
) -> tuple[int, int]:
    """Return how many restarts fit in memory together, at least one, and how many bytes one needs.

    Where a generous estimate fits, that is all. Else one restart is evaluated once, for its memory alone:
    nothing of that is counted or kept, and random numbers that it draws are drawn again by the run.

    Args:
        problem: what is minimised.
        starts: all starting points, ``(R, ...)``.
        step: evaluates one restart as it is evaluated among many.
        sharpness: of the softplus in the place of ReLU at the start.
    """
    device = problem.like.device
    kept = _KEPT * sum(start.nbytes for start in starts)
    room = int(MARGIN * available(device)) - kept
    if problem.activations is not None:
        bound = _STEP * problem.activations
        if bound * len(starts[0]) <= _SURE * room:
            return len(starts[0]), bound
    first = [start[:1] for start in starts]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            need = peak(functools.partial(step, first, [0], sharpness, 1.0), device)
        except torch.OutOfMemoryError:
            need = room + 1  # the run will say so of its first step
    if problem.stackable:
        need += sum(p.nbytes for p in problem.params.values())  # each restart of a stack has its own copy
    return max(1, min(len(starts[0]), room // max(need, 1))), need


def split(count: int, most: int, *, unit: int) -> list[range]:
    """Return as few chunks of restarts as fit, as equal as they can be.

    Args:
        count: how many restarts.
        most: how many fit in one chunk.
        unit: how many belong together, and stay in one chunk where so many fit.

    Example:
        >>> split(10, 4, unit=1)
        [range(0, 3), range(3, 6), range(6, 10)]
        >>> split(10, 5, unit=2)
        [range(0, 2), range(2, 6), range(6, 10)]
    """
    unit = unit if most >= unit else 1
    whole = count // unit
    chunks = math.ceil(whole / (most // unit))
    bounds = [unit * (k * whole // chunks) for k in range(chunks + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def available(device: torch.device) -> int:
    """Return the bytes that are free on a device, with those that torch holds there unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a function allocates on a device at its peak, beyond what was there before.

    On a GPU torch's own count of the largest memory begins anew. On a CPU what is counted are tensors; what
    libraries take to work in is not.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = _Live()
    with live:
        run()
    return live.most


def words(size: int) -> str:
    """Format a number of bytes with two significant digits.

    Example:
        >>> words(1_234_567), words(999)
        ('1.2 MB', '0.001 MB')
    """
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{float(f'{size / unit:.2g}'):g} {name}"


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, from each operation that makes one to its end.

    Autograd hands this mode on to the backward pass. Storages are counted, so that views cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in was there before, or was counted when it was made.
        self._count(args, new=False)
        self._count(kwargs, new=False)
        found = func(*args, **(kwargs or {}))
        self._count(found, new=True)
        self.most = max(self.most, self.now)
        return found

    def _count(self, tree: Any, *, new: bool) -> None:
        # By hand: torch's functions for trees take longer than most operations.
        if isinstance(tree, (tuple, list)):
            for part in tree:
                self._count(part, new=new)
        elif isinstance(tree, dict):
            self._count(list(tree.values()), new=new)
        elif isinstance(tree, Tensor) and tree.layout is torch.strided:
            storage = tree.untyped_storage()
            place = id(storage)  # torch keeps one object for as long as the storage lives
            if place not in self._known:
                size = storage.nbytes() if new else 0
                self._known.add(place)
                self.now += size
                weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size
