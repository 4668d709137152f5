"""Layers are noted in the order in which they run, and the network is left as it was."""

import itertools
import sys

import pytest
import torch
from torch import nn

from invlib.core.network import record_layers
from invlib.core.optional import torchvision
from invlib.errors import DependencyError, DeviceError
from tests.conftest import build_tiny, random_batch


class Twice(nn.Module):
    """Runs one layer twice, by keyword, and one never."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.first(input=self.act(self.first(x)))


def test_every_call_is_noted_in_order():
    net = Twice()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    output, calls = record_layers(net, x)
    assert [call.name for call in calls] == ["first", "act", "first"]
    assert [call.layer for call in calls] == [net.first, net.act, net.first]
    assert torch.equal(calls[0].given, x)
    for before, after in itertools.pairwise(calls):
        assert torch.equal(after.given, before.output)
    assert torch.equal(output, calls[-1].output)
    torch.testing.assert_close(output, net(x))
    assert not output.requires_grad


def test_the_types_of_layers_are_chosen():
    x, _ = random_batch(2)
    _, calls = record_layers(build_tiny(), x, nn.Linear)
    assert [call.name for call in calls] == ["3"]
    assert calls[0].given.shape == (2, 96)
    assert [c.name for c in record_layers(build_tiny(), x, (nn.Conv2d, nn.Flatten))[1]] == ["0", "2"]
    assert [c.name for c in record_layers(build_tiny(), x)[1]] == ["0", "1", "2", "3"]


def test_parameters_can_be_given():
    net = build_tiny()
    x, _ = random_batch()
    zero = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    output, calls = record_layers(net, x, nn.Conv2d, params=zero)
    assert not output.any()
    assert not calls[0].output.any()
    assert all(p.any() for p in net.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_modes_statistics_and_hooks_are_left_as_they_were(training):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(not training)
    net[2].eval()
    modes = [m.training for m in net.modules()]
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    _, calls = record_layers(net, x, training=training)
    batch_mean = calls[1].output.mean(0).abs().max()
    assert (batch_mean < 1e-6) == training  # normalised by the batch in training mode alone
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    with pytest.raises(RuntimeError):
        record_layers(net, torch.zeros(1, 7), training=training)
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks for m in net.modules())


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DependencyError, match=r"torchvision is not installed; `pip install invlib"):
        torchvision()
    assert issubclass(DependencyError, DeviceError)
