"""The matched attacker: below his bound everywhere, at it where that can be."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn

from invlib.core.normalization import UNIT
from invlib.defenses import accounting, bounds, candidate_gradients, matched_attack
from invlib.errors import ConfigError

ONE = "add or remove one"
TRIALS = 4000


def bound(candidates, noise, rounds=1):
    return bounds.reconstruction_bound(
        1 / candidates, accounting.gaussian_mu(noise, neighbours=ONE, rounds=rounds)
    )


def orthogonal_share(candidates, mu):
    """The probability that the right one of independent scores is the highest."""
    z = np.linspace(-10, 10 + mu, 20001)
    density = np.exp(-((z - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    return float((density * ndtr(z) ** (candidates - 1)).sum() * (z[1] - z[0]))


def error(share):
    return math.sqrt(max(share * (1 - share), 1 / TRIALS) / TRIALS)


@pytest.mark.parametrize("kind", ["orthogonal", "alike", "short", "random"])
@pytest.mark.parametrize("noise", [4, 2, 1, 0.5, 0.25])
@pytest.mark.parametrize("candidates", [3, 60])
def test_nobody_beats_the_bound_in_40_settings(kind, noise, candidates):
    generator = torch.Generator().manual_seed(candidates)
    gradients = {
        "orthogonal": 5 * torch.eye(candidates),
        "alike": 5 * torch.eye(candidates) + 3,
        "short": 0.7 * torch.eye(candidates),  # below the clip of 1
        "random": torch.randn(candidates, 40, generator=generator),
    }[kind]
    found = matched_attack(gradients, clip=1.0, noise_multiplier=noise, rounds=2, trials=TRIALS)
    assert len(found.ranks) == TRIALS
    most = bound(candidates, noise, rounds=2)
    assert found.share <= most + 3 * error(most)
    if kind == "orthogonal":
        exact = orthogonal_share(candidates, math.sqrt(2) / noise)
        assert found.share == pytest.approx(exact, abs=4 * error(exact))


@pytest.mark.parametrize("mu", [0.25, 0.5, 4])
@pytest.mark.parametrize("candidates", [10, 100])
def test_orthogonal_gradients_come_within_ten_percent(candidates, mu):
    found = matched_attack(torch.eye(candidates), clip=1.0, noise_multiplier=1 / mu, trials=40_000)
    most = bound(candidates, 1 / mu)
    near = math.sqrt(most * (1 - most) / 40_000)
    assert 0.9 * most - 3 * near <= found.share <= most + 3 * near


def test_two_opposite_gradients_meet_it():
    found = matched_attack(torch.tensor([[2.0], [-2.0]]), clip=1.0, noise_multiplier=0.8, trials=TRIALS)
    most = bound(2, 0.8)
    assert found.share == pytest.approx(most, abs=4 * error(most))


def test_products_stand_for_the_noisy_updates():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)  # another network each round
    clipped = gradients / gradients.norm(dim=2, keepdim=True).clamp_min(2.0)
    hits = 0
    for trial in range(TRIALS):
        sent = clipped[:, trial % 6] + 1.5 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
        score = torch.einsum("tp,tnp->n", sent, clipped) - clipped.square().sum((0, 2)) / 2
        hits += int(score.argmax() == trial % 6)
    found = matched_attack(gradients, clip=2.0, noise_multiplier=1.5, trials=TRIALS)
    assert found.share == pytest.approx(hits / TRIALS, abs=5 * error(hits / TRIALS))


def test_same_seed_same_game_and_no_global_draw():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = matched_attack(torch.eye(4), clip=1.0, noise_multiplier=1.0, trials=20)
    again = matched_attack(
        torch.eye(4), clip=1.0, noise_multiplier=1.0, trials=20, generator=torch.Generator().manual_seed(0)
    )
    assert first == again
    assert torch.equal(before, torch.get_rng_state())


def test_candidates_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    rows = candidate_gradients(model, images, labels, normalization=UNIT)
    assert rows.shape == (5, 39)
    loss = nn.functional.cross_entropy(model(images), labels)
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
    torch.testing.assert_close(rows.mean(0), mean)
    assert matched_attack(rows, clip=0.1, noise_multiplier=0.01, trials=50).share == 1


@pytest.mark.parametrize(
    "gradients",
    [torch.ones(1, 3), torch.ones(3), torch.tensor([[1.0], [math.nan]])],
    ids=["1", "flat", "nan"],
)
def test_no_game(gradients):
    with pytest.raises(ConfigError, match=r"gradients is Tensor .*; expected finite numbers"):
        matched_attack(gradients, clip=1.0, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="clip is 0; expected a positive number"):
        matched_attack(torch.eye(3), clip=0, noise_multiplier=1.0)


def test_short_and_long_gradients_are_weighed_by_their_length():
    found = matched_attack(
        torch.tensor([[1.0, 0.0], [0.1, 0.0]]), clip=1.0, noise_multiplier=0.5, trials=TRIALS
    )
    exact = bounds.two_point_bound(0.9, 0.5)
    assert found.share == pytest.approx(exact, abs=4 * error(exact))
