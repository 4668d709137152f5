"""Where benchmarks run, and the table that they print: quality beside speed, and what was aimed at."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICE = torch.device(os.environ.get("INVLIB_BENCH_DEVICE", "cpu"))
THREADS = int(os.environ.get("INVLIB_BENCH_THREADS", "2"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


def wait() -> None:
    """Wait for the device, so that what was started counts."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Measure a contender against the baseline, in turn, and note how often it is faster.

    The fixture of pytest-benchmark times the contender; the baseline runs before each of its rounds, so that
    whatever else the machine does falls on both.
    """

    def run(
        name: str,
        baseline: Callable[[], float],
        contender: Callable[[], float],
        *,
        work: float,
        target: float | None = None,
        rounds: int = 5,
    ) -> None:
        """Run the race.

        Args:
            name: of the case.
            baseline: runs once and returns its quality.
            contender: likewise.
            work: how many times the baseline's work the contender does.
            target: how many times faster it should be.
            rounds: how often each runs.
        """
        times: list[float] = []
        quality: dict[str, float] = {}
        quality["contender"] = contender()  # warm; and whatever compiles does so here

        def first() -> None:
            wait()
            began = time.perf_counter()
            quality["baseline"] = baseline()
            wait()
            times.append(time.perf_counter() - began)

        def timed() -> None:
            contender()
            wait()

        benchmark.pedantic(timed, setup=first, rounds=rounds, iterations=1)
        ours = [t / work for t in benchmark.stats.stats.data]
        ratios = sorted(a / b for a, b in zip(times, ours, strict=True))
        benchmark.extra_info.update(
            case=name,
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            ratio=statistics.median(ratios),
            ratios=ratios,
            target=target,
            baseline_seconds=statistics.median(times),
            quality=quality,
        )

    return run


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out what names the machine and not its kind."""
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Print the ratios."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        "how many times faster than the baseline, per unit of work "
        f"({rows[0]['device']}, {rows[0]['threads']} threads)"
    )
    write(f"{'case':58}{'median':>8}{'of':>16}{'aim':>7}   PSNR, baseline and here")
    for row in rows:
        aim = "" if row["target"] is None else f"{row['target']:g}"
        missed = "  missed" if row["target"] is not None and row["ratio"] < row["target"] else ""
        spread = f"{row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}"
        quality = "{baseline:.2f} {contender:.2f} dB".format(**row["quality"])
        write(f"{row['case']:58}{row['ratio']:8.2f}{spread:>16}{aim:>7}   {quality}{missed}")
