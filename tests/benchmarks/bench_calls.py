"""Whole calls on one thread, with what they cost besides their steps, and calls that have none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import invlib as iv
from tests.benchmarks import baseline
from tests.benchmarks.bench_steps import share_of_convolutions
from tests.benchmarks.conftest import DEVICE, wait

# Model, restarts, steps, and the aim.
CALLS = [
    ("LeNetZhu", 1, 200, 1.3),
    ("LeNetZhu", 8, 40, None),
    ("LeNetZhu", 16, 40, 6),
    ("LeNetZhu", 16, 400, 6),
    ("LeNetZhu", 32, 40, None),
    ("ConvNet8", 1, 30, None),
    ("ConvNet8", 8, 10, None),
    ("ConvNet64", 1, 4, 1.3),
    ("ResNet20", 1, 40, 1.3),
    ("ResNet20", 8, 6, 2.5),
    ("ResNet20", 8, 40, 2.5),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("model", "restarts", "steps", "aim"), CALLS)
def test_call(race, benchmark, model, restarts, steps, aim) -> None:
    net, seen, x = _case(model)
    attack = iv.inverting_gradients(steps=steps, restarts=restarts)
    starts = torch.randn(restarts, *x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def reference() -> float:
        # One restart is enough to know what many take: they run one after another.
        return float(iv.metrics.psnr(baseline.attack(net, seen, starts[:1], steps)[0], x).mean())

    def ours() -> float:
        found = attack(net, seen, generator=torch.Generator().manual_seed(0))
        return float(iv.metrics.psnr(found.trials[0], x).mean())

    words = "1 restart" if restarts == 1 else f"{restarts} restarts"
    name = f"{model}, {words}, {steps} steps"
    race(name, reference, ours, work=restarts, target=aim, rounds=3 if steps * restarts > 300 else 5)
    benchmark.extra_info["convolutions"] = share_of_convolutions(ours)


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
