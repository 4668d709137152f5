"""What a call costs besides its steps: checks, the last measurement, the score, and closed forms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import invlib as iv
from tests.benchmarks import baseline
from tests.benchmarks.conftest import DEVICE, wait


def test_constant_cost(benchmark) -> None:
    """The time of no step: that of one, less what one more takes. Baseline and attack in turn."""
    model, seen, x = _case("ConvNet64")
    start = torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    timed = {
        "baseline": lambda steps: baseline.attack(model, seen, start, steps),
        "contender": lambda steps: iv.inverting_gradients(steps=steps)(model, seen),
    }
    rounds: dict[str, list[float]] = {who: [] for who in timed}
    for _ in range(5):
        for who, run in timed.items():
            one, three = (_seconds(lambda run=run, steps=steps: run(steps)) for steps in (1, 3))
            rounds[who].append((3 * one - three) / 2)
    benchmark.extra_info["constant"] = {who: statistics.median(all_) for who, all_ in rounds.items()}
    benchmark.pedantic(lambda: timed["contender"](1), rounds=3)


@pytest.mark.parametrize("model", ["ResNet20", "ConvNet64"])
def test_score(benchmark, model) -> None:
    net, seen, x = _case(model)
    attack = iv.inverting_gradients()
    benchmark.pedantic(lambda: attack.score(net, seen, x, seen.labels), rounds=9, warmup_rounds=1)


def test_recursive_inversion(benchmark) -> None:
    net, seen, x = _case("LeNetZhu")
    found = benchmark.pedantic(lambda: iv.recursive_inversion()(net, seen), rounds=5, warmup_rounds=1)
    benchmark.extra_info["psnr"] = float(iv.metrics.psnr(found.images, x.cpu()).mean())


def _case(name: str) -> tuple[torch.nn.Module, iv.Observation, torch.Tensor]:
    x, y = iv.data.samples("photos32", indices=[0])
    model = iv.models.build(name, num_classes=10, seed=0).to(DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE)
    return model, iv.observe(model, x, y, iv.FedSGD(), normalization=iv.CIFAR10), x


def _seconds(run: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
