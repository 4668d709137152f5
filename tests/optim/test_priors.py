"""Priors and the median filter against hand-made values, gradcheck and scipy."""

from dataclasses import replace

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


def test_smooth_total_variation_by_hand():
    image = torch.tensor([[[[0.0, 3.0], [4.0, 4.0]]]])
    # At the four pixels: across 3, 0, 0, 0 and down 4, 1, 0, 0.
    assert priors.SmoothTotalVariation(power=1.0)(image).item() == pytest.approx((25 + 1) / 4)
    assert priors.SmoothTotalVariation(power=0.5)(image).item() == pytest.approx((5 + 1) / 4, abs=1e-3)
    grey = image.expand(1, 3, 2, 2)
    plain, colours = (priors.SmoothTotalVariation(power=1.0, opponents=on) for on in (False, True))
    assert colours(grey).item() == pytest.approx(plain(grey).item() / 2)  # grey has no opponents
    red = grey * torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert colours(red).item() == pytest.approx(3 * 26 / 4 / 6)  # red itself, and red beside both others


SMOOTH = [priors.SmoothTotalVariation(power=p, opponents=o) for p, o in ((1.25, False), (0.5, True))]


@pytest.mark.parametrize("prior", [priors.total_variation, priors.l2_norm, *SMOOTH])
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


# Priors that are made when an attack begins


def test_batch_norm_prior_takes_the_buffers_that_the_client_sent(normed):
    x, y = random_batch(2, dtype=torch.float64)
    seen = iv.observe(normed, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    unbound, own = priors.BatchNormStatistics(), priors.batch_norm_statistics(normed)
    assert torch.equal(unbound.of(normed, seen, y)(x), own(x))
    sent = {"1.running_mean": torch.ones(4).double()}
    told = unbound.of(normed, replace(seen, buffers=sent), y)(x)
    assert torch.equal(told, priors.batch_norm_statistics(normed, sent)(x))
    assert not torch.equal(told, own(x))


def test_prediction_is_the_distance_of_probabilities_and_labels(normed):
    x, y = random_batch(2, dtype=torch.float64)
    seen = iv.observe(normed, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    p = normed(x).softmax(1).detach()
    expected = sum(float((p[k] - torch.eye(5)[y[k]]).square().sum()) for k in range(2)) / 2
    assert priors.Prediction().of(normed, seen, y)(x).item() == pytest.approx(expected)


def test_last_layer_input_is_zero_at_the_image_and_knows_it_from_others(normed):
    x, y = random_batch(2, dtype=torch.float64)
    y = torch.tensor([1, 3])
    for k in range(2):
        seen = iv.observe(normed, x[k : k + 1], y[k : k + 1], iv.FedSGD(), normalization=iv.UNIT)
        prior = priors.LastLayerInput().of(normed, seen, y[k : k + 1])
        assert prior(x[k : k + 1]).item() == pytest.approx(0, abs=1e-20)
        assert prior(x[1 - k : 2 - k]).item() > 1e-3
        assert not normed[4]._forward_pre_hooks


@pytest.mark.parametrize("prior", [priors.BatchNormStatistics, priors.Prediction, priors.LastLayerInput])
def test_priors_of_an_attack_run_on_every_engine_and_have_the_right_gradient(normed, prior):
    x, y = random_batch(2, dtype=torch.float64)
    seen = iv.observe(normed, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    assert torch.autograd.gradcheck(prior().of(normed, seen, y), (x.clone().requires_grad_(),))
    attack = iv.GradientMatching(steps=3, restarts=2, priors=((0.1, prior()),), optimizer=iv.Adam(lr=0.1))
    eager, batched = (replace(attack, engine=name)(normed, seen) for name in ("eager", "batched"))
    torch.testing.assert_close(eager.trial_scores, batched.trial_scores)
    assert attack == replace(attack, priors=((0.1, prior()),))


def test_priors_of_an_attack_say_what_they_lack(normed):
    x, y = random_batch(2, dtype=torch.float64)
    seen = iv.observe(normed, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    soft = iv.GradientMatching(steps=1, priors=((1.0, priors.Prediction()),), labels="optimize")
    with pytest.raises(ConfigError, match="Prediction needs labels"):
        soft(normed, seen)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
    x, y = random_batch()
    seen = iv.observe(bare, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(ConfigError, match=r"needs a bias in the last layer; '1\.weight' has none"):
        priors.LastLayerInput().of(bare, seen, y)
    with pytest.raises(ConfigError, match="power is 0"):
        priors.SmoothTotalVariation(power=0)


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


def test_observations_with_priors_of_their_own_are_attacked_one_by_one(normed):
    x, _ = random_batch(2, dtype=torch.float64)
    seen = [
        iv.observe(normed, x[k : k + 1], torch.tensor([k]), iv.FedSGD(), normalization=iv.CIFAR10)
        for k in range(2)
    ]
    attack = iv.GradientMatching(steps=3, restarts=2, priors=((10.0, priors.LastLayerInput()),))
    for one, joined in zip(seen, iv.attack_many(attack, normed, seen), strict=True):
        assert torch.equal(attack(normed, one).images, joined.images)
        soft = torch.nn.functional.one_hot(one.labels, 5).double()
        assert attack.score(normed, one, joined.images, soft) == pytest.approx(joined.score)
