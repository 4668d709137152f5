"""Coordinates of natural images: known answers, the way back, and what they buy an attack."""

import numpy as np
import pytest
import scipy.fft
import torch

import invlib as iv
from invlib.errors import ConfigError
from tests.conftest import random_batch


def images(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 5, 9), (1, 1, 6, 6), (4, 2, 3, 7, 1)])
def test_there_and_back(shape):
    x = images(*shape)
    natural = iv.NaturalImages()
    assert torch.allclose(natural.images(natural.coordinates(x)), x, atol=1e-12)
    assert torch.allclose(natural.coordinates(natural.images(x)), x, atol=1e-12)


def test_without_falloff_and_correlation_it_is_the_cosine_transform():
    x = images(2, 3, 6, 7)
    plain = iv.NaturalImages(falloff=0.0, correlation=0.0, mean=0.0, contrast=1.0)
    assert np.allclose(plain.coordinates(x).numpy(), scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho"))


def test_noise_comes_out_with_the_promised_spectrum_and_colours():
    natural = iv.NaturalImages(falloff=1.0, correlation=0.8)
    x = (natural.images(images(4000, 3, 4, 4)) - natural.mean) / natural.contrast
    assert x.square().mean().item() == pytest.approx(1, abs=0.05)
    channels = x.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(
        torch.corrcoef(channels), torch.full((3, 3), 0.8).double() + 0.2 * torch.eye(3), atol=0.02
    )
    power = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")).square().mean((0, 1))
    assert (power[0, 0] / power[0, 3]).item() == pytest.approx(10, rel=0.1)  # 1 + 3²
    assert (power[0, 0] / power[2, 1]).item() == pytest.approx(6, rel=0.1)  # 1 + 2² + 1²


def test_the_prior_is_the_mean_square_and_its_gradient_is_right():
    natural = iv.NaturalImages()
    prior = natural.prior(iv.CIFAR10)
    z = images(2, 3, 4, 5)
    x = iv.CIFAR10.encode(natural.images(z))
    assert prior(x).item() == pytest.approx(z.square().mean().item())
    assert torch.autograd.gradcheck(prior, (x.requires_grad_(),))
    # A photograph is far likelier than the same pixels in another order.
    photo = iv.CIFAR10.encode(iv.data.samples("photos32", indices=[0])[0])
    shuffled = photo.flatten(2)[..., torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert prior(photo) < 0.3 * prior(shuffled.view_as(photo))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"falloff": -1.0}, "falloff is -1.0; expected a number from 0 on"),
        ({"falloff": float("nan")}, "falloff is nan"),
        ({"mean": 2.0}, r"mean is 2.0; expected a number in \[0, 1\]"),
        ({"contrast": 0.0}, "contrast is 0.0; expected a positive number"),
        ({"correlation": 1.0}, r"correlation is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        iv.NaturalImages(**settings)


def test_tiles_repeat_a_square_that_is_another_in_every_channel():
    tiles = iv.Tiles(side=4)
    drawn = tiles.draw((2, 1, 3, 8, 10), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 3, 8, 10)
    assert torch.equal(drawn[..., :4, :], drawn[..., 4:, :])
    assert torch.equal(drawn[..., :6], drawn[..., 4:])
    assert len(drawn[..., 0, 0].unique()) == 6
    assert len(drawn[0, 0, 0].unique()) == 16
    with pytest.raises(ConfigError, match="side is 0"):
        iv.Tiles(side=0)


def test_an_attack_begins_at_tiles(tiny):
    x, y = random_batch()
    seen = iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.UNIT)
    still = iv.GradientMatching(steps=1, init=iv.Tiles(side=4), optimizer=iv.SGD(lr=1e-9))
    begun = still(tiny, seen).images
    assert torch.allclose(begun[..., :4], begun[..., 4:], atol=1e-6)
    assert len(begun.unique()) > 10
