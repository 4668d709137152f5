"""Where the attacks of an experiment can run: a pool of processes on this machine, or a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from invlib.errors import ConfigError, DependencyError, WorkerError
from invlib.experiments import runner
from invlib.experiments.plan import Request


@contextmanager
def pool(workers: int, device: torch.device) -> Iterator[Executor]:
    """Start processes on this machine, which end with this block, whatever they are at if an error ends it.

    Args:
        workers: how many; they divide the threads of this process among them.
        device: where the attacks run: ``cuda`` without a number gives the workers the GPUs in turn.

    Raises:
        ConfigError: workers is not positive.
    """
    if workers < 1:
        raise ConfigError(f"--workers is {workers}; expected at least 1")
    context = multiprocessing.get_context("spawn")
    begin = (max(1, torch.get_num_threads() // workers), device, context.Value("i", 0))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=begin) as executor:
        try:
            yield executor
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _begin(threads: int, device: torch.device, begun: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # one between processes would be left over where this one is terminated
    torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is None:
        with begun.get_lock():
            number, begun.value = begun.value, begun.value + 1
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def cluster(address: str, request: Request) -> Iterator[Executor]:
    """Connect to the scheduler of a Dask cluster, which runs what a dead worker had again on another.

    Args:
        address: as the scheduler prints it, such as ``tcp://127.0.0.1:8786``.
        request: what is run; an error here ends the workers that are at it, and their nannies restart them.

    Raises:
        DependencyError: the package distributed is not installed.
        ConfigError: there is no scheduler.
        WorkerError: an attack ended every worker that it was given to.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        message = "distributed is not installed; `pip install invlib[cluster]` brings it"
        raise DependencyError(message) from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--dask is {address!r}, where no scheduler answers ({error}); expected an address such as "
            "tcp://127.0.0.1:8786, which `dask scheduler` prints"
        ) from error
    with client:
        try:
            yield client.get_executor(pure=False)
        except KilledWorker as error:
            raise WorkerError(
                f"an attack ended every worker that it was given to ({error}); the record holds every attack "
                "that had ended, and the same command goes on from there"
            ) from error
        except BaseException:
            if client.status == "running":
                client.run(runner.stop, request, on_error="ignore")
            raise
