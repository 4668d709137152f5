"""Several processes for one run, as torchrun starts them: worker 0 keeps the record, and all of them attack.

The tasks are handed out one by one through the store of torchrun, since one may cost a hundred times another.
Rows travel over gloo to worker 0, where a thread for each other worker takes them in. A worker that ends, for
whatever reason, closes its connection, and so worker 0 knows at once who it was. A worker gives a sign of
life every second, which tells it in turn whether worker 0 is still there.

Where workers share the restarts of one attack, they put together what they found through the store, at which
they look now and then: whoever waited for a message could not be told that its sender is gone.
"""

from __future__ import annotations

import _thread
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from invlib.errors import ConfigError, DeviceError, InvlibError, WorkerError
from invlib.experiments._record import Row, encode

_BEAT = 1.0  # seconds
_GLANCE = 0.01  # seconds between looks at the store
_PIECE = 1 << 22  # bytes; the store of torch takes no more than twice that in one
_SILENCE = timedelta(minutes=5)  # without a sign of life: the machine is gone, connection and all
_FOREVER = timedelta(days=365)  # for the first word of worker 0, which may download a data set before
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GO_ON, _STOP = 1.0, 0.0  # what worker 0 answers
_ADVICE = "the record holds every attack that had ended, and the same command goes on from there"


class Leader:
    """Worker 0: gives out the job and takes in the rows.

    Args:
        store: what all workers read and write.
        size: how many workers there are.
    """

    def __init__(self, store: dist.Store, size: int) -> None:
        self.rank, self.size, self._store, self._sums = 0, size, store, 0
        self._keep: Callable[[Row], None] | None = None
        self._trouble: Exception | None = None
        self._stopped = self._closing = False
        self._in_trouble = threading.Event()
        # Both torchrun, when a worker failed, and the threads below end the attack at hand by this signal.
        signal.signal(signal.SIGTERM, self._stop)
        names = [store.get(f"worker {rank}").decode() for rank in range(size)]
        self._ears = [
            threading.Thread(target=self._listen, args=(rank, names[rank]), daemon=True)
            for rank in range(1, size)
        ]
        for ear in self._ears:
            ear.start()

    @contextmanager
    def at_work(self, job: Mapping[str, Any], keep: Callable[[Row], None]) -> Iterator[None]:
        """Give out the job, and give `keep` every row, in the thread of its worker, until the end."""
        self._keep = keep
        self._store.set("job", encode(dict(job)).decode())
        try:
            yield
        finally:
            self._hush()

    def turns(self, count: int) -> Iterator[int]:
        """Give the numbers of the tasks that fall to this worker, and wait for the others to do theirs."""
        for number in _turns(self._store, count):
            self._check()
            yield number
        self._join(math.inf)
        self._check()

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum of what all workers give, see `invlib._spread.Workers`."""
        found, self._sums = mine.clone(), self._sums + 1
        for rank in range(1, self.size):
            name = f"part {self._sums} {rank}"
            while not self._store.check([name]):
                self._check()
                time.sleep(_GLANCE)
            part = _taken(self._store, name)
            _removed(self._store, name)
            if part.numel() != mine.numel():
                raise ConfigError(
                    f"worker {rank} gives {part.numel()} numbers of its restarts; expected {mine.numel()}, "
                    "as worker 0 has"
                )
            found += part.view(mine.shape)
        _removed(self._store, f"sum {self._sums - 1}")  # which all have seen that are here
        _put(self._store, f"sum {self._sums}", found)
        return found

    def close(self, error: BaseException | None) -> None:
        """Stop the other workers, and say what was the matter where the run was not stopped by hand.

        Raises:
            InvlibError: a worker failed, or torchrun ended the run.
            Exception: what a thread of this worker did not expect.
        """
        ended_by_others = isinstance(error, KeyboardInterrupt) and self._over()
        self._hush()
        if ended_by_others:
            raise self._trouble or WorkerError(
                f"torchrun ended all {self.size} workers (SIGTERM), as it does when one failed; {_ADVICE}"
            ) from None

    def _hush(self) -> None:
        self._closing = True
        self._join(10 * _BEAT)  # a thread that still waits for gloo would abort the interpreter at its exit

    def _over(self) -> bool:
        return self._stopped or self._in_trouble.is_set()

    def _check(self) -> None:
        if self._over():  # and the attack at hand swallowed the interruption
            raise KeyboardInterrupt

    def _join(self, seconds: float) -> None:
        for ear in self._ears:
            # In small portions: a signal does not wake a thread that waits for another.
            while ear.is_alive() and seconds > 0:
                ear.join(_BEAT / 5)
                seconds -= _BEAT / 5

    def _stop(self, *_: object) -> None:
        if not self._stopped:  # once: the second time it would interrupt the message
            self._stopped = True
            raise KeyboardInterrupt

    def _listen(self, rank: int, name: str) -> None:
        try:
            while True:
                with _connected():
                    message = _receive(rank)
                if "row" in message:
                    assert self._keep is not None, "a row before the job"
                    self._keep(message["row"])
                answer = _STOP if self._closing else _GO_ON
                with _connected():
                    dist.send(torch.tensor([answer]), rank)
                if "trouble" in message:
                    raise WorkerError(f"worker {rank} ({name}) failed: {message['trouble']}; {_ADVICE}")
                if answer == _STOP or "end" in message:
                    return
        except Exception as error:
            if isinstance(error, ConnectionError):
                error = WorkerError(
                    f"worker {rank} ({name}) ended before its work was done; expected {self.size} workers to "
                    f"the end; {_ADVICE}"
                )
            # The first is the cause: torchrun ends all the others when one has failed.
            self._trouble = self._trouble or error
        if self._trouble and not self._closing:
            self._in_trouble.set()
            _thread.interrupt_main(signal.SIGTERM)


class Follower:
    """Any other worker: does tasks, and sends the rows to worker 0.

    Args:
        store: what all workers read and write.
        rank: the number of this worker.
        size: how many workers there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size, self._store, self._sums = rank, size, store, 0
        self._sending, self._ended, self._told = threading.Lock(), threading.Event(), False
        # Ctrl-C goes to all workers. This one ends when worker 0 has, which says that it was interrupted.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._beat, daemon=True).start()

    def job(self) -> dict[str, Any]:
        """Wait for what worker 0 has to say."""
        self._store.wait(["job"], _FOREVER)
        return dict(json.loads(self._store.get("job")))

    def turns(self, count: int) -> Iterator[int]:
        """Give the numbers of the tasks that fall to this worker."""
        return _turns(self._store, count)

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum of what all workers give, see `invlib._spread.Workers`."""
        self._sums += 1
        _put(self._store, f"part {self._sums} {self.rank}", mine)
        while not self._store.check([f"sum {self._sums}"]):
            time.sleep(_GLANCE)  # where worker 0 has ended, the signs of life find it out
        return _taken(self._store, f"sum {self._sums}").view(mine.shape)

    def send(self, **message: Any) -> None:
        """Send something to worker 0; a row is on the disk when this returns."""
        try:
            with self._sending, _connected():
                _send(message)
                answer = torch.empty(1)
                dist.recv(answer, 0)
                if float(answer) == _STOP:
                    self._told = True
                    dist.recv(answer, 0)  # until worker 0 ends
        except ConnectionError:
            self._give_up()

    def close(self, error: BaseException | None) -> None:
        """Say goodbye, and what was the matter; no more is printed here of what a user can mend."""
        self._ended.set()
        self.send(**({"end": True} if error is None else {"trouble": f"{type(error).__name__}: {error}"}))
        if isinstance(error, InvlibError):
            raise SystemExit(2) from None

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self.send()

    def _give_up(self) -> NoReturn:
        # From any thread and whatever the others do: there is nothing here that could be lost.
        if self._told:
            time.sleep(2 * _BEAT)  # torchrun calls the first that ends the cause, and that is worker 0
        else:
            words = f"worker {self.rank}: worker 0, which keeps the record, has ended"
            print(words, file=sys.__stderr__, flush=True)
        os._exit(1)


@contextmanager
def joined() -> Iterator[Leader | Follower | None]:
    """Join the other workers that torchrun started, or give None where this process is alone.

    Raises:
        ConfigError: the environment names other workers, but not how to find them.
        InvlibError: a worker failed (raised in worker 0 alone).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set; expected all or "
            "none of them in the environment, as torchrun sets them"
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=_SILENCE))
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=size, timeout=_SILENCE
    )
    store.set(f"worker {rank}", f"process {os.getpid()} on {socket.gethostname()}")
    team = Leader(store, size) if rank == 0 else Follower(store, rank, size)
    try:
        yield team
    except BaseException as error:
        team.close(error)
        raise
    team.close(None)
    dist.destroy_process_group()


