"""The best of 32 restarts, from start to end: halved here, one after another in the loop of 2020."""

from __future__ import annotations

import pytest
import torch

import invlib as iv
from tests.benchmarks import baseline
from tests.benchmarks.conftest import DEVICE


@pytest.mark.parametrize(("model", "steps", "target"), [("LeNetZhu", 100, 10), ("ResNet20", 40, 4)])
def test_best_of_32(model: str, steps: int, target: float, race) -> None:
    x, y = iv.data.samples("patches32", indices=[0])
    net = iv.models.build(model, num_classes=10, seed=0).to(DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE) % 10
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    attack = iv.inverting_gradients(steps=steps, restarts=32, prune=True)
    starts = torch.randn(32, *x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def reference() -> float:
        return float(iv.metrics.psnr(baseline.attack(net, seen, starts, steps)[0], x).mean())

    def ours() -> float:
        found = attack(net, seen, generator=torch.Generator().manual_seed(0))
        return float(iv.metrics.psnr(found.images, x).mean())

    race(f"{model}, best of 32 restarts, halved", reference, ours, work=1, target=target, rounds=3)
