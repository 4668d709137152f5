"""Priors and the median filter against hand-made values, gradcheck and scipy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

import invlib as iv
from invlib.errors import ConfigError
from invlib.optim import priors
from tests.conftest import random_batch


def test_total_variation_by_hand():
    image = torch.tensor([[[[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]]]])
    assert priors.total_variation(image).item() == pytest.approx((1 + 2 + 1 + 2) / 4)
    assert priors.total_variation(image, reduction="sum").item() == pytest.approx(6)


def test_l2_norm_is_the_mean_square():
    assert priors.l2_norm(torch.tensor([[[[3.0, 4.0]]]])).item() == pytest.approx(12.5)


@pytest.mark.parametrize("prior", [priors.total_variation, priors.l2_norm])
def test_prior_gradients_are_right(prior):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(prior, (x.requires_grad_(),))


@pytest.fixture
def normed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return net.double().eval()


def test_batch_norm_prior_is_zero_on_the_batch_that_made_the_statistics(normed):
    x, _y = random_batch(3, dtype=torch.float64)
    inside = normed[0](x)
    statistics = {
        "1.running_mean": inside.mean((0, 2, 3)).detach(),
        "1.running_var": inside.var((0, 2, 3), correction=0).detach(),
    }
    prior = priors.batch_norm_statistics(normed, statistics)
    assert prior(x).item() == pytest.approx(0, abs=1e-10)
    other = random_batch(3, seed=5, dtype=torch.float64)[0]
    assert prior(other).item() > 1e-3


def test_batch_norm_prior_has_the_right_gradient_and_leaves_no_hooks(normed):
    x, _ = random_batch(2, dtype=torch.float64)
    prior = priors.batch_norm_statistics(normed)
    assert torch.autograd.gradcheck(prior, (x.requires_grad_(),))
    assert not normed[1]._forward_pre_hooks


def test_batch_norm_prior_runs_with_restarts_together(normed):
    x, y = random_batch(2)
    net = normed.float()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    prior = priors.batch_norm_statistics(net)
    attack = iv.GradientMatching(steps=3, restarts=2, priors=((0.1, prior),))
    assert torch.isfinite(attack(net, seen).trial_scores).all()


def test_batch_norm_prior_needs_batch_norm(tiny):
    with pytest.raises(ConfigError, match="0 batch-norm layers"):
        priors.batch_norm_statistics(tiny)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_filter_is_scipys(size):
    x = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    expected = scipy.ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="mirror")
    np.testing.assert_array_equal(priors.median_filter(x, size).numpy(), expected)


@pytest.mark.parametrize("size", [0, 2, -3])
def test_median_filter_refuses_even_sizes(size):
    with pytest.raises(ConfigError, match=f"size is {size}; expected an odd"):
        priors.median_filter(torch.zeros(1, 1, 4, 4), size)


def test_rounded_total_variation_is_total_variation_but_for_small_steps():
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sharp = priors.total_variation(x)
    assert float(priors.rounded_total_variation(x, width=1e-8)) == pytest.approx(float(sharp), rel=1e-9)
    flat = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    value = priors.rounded_total_variation(flat, width=0.1)
    assert float(value.detach()) == pytest.approx(0.2)  # both directions, at the width itself
    assert not torch.autograd.grad(value, flat)[0].any()  # no kink: the slope at zero is zero
    assert torch.autograd.gradcheck(lambda t: priors.rounded_total_variation(t), x.requires_grad_(True))
    with pytest.raises(ConfigError, match="rounded_total_variation width is 0; expected a positive number"):
        priors.rounded_total_variation(x, width=0)
