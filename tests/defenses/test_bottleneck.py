"""A stochastic bottleneck: what it draws, who knows the draw, and what lies in front of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.defenses import Bottleneck, in_front, with_bottleneck
from invlib.errors import ConfigError, DoubtWarning
from tests.conftest import build_tiny, random_batch


@pytest.fixture
def net():
    model = with_bottleneck(build_tiny(torch.float64), "3", width=16)
    with torch.no_grad():  # as training may: draws that are of the means' size
        model[3][0].encoder.bias[16:] += 5
    return model


def observed(net, client, seed=0):
    x, y = random_batch(dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return x, y, iv.observe(net, x, y, client, normalization=iv.CIFAR10, generator=generator)


def test_it_is_inserted_into_a_copy(net):
    plain = build_tiny(torch.float64)
    again = with_bottleneck(plain, "3", width=16)
    assert not any(isinstance(m, Bottleneck) for m in plain.modules())
    assert torch.equal(again[3][1].weight, plain[3].weight)
    assert again[3][0].encoder.weight.shape == (32, 96)
    assert torch.equal(again[3][0].encoder.weight, net[3][0].encoder.weight)
    other = with_bottleneck(plain, "3", width=16, seed=1)
    assert not torch.equal(other[3][0].encoder.weight, net[3][0].encoder.weight)


def test_without_its_spread_it_is_two_layers(net):
    inner = net[3][0]
    with torch.no_grad():
        inner.encoder.weight[16:], inner.encoder.bias[16:] = 0, -1e3
    r = torch.randn(2, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = r @ inner.encoder.weight[:16].T + inner.encoder.bias[:16]
    torch.testing.assert_close(inner(r), mean @ inner.decoder.weight.T + inner.decoder.bias)


def test_draws_differ_and_repeat_by_their_seed(net):
    updates = [observed(net, iv.FedSGD(), seed)[2].update["0.weight"] for seed in (0, 0, 1)]
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[0], updates[2])


def test_noise_that_is_known_is_none(net):
    client = iv.FedAvg(lr=1.0, local_steps=1, dropout=7)
    x, y, seen = observed(net, client)
    attack = iv.GradientMatching()
    assert attack.score(net, seen, x, y) < 1e-12
    hidden = replace(seen, protocol=replace(client, dropout="drawn"))
    with pytest.warns(DoubtWarning, match="the model is random"):
        replace(attack, steps=1)(net, hidden)
    assert attack.score(net, hidden, x, y) > 1e-2


def test_what_lies_in_front_is_hurt_less(net):
    """The client's own images score lower there, in the mean of many draws."""
    attack, scores = iv.GradientMatching(), []
    for seed in range(12):
        x, y, seen = observed(net, iv.FedSGD(), seed + 1)
        scores.append(
            [attack.score(net, seen, x, y), replace(attack, layers=in_front(net)).score(net, seen, x, y)]
        )
    whole, front = torch.tensor(scores).mean(0)
    assert in_front(net) == iv.Layers(which="first", count=2)
    assert front < 0.5 * whole


@pytest.mark.parametrize("layer", ["0", "none", "", "1"])
def test_another_layer_is_refused(layer):
    with pytest.raises(ConfigError, match=f"with_bottleneck layer is '{layer}'.*; expected the name of a"):
        with_bottleneck(build_tiny(), layer)


def test_there_has_to_be_something_in_front():
    with pytest.raises(ConfigError, match="has no bottleneck"):
        in_front(build_tiny())
    with pytest.raises(ConfigError, match="has a bottleneck, with 0 trained tensors"):
        in_front(with_bottleneck(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "1"))
