"""Several processes for one attack: each runs a share of its restarts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from invlib._spread import spread_over
from invlib.errors import ConfigError, WorkerError

__all__ = ["spread_restarts"]

_NAME = 200  # bytes of a worker's name
_FINE = -1  # in place of the number of a worker that ended


@contextmanager
def spread_restarts(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let the processes of a group run each attack together, every one a share of its restarts.

    Within this context all of them make the same calls, with one model, one observation and generators in
    one state. Starting points are drawn whole before they are shared out, the worse half is chosen among all
    (``prune``), and every process returns the whole result: that of one process alone, within rounding.
    Attacks that are not `GradientMatching`, or do not use it, run in every process as they would alone.

    Ctrl-C raises `KeyboardInterrupt`, and nothing is returned. A process that leaves with an error has to
    end, or the others wait for it until the group's timeout.

    Args:
        group: as `torch.distributed.new_group` gives it; None takes all processes. Its backend has to carry
            tensors on the CPU, as gloo does, wherever the attacks run.

    Raises:
        ConfigError: torch.distributed has no such group, this process is not in it, it does not carry tensors
            on the CPU, or, of an attack, a process makes another call, or there is a callback, a checkpoint,
            a tolerance or a patience.
        WorkerError: a process ended before its share was done.

    Example:
        Under ``torchrun --nproc-per-node 2 audit.py``, with ``dist`` for `torch.distributed`::

            dist.init_process_group("gloo")
            with iv.spread_restarts():
                found = attack(model, seen)
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "torch.distributed has no group of processes; expected torchrun to start this program, and "
            "torch.distributed.init_process_group('gloo') in it"
        )
    if dist.get_rank(group) < 0:
        raise ConfigError(f"process {dist.get_rank()} is not in the group; expected only those that are")
    if "gloo" not in dist.get_backend_config(group):
        raise ConfigError(
            f"the group's backend is {dist.get_backend_config(group)}, which carries no tensors on the CPU; "
            "expected gloo, or a group of its own: torch.distributed.new_group(backend='gloo')"
        )
    with spread_over(_Star(group)):
        yield


class _Star:
    """Workers of which number 0 takes in what the others send, and sends the sum to all of them.

    Worker 0 therefore knows whose connection is lost, and says so to the rest.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.names = [f"worker {rank}" for rank in range(self.size)]
        name = f"process {os.getpid()} on {socket.gethostname()}".encode()[:_NAME]
        table = torch.zeros(self.size, _NAME, dtype=torch.float64)
        table[self.rank, : len(name)] = torch.tensor(list(name), dtype=torch.float64)
        for rank, row in enumerate(self.total(table).tolist()):
            words = bytes(int(byte) for byte in row).rstrip(b"\0").decode(errors="replace")
            self.names[rank] = f"worker {rank} ({words})"

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum of what all workers give."""
        mine = mine.contiguous()
        return self._gathered(mine) if self.rank == 0 else self._sent(mine)

    def _gathered(self, mine: Tensor) -> Tensor:
        found, lost, other = mine.clone(), _FINE, _FINE
        heard = []
        for rank in range(1, self.size):
            size = torch.zeros(1, dtype=torch.int64)
            try:
                self._receive(size, rank)
                part = mine.new_empty(int(size))
                self._receive(part, rank)
                heard.append(rank)
                if part.numel() == mine.numel():
                    found += part.view(mine.shape)
                else:
                    other = rank
            except RuntimeError:
                lost = rank if lost == _FINE else lost  # the first may be the cause of the next
        for rank in heard:
            try:
                self._send(torch.tensor([lost, other]), rank)
                if lost == other == _FINE:
                    self._send(found, rank)
            except RuntimeError:
                lost = rank if lost == _FINE else lost
        self._check(lost, other)
        return found

    def _sent(self, mine: Tensor) -> Tensor:
        verdict, found = torch.tensor([0, _FINE]), torch.empty_like(mine)
        try:
            self._send(torch.tensor([mine.numel()]), 0)
            self._send(mine, 0)
            self._receive(verdict, 0)
            if verdict.tolist() == [_FINE, _FINE]:
                self._receive(found, 0)
        except RuntimeError:
            verdict[:] = torch.tensor([0, _FINE])
        self._check(*verdict.tolist())
        return found

    def _check(self, lost: int, other: int) -> None:
        if lost != _FINE:
            raise WorkerError(
                f"{self.names[lost]} ended before its share of the restarts was done; expected {self.size} "
                "workers to the end"
            )
        if other != _FINE:
            raise ConfigError(
                f"{self.names[other]} makes another call than worker 0; expected the same calls in all "
                "processes that share restarts"
            )

    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor, self._global(rank), group=self.group)

    def _receive(self, tensor: Tensor, rank: int) -> None:
        dist.recv(tensor, self._global(rank), group=self.group)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
