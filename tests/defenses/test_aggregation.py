"""Secure aggregation: a sum of clients is one client of all images, and hides no more than that."""

import pickle

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.core.observation import stackable
from invlib.defenses.aggregation import SecureAggregation
from invlib.errors import ConfigError
from tests.conftest import build_tiny, random_batch

LOCAL = {"lr": 0.1, "epochs": 2, "batch_size": 2}


def observed(model, x, y, protocol, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return iv.observe(model, x, y, protocol, normalization=iv.CIFAR10, generator=generator)


def test_of_one_gradient_each_it_is_a_client_of_all_images(tiny):
    x, y = random_batch(6)
    whole, parts = (observed(tiny, x, y, c).update for c in (iv.FedSGD(), SecureAggregation(clients=3)))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_of_local_training_it_is_the_mean_of_each_ones_training():
    model = build_tiny(torch.float64)
    x, y = random_batch(8, dtype=torch.float64)
    client = iv.FedAvg(**LOCAL)
    seen = observed(model, x, y, SecureAggregation(clients=2, client=client))
    halves = [observed(model, x[rows], y[rows], client).update for rows in (slice(4), slice(4, 8))]
    whole = observed(model, x, y, client).update
    for name, value in seen.update.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)
    assert any((whole[name] - seen.update[name]).abs().max() > 1e-3 for name in whole)
    # two passes of two steps by each client, and not of four
    mean = seen.mean_gradient("3.bias", model)
    torch.testing.assert_close(mean, seen.update["3.bias"] / (-0.1 * 4))


def test_each_client_draws_an_order_of_its_own():
    model = build_tiny(torch.float64)
    x, y = random_batch(4, dtype=torch.float64)
    x, y = torch.cat([x, x]), torch.cat([y, y])  # both clients have the same images
    client = iv.FedAvg(lr=1.0, local_steps=1, batch_size=1, shuffle=True)
    sums = [observed(model, x, y, SecureAggregation(clients=2, client=client), seed) for seed in range(4)]
    alone = iv.FedAvg(lr=1.0, local_steps=1)
    each = [observed(model, x[k : k + 1], y[k : k + 1], alone).update["3.weight"] for k in range(4)]
    pairs = []
    for seen in sums:
        gaps = {
            (a, b): float((seen.update["3.weight"] - (each[a] + each[b]) / 2).norm())
            for a in range(4)
            for b in range(a, 4)
        }
        pairs.append(min(gaps, key=gaps.__getitem__))
        assert gaps[pairs[-1]] < 1e-12
    assert any(a != b for a, b in pairs)
    again = observed(model, x, y, SecureAggregation(clients=2, client=client), 3)
    assert torch.equal(again.update["3.weight"], sums[3].update["3.weight"])


def test_a_stack_of_restarts_is_each_by_itself():
    model = build_tiny(torch.float64)
    x, y = random_batch(4, dtype=torch.float64)
    seen = observed(model, x, y, SecureAggregation(clients=2, client=iv.FedAvg(**LOCAL, clip_norm=0.1)))
    assert stackable(seen.protocol)
    attack = iv.GradientMatching(restarts=3, steps=2, objective=iv.objectives.l2, engine="batched")
    eager = iv.GradientMatching(restarts=3, steps=2, objective=iv.objectives.l2, engine="eager")
    found = attack(model, seen)
    assert found.engine == "batched"
    torch.testing.assert_close(found.trial_scores, eager(model, seen).trial_scores)
    assert attack.score(model, seen, x, y) < 1e-20


@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=1)])
def test_whole_batches_come_back_from_the_sum(client):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.ReLU(), nn.Linear(100, 5))
    x, y = random_batch(4)
    seen = observed(model, x, y, SecureAggregation(clients=2, client=client))
    found = iv.exact_batch()(model, seen)
    assert found.certified.tolist() == [True] * 4
    order = torch.cdist(x.flatten(1), found.images.flatten(1)).argmin(1)
    torch.testing.assert_close(found.images[order], x, atol=1e-3, rtol=0)


def test_it_is_printed_and_pickled():
    client = SecureAggregation(clients=2, client=iv.FedAvg(lr=0.1, local_steps=2))
    assert pickle.loads(pickle.dumps(client)) == client
    assert repr(client) == "SecureAggregation(clients=2, client=FedAvg(lr=0.1, local_steps=2))"


def test_images_that_cannot_be_shared_out_are_refused(tiny):
    x, y = random_batch(5)
    with pytest.raises(ConfigError, match=r"SecureAggregation\(clients=2, .* is given 5 images; expected as"):
        observed(tiny, x, y, SecureAggregation(clients=2))


def test_batch_norm_of_batches_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    x, y = random_batch(2)
    with pytest.raises(ConfigError, match="batch norm '1'"):
        iv.observe(model, x, y, SecureAggregation(clients=2), normalization=iv.CIFAR10, training_mode=True)


# The noise and the clip of a client inside would be left out without a word.
INSIDE = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(0.1)])


@pytest.mark.parametrize("client", [None, 3, lambda model, inputs, labels: {}, INSIDE])
def test_what_is_no_clients_step_is_refused(client):
    with pytest.raises(ConfigError, match=r"SecureAggregation client is .*; expected a client's step"):
        SecureAggregation(clients=2, client=client)