def restarted() -> bool:
    """Say whether torchrun has started the workers of this run before (``--max-restarts``)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def own(device: torch.device) -> torch.device:
    """Return this worker's own GPU where one was asked for without its number.

    Raises:
        DeviceError: there are more workers on this machine than GPUs.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise DeviceError(
            f"worker {os.environ['RANK']} has LOCAL_RANK {local}, but torch finds {count} GPUs; "
            f"expected --nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(local)  # kernels start on the current device, wherever their arguments are
    return torch.device("cuda", local)


def _turns(store: dist.Store, count: int) -> Iterator[int]:
    while (number := store.add("turns", 1) - 1) < count:
        yield number


def _put(store: dist.Store, name: str, tensor: Tensor) -> None:
    data = tensor.contiguous().numpy().tobytes()
    pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
    for k, piece in enumerate(pieces):
        store.set(f"{name} {k}", piece)  # type: ignore[arg-type]  # bytes are taken as well
    store.set(name, str(len(pieces)))  # last: whoever sees it finds all the rest


def _taken(store: dist.Store, name: str) -> Tensor:
    pieces = [store.get(f"{name} {k}") for k in range(int(store.get(name)))]
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float64)


def _removed(store: dist.Store, name: str) -> None:
    if store.check([name]):
        for k in range(int(store.get(name))):
            store.delete_key(f"{name} {k}")
        store.delete_key(name)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: the other side has ended, or is silent for too long
        raise ConnectionError(str(error)) from error


def _send(message: Mapping[str, Any]) -> None:
    line = encode(dict(message))
    dist.send(torch.tensor([len(line)]), 0)
    dist.send(torch.frombuffer(bytearray(line), dtype=torch.uint8), 0)


def _receive(rank: int) -> dict[str, Any]:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, rank)
    line = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(line, rank)
    return dict(json.loads(line.numpy().tobytes()))
