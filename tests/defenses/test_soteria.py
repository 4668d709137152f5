"""Soteria: which columns it withholds, and the attacker who does not compare them."""

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.defenses.soteria import Soteria, shaped
from invlib.errors import ConfigError
from tests.conftest import random_batch


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(54, 20),
            nn.ReLU(),
            nn.Linear(20, 5),
        ).double()


def observed(net, client, n=1):
    x, y = random_batch(n, dtype=torch.float64)
    return x, y, iv.observe(net, x, y, client, normalization=iv.CIFAR10)


def withheld(seen, name="5.weight"):
    return ~seen.update[name].any(0)


def test_it_withholds_the_entries_whose_change_means_the_largest_change_of_the_image(net):
    x, _, _ = observed(net, iv.FedSGD(), 2)
    inputs = iv.CIFAR10.encode(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: net[:5](one[None])[0]))(inputs)
    size, entries = jacobian.flatten(2).norm(dim=2), net[:5](inputs)
    wanted = torch.where(entries > 0, entries / size, 0).sum(0)
    torch.testing.assert_close(shaped(net, net[5], inputs), wanted)
    _, _, seen = observed(net, Soteria("5", share=0.25), 2)
    assert withheld(seen)[wanted.topk(5).indices].all()
    assert not withheld(seen)[wanted.topk(20).indices[5 : int((wanted > 0).sum())]].any()


def test_what_it_does_not_withhold_is_the_gradient(net):
    _, _, plain = observed(net, iv.FedSGD())
    _, _, seen = observed(net, Soteria("3", share=0.5))
    gone = withheld(seen, "3.weight")
    assert int(gone.sum()) == 27
    assert torch.equal(seen.update["3.weight"][:, ~gone], plain.update["3.weight"][:, ~gone])
    assert all(torch.equal(seen.update[n], plain.update[n]) for n in plain.update if n != "3.weight")


def test_it_is_nothing_to_who_compares_what_was_sent(net):
    scores = []
    for public in (True, False):
        x, y, seen = observed(net, Soteria("3", share=0.9, public=public))
        assert isinstance(seen.protocol, Soteria if public else iv.FedSGD)
        scores.append(iv.GradientMatching().score(net, seen, x, y))
    assert scores[0] < 1e-12
    assert scores[1] > 1e-3


def test_to_leave_the_layer_out_gives_the_undefended_result(net):
    first = iv.GradientMatching(layers=iv.Layers(which="first", count=2), steps=20, restarts=2)
    results = [first(net, observed(net, client)[2]) for client in (iv.FedSGD(), Soteria("3", share=0.9))]
    assert torch.equal(results[0].trials, results[1].trials)
    assert results[0].score == results[1].score


def test_it_withholds_from_what_a_client_trained(net):
    client = iv.FedAvg(lr=0.1, local_steps=3)
    _, _, plain = observed(net, client, 2)
    _, _, seen = observed(net, Soteria("5", client=client, share=0.25), 2)
    gone = withheld(seen)
    assert torch.equal(seen.update["5.weight"][:, ~gone], plain.update["5.weight"][:, ~gone])
    assert gone.sum() > withheld(plain).sum()
    torch.testing.assert_close(seen.mean_gradient("5.bias"), plain.mean_gradient("5.bias"), atol=0, rtol=0)


def test_the_network_is_left_as_it_was(net):
    observed(net, Soteria("5"))
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("layer", ["0", "none", "4"])
def test_another_layer_is_refused(net, layer):
    with pytest.raises(ConfigError, match=rf"Soteria layer is '{layer}'.*; expected a fully connected"):
        observed(net, Soteria(layer=layer))


def test_a_layer_that_is_frozen_or_given_more_is_refused(net):
    net[5].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="whose weight is trained"):
        observed(net, Soteria("5"))
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.Flatten(), nn.Linear(15, 5)).double()
    with pytest.raises(ConfigError, match=r"is given \[\(1, 3, 64\)\]; expected \(N, d\), once"):
        observed(net, Soteria(layer="1"))
