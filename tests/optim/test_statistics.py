"""Statistics of a batch from buffers that were sent: the equations, every kind of client, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import RecoveryError
from invlib.optim.priors import BatchStatistics
from invlib.optim.statistics import batch_statistics
from tests.conftest import random_batch


def normed(momentum=0.1, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU()),
            *(nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5, momentum=momentum), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(20, 5)),
        )
        for name, b in net.named_buffers():
            if "running" in name:
                nn.init.uniform_(b, 0.5, 2)
    return net.to(dtype).eval()


def see(net, count, protocol=None):
    x, y = random_batch(count, dtype=next(net.parameters()).dtype)
    protocol = protocol or iv.FedSGD()
    return x, iv.observe(net, x, y, protocol, normalization=iv.CIFAR10, training_mode=True)


def inputs_of_layers(net, x, training=True):
    """Return what the batch-norm layers of a copy of the network are given, by name."""
    copied, seen = copy.deepcopy(net).train(training), {}
    for name in ("1", "4"):
        layer = copied.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        copied(iv.CIFAR10.encode(x))
    return seen


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_one_step_gives_the_statistics_that_the_layer_computed(count, momentum):
    net = normed(momentum)
    net[1].num_batches_tracked += 3
    net[4].num_batches_tracked += 3
    x, seen = see(net, count)
    found = batch_statistics(net, seen)
    assert [*found] == ["1", "4"]
    for name, given in inputs_of_layers(net, x).items():
        torch.testing.assert_close(found[name].mean, given.mean((0, 2, 3)))
        torch.testing.assert_close(found[name].variance, given.var((0, 2, 3), correction=0))
        assert found[name].gaps(given).abs().max() < 1e-9


def test_single_precision_leaves_rounding():
    net = normed(dtype=torch.float32)
    x, seen = see(net, 4)
    for name, given in inputs_of_layers(net, x).items():
        assert batch_statistics(net, seen)[name].gaps(given).abs().max() < 1e-4


@pytest.mark.parametrize("momentum", [0.3, None])
def test_several_steps_of_a_real_loop_give_their_weighted_mean(momentum):
    net = normed(momentum)
    x, y = random_batch(6, dtype=torch.float64)
    client, seen = copy.deepcopy(net).train(), []
    client[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(0, 2)):
        optimizer.zero_grad()
        F.cross_entropy(client(iv.CIFAR10.encode(x)[rows]), y[rows]).backward()
        optimizer.step()
    protocol = iv.FedAvg(lr=0.1, local_steps=4, batch_size=2)
    sent = iv.from_state_dicts(
        net,
        net.state_dict(),
        client.state_dict(),
        protocol=protocol,
        num_images=6,
        image_shape=(3, 8, 8),
        normalization=iv.CIFAR10,
        training_mode=True,
    )
    found = batch_statistics(net, sent)["1"]
    weights = torch.tensor([0.7**k for k in (3, 2, 1, 0)] if momentum else [1.0] * 4, dtype=torch.float64)
    weights /= weights.sum()
    mean = sum(w * z.mean((0, 2, 3)) for w, z in zip(weights, seen, strict=True))
    variance = sum(w * z.var((0, 2, 3), correction=0) for w, z in zip(weights, seen, strict=True))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, variance)
    assert [rows for rows, _ in found.parts] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert found.parts[0][1] == pytest.approx(float(weights[0] + weights[3]))
    still = iv.observe(
        net, x, y, replace(protocol, lr=1e-12), normalization=iv.CIFAR10, training_mode=True
    )  # the weights hardly move, and one pass gives what all steps did
    at_start = inputs_of_layers(net, x)["1"]
    assert batch_statistics(net, still)["1"].gaps(at_start).abs().max() < 1e-6


def test_the_prior_is_zero_at_the_clients_batch_alone():
    net = normed()
    x, seen = see(net, 3)
    prior = BatchStatistics().of(net, seen, None)
    encode = iv.CIFAR10.encode
    assert prior(encode(x)) < 1e-15
    for other in (0.5 * x + 0.2, x.flip(3), random_batch(3, seed=5, dtype=torch.float64)[0]):
        assert prior(encode(other)) > 1e-5
    assert torch.autograd.gradcheck(prior, (encode(0.9 * x).requires_grad_(),))
    assert not net[1]._forward_pre_hooks


def test_a_search_takes_it_with_restarts_together():
    net = normed(dtype=torch.float32)
    _, seen = see(net, 2)
    attack = iv.GradientMatching(steps=3, restarts=2, priors=((0.1, BatchStatistics()),))
    assert torch.isfinite(attack(net, seen).trial_scores).all()


def test_refusals_name_what_is_missing():
    net = normed()
    _, seen = see(net, 2)
    own = {name: b.clone() for name, b in net.named_buffers()}
    for buffers in ({}, own):
        with pytest.raises(RecoveryError, match="sent no running statistics of Sequential that moved"):
            batch_statistics(net, replace(seen, buffers=buffers))
    torn = dict(seen.buffers) | {"1.running_var": 0.1 * own["1.running_var"]}
    with pytest.raises(RecoveryError, match=r"variances of '1' give a batch's of -\d"):
        batch_statistics(net, replace(seen, buffers=torn))
    with pytest.raises(RecoveryError, match="counted 1 batches; expected the protocol's 2"):
        batch_statistics(net, replace(seen, protocol=iv.FedAvg(lr=0.1, local_steps=2)))


def test_one_value_of_a_channel_has_no_variance():
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    _, seen = see(net, 2)
    assert batch_statistics(net, seen)
    with pytest.raises(RecoveryError, match="'1' saw one value of each channel"):
        batch_statistics(net, replace(seen, num_images=1, labels=None))
