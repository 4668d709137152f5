"""One restart with channels last against one with channels first: where `invlib` should choose which."""

from __future__ import annotations

import pytest
import torch

import invlib as iv
from invlib.search.engines import eager
from tests.benchmarks.conftest import DEVICE

GPU = DEVICE.type == "cuda"
CASES = [("LeNetZhu", 40), ("ConvNet8", 20), ("ConvNet64", 2), ("ResNet20", 8), ("ResNet20-4", 2)]


@pytest.mark.parametrize("precision", ["full", "bfloat16"] if GPU else ["full"])
@pytest.mark.parametrize(("model", "steps"), CASES)
def test_channels_last(model: str, steps: int, precision: str, race, monkeypatch) -> None:
    x, y = (t.to(DEVICE) for t in iv.data.samples("patches32", indices=[0]))
    net = iv.models.build(model, num_classes=10, seed=0).to(DEVICE)
    seen = iv.observe(net, x, y % 10, iv.FedSGD(), normalization=iv.CIFAR10)
    attack = iv.inverting_gradients(steps=steps * (10 if GPU else 1), precision=precision)

    def run(last: bool) -> float:
        monkeypatch.setattr(eager, "channels_last", lambda problem: last)
        found = attack(net, seen, generator=torch.Generator().manual_seed(0))
        return float(iv.metrics.psnr(found.images, x).mean())

    chosen = eager.channels_last(attack.problem(net, seen))
    race(
        f"{model}, {precision}, channels last{' (chosen)' if chosen else ''}",
        lambda: run(last=False),
        lambda: run(last=True),
        work=1,
    )
