"""Steps of an attack: each engine against the loop of 2020, from the same starts, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import invlib as iv
from invlib.search.engines.memory import peak
from tests.benchmarks import baseline
from tests.benchmarks.conftest import DEVICE

GPU = DEVICE.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is attacked: ``steps`` for a single restart of the baseline, fewer for many."""

    model: str
    restarts: int = 1
    engine: str = "auto"
    client: object = iv.FedSGD()
    images: int = 1
    side: int = 32
    steps: int = 10
    precision: str = "full"
    rounds: int = 5
    target: float | None = None

    def __str__(self) -> str:
        client = "" if isinstance(self.client, iv.FedSGD) else f", FedAvg of {self.client.local_steps} steps"
        images = "" if self.images == 1 else f", {self.images} images"
        side = "" if self.side == 32 else f", {self.side} px"
        restarts = "1 restart" if self.restarts == 1 else f"{self.restarts} restarts"
        precision = "" if self.precision == "full" else f", {self.precision}"
        return f"{self.model}{side}{images}{client}, {restarts}, {self.engine}{precision}"


def aims(cpu: float | None, gpu: float | None = None) -> float | None:
    return gpu if GPU else cpu


CASES = [
    Case(model="LeNetZhu", steps=60, target=aims(None, 5)),
    Case(model="LeNetZhu", restarts=8, steps=30),
    Case(model="LeNetZhu", restarts=16, steps=30, target=aims(6)),
    Case(model="LeNetZhu", restarts=32, steps=30),
    Case(model="ConvNet8", steps=30),
    Case(model="ConvNet8", restarts=8, steps=10),
    Case(model="ConvNet8", restarts=32, steps=5),
    Case(model="ConvNet64", steps=4, target=aims(1.3, 5)),
    Case(model="ConvNet64", restarts=8, steps=2),
    Case(model="ConvNet64", restarts=32, steps=1, rounds=2),
    Case(model="ResNet20", steps=15),
    Case(model="ResNet20", restarts=8, steps=8, target=aims(2)),
    Case(model="ResNet20", restarts=32, steps=4),
    Case(model="ResNet20-4", steps=2, target=aims(None, 5)),
    Case(model="ResNet20-4", steps=2, precision="bfloat16"),
    Case(model="ResNet20-4", restarts=8, steps=1, rounds=3),
    Case(model="ResNet20-4", restarts=32, steps=1, rounds=2, target=aims(None, 10)),
    # On a CPU a single step takes seconds.
    Case(model="ResNet18", side=224, steps=5 if GPU else 1, rounds=5 if GPU else 3, target=aims(None, 1.5)),
    Case(model="LeNetZhu", images=8, steps=20),
    Case(model="LeNetZhu", images=100, steps=5),
    Case(model="LeNetZhu", client=iv.FedAvg(lr=0.01, local_steps=5), steps=10),
    Case(model="LeNetZhu", client=iv.FedAvg(lr=0.01, local_steps=20), steps=3),
    Case(model="ResNet20", client=iv.FedAvg(lr=0.01, local_steps=5), steps=3),
]
LARGE = [
    Case(model="ResNet20-4", restarts=32, steps=5, precision="bfloat16"),
    Case(model="ResNet18", side=224, steps=5, precision="bfloat16"),
    Case(model="ResNet20", client=iv.FedAvg(lr=0.01, local_steps=20), steps=3),
    Case(model="ResNet20", images=100, steps=3),
]


@pytest.mark.parametrize("case", CASES + (LARGE if GPU else []), ids=str)
def test_steps(case: Case, race, benchmark) -> None:
    # There are fewer patches than the largest batch has images: they come round again.
    x, y = iv.data.samples("photos224" if case.side == 224 else "patches32")
    rows = [k % len(x) for k in range(case.images)]
    x, y = x[rows], y[rows]
    classes = int(y.max()) + 1
    model = iv.models.build(case.model, num_classes=max(classes, 10), image_size=case.side, seed=0).to(DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE)
    seen = iv.observe(model, x, y, case.client, normalization=iv.CIFAR10)
    steps = case.steps * (5 if GPU else 1)
    attack = iv.inverting_gradients(
        steps=steps, restarts=case.restarts, engine=case.engine, precision=case.precision
    )
    starts = torch.randn(case.restarts, *x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def reference(steps: int = steps) -> float:
        # One restart is enough to know what many take: they run one after another.
        found, _ = baseline.attack(model, seen, starts[:1], steps)
        return float(iv.metrics.psnr(found, x).mean())

    def ours() -> float:
        found = attack(model, seen, generator=torch.Generator().manual_seed(0))
        return float(iv.metrics.psnr(found.trials[0], x).mean())

    # An attack measures where its last step led, and its result once more: beside thousands of steps that is
    # nothing, beside these few it has to be counted.
    work = case.restarts * (steps + 2) / steps
    race(str(case), reference, ours, work=work, target=case.target, rounds=case.rounds)
    if case.restarts == 1:
        benchmark.extra_info["megabytes"] = {
            "baseline": peak(lambda: reference(steps=2), DEVICE) / 1e6,
            "contender": peak(lambda: replace(attack, steps=2)(model, seen), DEVICE) / 1e6,
        }
    if not GPU:
        benchmark.extra_info["convolutions"] = share_of_convolutions(ours)


def share_of_convolutions(work: Callable[[], object]) -> float:
    """Return which part of the time the library's convolutions and matrix products take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    library = ("conv", "aten::bmm", "aten::mm", "aten::addmm", "aten::col2im", "aten::im2col")
    within = sum(time for name, time in times.items() if any(part in name for part in library))
    return within / sum(times.values())
