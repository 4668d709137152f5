"""The three operations of `invlib.kernels`: how near each implementation comes to the speed of a copy.

Usage: ``pytest tests/benchmarks/bench_kernels.py``, or ``INVLIB_BENCH_DEVICE=cuda pytest ...`` on a GPU.

Every case first compares its result with the reference in float64 and fails if it is wrong; only then is it
timed. The bytes of an operation are those that it cannot avoid, each tensor read or written once, so that an
implementation that goes over memory more often shows a lower number of GB/s. Beside it stands what a plain
copy of as many bytes reaches, measured before and after. All times are the fastest of several rounds:
whatever else a machine does only adds to them.

On a GPU, "device" is the time between two CUDA events around one call, with the queue filled beforehand and
the L2 cache emptied; "call" is what one call of many costs from Python. Caches stay warm on a CPU. Triton and
``torch.compile`` are timed on a GPU only; ``INVLIB_BENCH_COMPILE=1`` compiles on a CPU too, which is slow.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from invlib import kernels
from invlib.kernels import reference
from tests.benchmarks.conftest import DEVICE, wait

GPU = DEVICE.type == "cuda"

SIZES = [10**k for k in range(4, 9 if GPU else 7)]
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
OPERATIONS = ["statistics", "statistics+gradient", "variation", "variation+gradient", "adam"]
IMPLEMENTATIONS = ["reference", "foreach"]
if GPU or os.environ.get("INVLIB_BENCH_COMPILE") == "1":
    IMPLEMENTATIONS.append("compile")
if GPU:
    IMPLEMENTATIONS.append("triton")
CHOICES = list(itertools.product(OPERATIONS, IMPLEMENTATIONS))

# Largest difference from the float64 reference, as a share of the largest number of the same tensor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
GOAL = 0.8  # share of the copy's bandwidth that Triton is to reach ...
LARGE = 10**7  # ... from this many numbers on
ROUNDS = 20 if GPU else 10

Outputs = Sequence[Tensor]


def clock() -> float:
    """Tell the time once everything that was started has ended."""
    wait()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=clock)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation on given inputs.

    Args:
        run: computes it once, and leaves the inputs as they are unless it works in place.
        state: what it changes in place.
        traffic: bytes that have to be read or written, each once.
        elements: numbers in one of its tensors, or in one of its lists.
    """

    run: Callable[[], Outputs]
    state: Outputs
    traffic: int
    elements: int


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def draw(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    # Drawn in float32 and rounded: float64 then holds the very same numbers.
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


# --- statistics of two lists of gradients


def parts(elements: int) -> list[int]:
    """Cut a number of elements into 64 odd sizes as a network does: many small tensors, few large ones."""
    small = [17 + 2 * k for k in range(32)]
    scale = [1.2**k for k in range(32)]
    rest = elements - sum(small)
    return [*small, *(int(rest * s / sum(scale)) | 1 for s in scale)]


def foreach_statistics(candidate: Outputs, target: Outputs, weights: Sequence[float]) -> tuple[Tensor, ...]:
    assert set(weights) == {1.0}
    dtype = torch.float64 if candidate[0].dtype == torch.float64 else torch.float32
    products = torch._foreach_mul(candidate, target)
    dot = torch.stack([product.sum(dtype=dtype) for product in products]).sum()
    ours, theirs = (
        torch.stack(torch._foreach_norm(tensors, 2, dtype)).square().sum() for tensors in (candidate, target)
    )
    return dot, ours, theirs


def statistics_case(name: str, elements: int, dtype: torch.dtype, gradient: bool) -> Case:
    sizes = parts(elements)
    candidate = [draw((size,), torch.float32, seed) for seed, size in enumerate(sizes)]
    # Not independent of each other: the dot product of two unrelated lists is all cancellation.
    target = [(c + draw(c.shape, torch.float32, 100 + i)) for i, c in enumerate(candidate)]
    exact = torch.float64 if name == "exact" else dtype
    candidate = [c.to(dtype).to(exact).requires_grad_(gradient) for c in candidate]
    target = [t.to(dtype).to(exact) for t in target]
    along = (torch.tensor(-1.0, device=DEVICE), torch.tensor(0.5, device=DEVICE))

    forward: Callable[..., Any] = {
        "reference": functools.partial(kernels.gradient_statistics, impl="reference"),
        "triton": functools.partial(kernels.gradient_statistics, impl="triton"),
        "foreach": foreach_statistics,
        "compile": compiled(reference.gradient_statistics),
    }["reference" if name == "exact" else name]
    weights = (1.0,) * len(candidate)

    def run() -> Outputs:
        if not gradient:
            return forward(candidate, target, weights)
        if name == "foreach":  # by hand, which is faster than autograd's way through the same operations
            with torch.no_grad():
                sums = forward(candidate, target, weights)
                gradients = torch._foreach_mul(target, along[0])
                torch._foreach_add_(gradients, torch._foreach_mul(candidate, 2 * along[1]))
            return *sums, *gradients
        dot, ours, theirs = forward(candidate, target, weights)
        upstream = [a.to(dot.dtype) for a in along]
        return dot, ours, theirs, *torch.autograd.grad((dot, ours), candidate, upstream)

    traffic = nbytes(*candidate, *target) * (2 if gradient else 1) + (nbytes(*candidate) if gradient else 0)
    return Case(run=run, state=(), traffic=traffic, elements=sum(sizes))


# --- total variation


def pictures(elements: int) -> tuple[int, int, int, int]:
    """Return the shape of a batch with about so many numbers, and an odd width."""
    side = min(223, round((elements / 3) ** 0.5) | 1)
    return max(1, round(elements / (3 * side * side))), 3, side, side


def foreach_variation(images: Tensor) -> Tensor:
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    ahead = [images[..., :, 1:], images[..., 1:, :]]
    behind = [images[..., :, :-1], images[..., :-1, :]]
    across, down = torch._foreach_norm(torch._foreach_sub(ahead, behind), 1, dtype)
    return across / ahead[0].numel() + down / ahead[1].numel()


def variation_case(name: str, elements: int, dtype: torch.dtype, gradient: bool) -> Case:
    exact = torch.float64 if name == "exact" else dtype
    images = draw(pictures(elements), dtype, 0).to(exact).requires_grad_(gradient)
    compiled_variation = compiled(reference.total_variation)
    forward: Callable[[Tensor], Tensor] = {
        "reference": functools.partial(kernels.total_variation, impl="reference"),
        "triton": functools.partial(kernels.total_variation, impl="triton"),
        "foreach": foreach_variation,
        "compile": lambda x: compiled_variation(x, "mean"),
    }["reference" if name == "exact" else name]

    def run() -> Outputs:
        value = forward(images)
        # Times the number of elements: a gradient of 1e-8 says nothing in bfloat16.
        return (value, *torch.autograd.grad(value * elements, images)) if gradient else (value,)

    return Case(run=run, state=(), traffic=nbytes(images) * (3 if gradient else 1), elements=images.numel())


# --- signed Adam and the box

ADAM: dict[str, Any] = {"step": 10, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "signed": True}


def foreach_adam(x: Tensor, grad: Tensor, m: Tensor, v: Tensor, low: Tensor, high: Tensor) -> None:
    first, second = ADAM["betas"]
    sign = torch._foreach_sign([grad])
    torch._foreach_lerp_([m], sign, 1 - first)
    torch._foreach_mul_([v], second)
    torch._foreach_addcmul_([v], sign, sign, 1 - second)
    root = torch._foreach_sqrt([v])
    torch._foreach_div_(root, (1 - second ** ADAM["step"]) ** 0.5)
    torch._foreach_add_(root, ADAM["eps"])
    torch._foreach_addcdiv_([x], [m], root, -ADAM["lr"] / (1 - first ** ADAM["step"]))
    x.clamp_(low, high)


def adam_case(name: str, elements: int, dtype: torch.dtype, gradient: bool) -> Case:
    assert not gradient
    exact = torch.float64 if name == "exact" else dtype
    shape = pictures(elements)
    x, grad, m, v = (draw(shape, torch.float32, seed).to(dtype).to(exact) for seed in range(4))
    v.abs_()
    low, high = (
        torch.tensor(b, device=DEVICE, dtype=exact).view(1, 3, 1, 1) for b in ([-2.0, -1, -3], [2.0, 1, 3])
    )
    compiled_adam = compiled(reference.adam_step_)
    step: Callable[..., None] = {
        "reference": functools.partial(kernels.adam_step_, **ADAM, impl="reference"),
        "triton": functools.partial(kernels.adam_step_, **ADAM, impl="triton"),
        "foreach": foreach_adam,
        "compile": functools.partial(compiled_adam, **ADAM),
    }["reference" if name == "exact" else name]

    @torch.no_grad()
    def run() -> Outputs:
        step(x, grad, m, v, low=low, high=high)
        return x, m, v

    return Case(run=run, state=(x, m, v), traffic=nbytes(x, m, v) * 2 + nbytes(grad), elements=x.numel())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, for its sizes alone."""

    @functools.cache
    def made() -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return lambda *args, **kwargs: made()(*args, **kwargs)


CASES: dict[str, Callable[..., Case]] = {
    "statistics": statistics_case,
    "variation": variation_case,
    "adam": adam_case,
}


def build(operation: str, name: str, elements: int, dtype: torch.dtype) -> Case:
    kind, _, gradient = operation.partition("+")
    return CASES[kind](name, elements, dtype, bool(gradient))


# --- is it right, and how long does it take


def error(case: Case, exact: Case) -> float:
    """Run both once and return the largest difference, as a share of each tensor's largest number."""
    before = [tensor.clone() for tensor in case.state]
    worst = 0.0
    for ours, theirs in zip(case.run(), exact.run(), strict=True):
        scale = float(theirs.detach().abs().max())
        difference = float((ours.detach().double() - theirs.detach()).abs().max())
        worst = max(worst, difference / scale)
    for tensor, old in zip(case.state, before, strict=True):
        tensor.copy_(old)
    return worst


def device_seconds(run: Callable[[], Any]) -> float:
    """Return the time that a GPU needs for one call, without what Python needs to ask for it."""
    cache = torch.empty(2**28, dtype=torch.int8, device=DEVICE)  # several times the largest L2 cache
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # tens of milliseconds in which Python gets ahead of the GPU
    for began, ended in marks:
        cache.zero_()
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return min(began.elapsed_time(ended) for began, ended in marks) / 1e3


def seconds(run: Callable[[], Any], calls: int, rounds: int = ROUNDS) -> float:
    """Return the time of one call, asked for several times in a row."""
    times = []
    for _ in range(rounds):
        began = clock()
        for _ in range(calls):
            run()
        times.append((clock() - began) / calls)
    return min(times)


def copy_seconds(traffic: int, calls: int) -> float:
    """Return the time of a copy that reads and writes so many bytes in all."""
    source = torch.ones(max(traffic // 8, 1), device=DEVICE)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    return device_seconds(copy) if GPU else seconds(copy, calls, rounds=5 * ROUNDS)


@pytest.fixture(scope="module", autouse=True)
def _printed(request: pytest.FixtureRequest) -> None:
    """Have the table printed after the last test."""
    request.config.pluginmanager.register(Summary(), __name__ + ".summary")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize(("operation", "implementation"), CHOICES)
def test_bandwidth(
    benchmark: Any, operation: str, dtype: torch.dtype, elements: int, implementation: str
) -> None:
    case = build(operation, implementation, elements, dtype)
    off = error(case, build(operation, "exact", elements, dtype))
    # _foreach_norm adds up in long chains on a CPU: it may be less exact, and the table says how much.
    allowed = TOLERANCES[dtype] * (10 if implementation == "foreach" else 1)
    assert off <= allowed, f"differs from the reference in float64 by {off:.1e}"

    calls = 20 if GPU else max(1, round(3e-3 / seconds(case.run, 1, rounds=3)))
    copied = copy_seconds(case.traffic, calls)
    benchmark.pedantic(case.run, rounds=ROUNDS, iterations=calls, warmup_rounds=1)
    if benchmark.disabled:
        return
    call = benchmark.stats.stats.min
    needed = device_seconds(case.run) if GPU else call
    copied = min(copied, copy_seconds(case.traffic, calls))
    benchmark.extra_info.update(
        operation=operation,
        elements=case.elements,
        dtype=str(dtype).removeprefix("torch."),
        implementation=implementation,
        device=torch.cuda.get_device_name() if GPU else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        bytes=case.traffic,
        seconds=needed,
        call_seconds=call,
        gb_per_second=case.traffic / needed / 1e9,
        copy_gb_per_second=case.traffic / copied / 1e9,
        share_of_copy=copied / needed,
        error=off,
    )


class Summary:
    """Prints what was measured as one table, and what follows from it for the choice of implementation."""

    def pytest_terminal_summary(self, terminalreporter: Any, config: Any) -> None:
        """Print the rows in the order of the operations."""
        session = getattr(config, "_benchmarksession", None)
        benchmarks = session.benchmarks if session else []
        rows = [b.extra_info for b in benchmarks if "share_of_copy" in b.extra_info]
        if not rows:
            return
        write = terminalreporter.write_line
        write("")
        write(f"kernels on {rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}")
        write(
            f"{'operation':21}{'elements':>11} {'dtype':9}{'implementation':15}{'call':>11}{'device':>11}"
            f"{'GB/s':>8}{'copy':>8}{'share':>7}{'error':>9}"
        )
        groups = defaultdict(list)
        for row in rows:
            groups[OPERATIONS.index(row["operation"]), row["dtype"], row["elements"]].append(row)
        for key in sorted(groups):
            for row in groups[key]:
                write(
                    "{operation:21}{elements:11,d} {dtype:9}{implementation:15}".format(**row)
                    + f"{row['call_seconds'] * 1e6:8.1f} µs"
                    + (f"{row['seconds'] * 1e6:8.1f} µs" if GPU else f"{'':>11}")
                    + "{gb_per_second:8.1f}{copy_gb_per_second:8.1f}{share_of_copy:7.1%}{error:9.0e}".format(
                        **row
                    )
                )
        if not GPU:
            write("Triton was not timed: that needs a GPU (INVLIB_BENCH_DEVICE=cuda).")
            return
        for key in sorted(groups):
            for line in verdict(groups[key]):
                write(line)


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Say where another implementation is faster than Triton, or Triton slower than was aimed at."""
    by_name = {row["implementation"]: row for row in rows}
    triton = by_name.get("triton")
    if triton is None:
        return []
    where = f"{triton['operation']}, {triton['elements']:,} x {triton['dtype']}"
    found = []
    best = min(rows, key=lambda row: row["seconds"])
    if best is not triton:
        times = triton["seconds"] / best["seconds"]
        found.append(f"{where}: {best['implementation']} is {times:.2f} times faster than triton")
    if triton["elements"] >= LARGE * 0.99 and triton["share_of_copy"] < GOAL:
        found.append(
            f"{where}: triton reaches {triton['share_of_copy']:.0%} of a copy's speed, aimed at {GOAL:.0%}"
        )
    return found
