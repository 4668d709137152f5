"""Mixup: the update is that of mixtures, and mixtures come back from it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.defenses.mixup import Mixup, mixtures
from invlib.errors import ConfigError
from tests.conftest import build_tiny, random_batch


def observed(model, x, y, client, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return iv.observe(model, x, y, client, normalization=iv.CIFAR10, generator=generator, reveal_labels=False)


def draw(client, n, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return client.drawn(n).args[1:]


@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2)])
def test_it_is_the_step_on_mixtures_with_soft_labels(client):
    model = build_tiny(torch.float64)
    x, y = random_batch(4, dtype=torch.float64)
    seen = observed(model, x, y, Mixup(client=client), seed=3)
    pairs, share = draw(Mixup(client=client), 4, 3)
    mixed, soft = mixtures(x, pairs, share), mixtures(F.one_hot(y, 5).double(), pairs, share)
    assert 0 < share < 1
    torch.testing.assert_close(soft.sum(1), torch.ones(4).double())
    wanted = client(model, iv.CIFAR10.encode(mixed), soft)
    for name, value in seen.update.items():
        torch.testing.assert_close(value, wanted[name])
    assert iv.GradientMatching().score(model, seen, mixed, soft) < 1e-12
    assert iv.GradientMatching().score(model, seen, x, y) > 1e-4


def test_it_draws_by_the_generator_alone():
    model = build_tiny()
    x, y = random_batch(3)
    state = torch.get_rng_state()
    one, same, other = (observed(model, x, y, Mixup(), seed).update["3.weight"] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_one_image_is_mixed_with_itself():
    model = build_tiny(torch.float64)
    x, y = random_batch(dtype=torch.float64)
    mixed, plain = (observed(model, x, y, c).update for c in (Mixup(), iv.FedSGD()))
    for name in plain:
        torch.testing.assert_close(mixed[name], plain[name])


def test_the_first_layer_tells_of_mixtures_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.ReLU(), nn.Linear(100, 5)).double()
    x, y = random_batch(2, dtype=torch.float64)
    y[1] = (y[0] + 1) % 5
    seed = next(s for s in range(9) if draw(Mixup(), 2, s)[0].tolist() == [1, 0])
    seen = observed(model, x, y, Mixup(), seed)
    pairs, share = draw(Mixup(), 2, seed)
    mixed = mixtures(x, pairs, share)
    weight, bias = (seen.update[f"1.{name}"] for name in ("weight", "bias"))
    # all that the first layer says of inputs lies in the span of the two mixtures
    rows = iv.CIFAR10.encode(mixed).flatten(1)
    rest = weight - weight @ torch.linalg.pinv(rows) @ rows
    assert rest.norm() < 1e-9 * weight.norm()
    assert bias.norm() > 0


@pytest.mark.parametrize("alpha", [0, -1, float("inf")])
def test_alpha_has_to_be_positive(alpha):
    with pytest.raises(ConfigError, match=r"Mixup alpha is .*; expected a positive number"):
        Mixup(alpha=alpha)
