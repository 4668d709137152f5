"""The input of a layer under noise: exact without it, better than what takes no account of it, and honest."""

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks.noisy import noisy_layer_input
from invlib.errors import RecoveryError

SHAPE = (3, 8, 8)


@pytest.fixture
def photo():
    return nn.functional.avg_pool2d(iv.data.samples("photos32", indices=[3])[0], 4)


def of_layer(photo, noise, *, units=40, seed=0, normalization=iv.CIFAR10):
    """A layer's gradient of one image, with noise, and the signals."""
    generator = torch.Generator().manual_seed(seed)
    flat = normalization.encode(photo).flatten().double()
    delta = torch.randn(units, dtype=torch.float64, generator=generator)
    both = torch.outer(delta, torch.cat([flat, torch.ones(1)]))
    both += noise * torch.randn(both.shape, dtype=torch.float64, generator=generator)
    return both[:, :-1], both[:, -1]


def psnr(inputs, photo, normalization=iv.CIFAR10):
    images = normalization.decode(inputs.view(1, *SHAPE)).clamp(0, 1)
    return float(-10 * (images - photo).square().mean().log10())


def found(weight, bias, noise, normalization=iv.CIFAR10):
    return noisy_layer_input(weight, bias, noise, like=torch.zeros(SHAPE), normalization=normalization)


def test_components_of_an_image_undo_and_are_independent():
    natural, like = iv.NaturalImages(), torch.zeros(SHAPE, dtype=torch.float64)
    parts = natural.components(iv.CIFAR10, like)
    generator = torch.Generator().manual_seed(0)
    drawn = iv.CIFAR10.encode(
        natural.images(torch.randn(4000, *SHAPE, generator=generator, dtype=torch.float64))
    )
    inside = torch.stack([parts.of(one) for one in drawn])
    torch.testing.assert_close(parts.inputs(inside[0]), drawn[0])
    white = ((inside - parts.mean) / parts.variance.sqrt()).flatten(1)
    assert float(white.mean(0).abs().max()) < 0.08
    assert float((white.T @ white / len(white) - torch.eye(192)).abs().max()) < 0.12
    for j in range(3):
        alone = torch.zeros(SHAPE, dtype=torch.float64)
        alone[j, 2, 5] = 0.3
        error = iv.CIFAR10.decode(parts.inputs(alone)) - iv.CIFAR10.decode(0 * alone)
        torch.testing.assert_close(error.square().sum(), parts.weight[j] * 0.09)


def test_with_hardly_any_noise_it_is_the_exact_input(photo):
    weight, bias = of_layer(photo, 1e-9)
    told = found(weight, bias, 1e-9)
    assert psnr(told.inputs, photo) > 130
    assert told.residual < 1e-6
    assert told.expected_psnr > 130  # the photograph itself is in single precision


@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0])
def test_it_beats_what_takes_no_account_of_noise_and_says_how_good_it_is(photo, noise):
    gains, gaps = [], []
    for seed in range(9):
        weight, bias = of_layer(photo, noise, seed=seed)
        told = found(weight, bias, noise)
        plain = iv.analytic.layer_input(weight, bias).inputs
        gains.append(psnr(told.inputs, photo) - psnr(plain, photo))
        gaps.append(psnr(told.inputs, photo) - told.expected_psnr)
    assert sorted(gains)[4] > 2
    assert -4 < sorted(gaps)[4] < 8


def test_rows_of_several_rounds_are_one_system(photo):
    rounds = [of_layer(photo, 0.5, seed=seed) for seed in range(8)]
    one = psnr(found(*rounds[0], 0.5).inputs, photo)
    weights, biases = (torch.cat(parts) for parts in zip(*rounds, strict=True))
    told = found(weights, biases, 0.5)
    assert psnr(told.inputs, photo) > one + 4  # of a factor of 8, 9 dB without a prior


def test_the_attack_takes_noise_that_is_told(photo):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5))
    noise = iv.defenses.GaussianNoise(0.01)
    state, results = torch.get_rng_state(), []
    for public in (True, False):
        client = iv.Defended(iv.FedSGD(), [noise], public=public)
        seen = iv.observe(model, photo, torch.tensor([2]), client, normalization=iv.CIFAR10)
        results.append(iv.fully_connected()(model, seen))
    knowing, naive = results
    assert torch.equal(torch.get_rng_state(), state)
    assert "one image under noise of 1.0e-02 in each number; expected PSNR" in knowing.note
    at = [psnr(iv.CIFAR10.encode(r.images), photo) for r in results]
    assert at[0] > at[1] + 3
    assert abs(at[0] - float(knowing.expected_psnr)) < 8
    assert naive.expected_psnr is None
    assert not any("read as a part" in doubt for doubt in knowing.warnings)


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
def test_what_knows_no_noise_says_so(photo):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64, bias=False), nn.ReLU(), nn.Linear(64, 5))
    client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(1e-6)])
    seen = iv.observe(model, photo, torch.tensor([2]), client, normalization=iv.CIFAR10)
    told = iv.fully_connected()(model, seen)
    assert any("noise of 1e-06 is read as a part of its gradient" in doubt for doubt in told.warnings)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan")])
def test_noise_has_to_be_above_zero(photo, noise):
    weight, bias = of_layer(photo, 0.1)
    with pytest.raises(
        RecoveryError, match=r"noise is .*; expected noise above 0, \(out, 192\) and \(out,\)"
    ):
        found(weight, bias, noise)


def test_shapes_that_do_not_fit_are_refused(photo):
    weight, bias = of_layer(photo, 0.1)
    with pytest.raises(RecoveryError, match="have shapes"):
        found(weight[:, :-1], bias, 0.1)


def test_grey_images_and_more_rows_than_pixels():
    photo = iv.data.samples("fashion", indices=[1])[0][..., ::4, ::4]
    generator = torch.Generator().manual_seed(0)
    flat = iv.FASHION_MNIST.encode(photo).flatten().double()
    both = torch.outer(torch.randn(200, generator=generator).double(), torch.cat([flat, torch.ones(1)]))
    both += 1e-3 * torch.randn(both.shape, generator=generator)
    told = noisy_layer_input(both[:, :-1], both[:, -1], 1e-3, like=photo[0], normalization=iv.FASHION_MNIST)
    torch.testing.assert_close(told.inputs.flatten(), flat, atol=2e-3, rtol=0)


def test_what_photographs_have_in_common_counts_under_heavy_noise(photo):
    gains = []
    for seed in range(9):
        weight, bias = of_layer(photo, 2.0, seed=seed)
        along = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1))[2][0]  # total least squares
        without = psnr(along[:-1] / along[-1], photo)
        gains.append(psnr(found(weight, bias, 2.0).inputs, photo) - without)
    assert sorted(gains)[4] > 1


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_it_knows_how_much_of_its_direction_is_signal(photo, noise):
    shares, cosines = [], []
    clean = torch.cat([iv.CIFAR10.encode(photo).flatten().double(), torch.ones(1)])
    for seed in range(5):
        weight, bias = of_layer(photo, noise, seed=seed)
        along = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1))[2][0]
        shares.append(found(weight, bias, noise).signal)
        cosines.append(float(along @ clean / clean.norm()) ** 2)
    assert sum(shares) / 5 == pytest.approx(sum(cosines) / 5, abs=0.05)
    assert found(*of_layer(photo, 100.0), 100.0).signal < 0.4


def test_the_rest_of_an_update_says_the_scale(photo):
    inputs, gains = iv.CIFAR10.encode(photo)[0], []
    for seed in range(5):
        weight, bias = of_layer(photo, 1.0, seed=seed)
        told = noisy_layer_input(
            weight,
            bias,
            1.0,
            like=inputs,
            normalization=iv.CIFAR10,
            unlikely=lambda guess: float((guess - inputs).square().sum()),
        )
        gains.append(psnr(told.inputs, photo) - psnr(found(weight, bias, 1.0).inputs, photo))
    assert min(gains) > -0.1
    assert max(gains) > 1


def test_best_weighs_noise_before_any_search(photo):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5))
    results = {}
    for sigma in (0.01, 10.0):
        client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(sigma)])
        seen = iv.observe(model, photo, torch.tensor([2]), client, normalization=iv.CIFAR10)
        results[sigma] = iv.best(evaluations=20)(model, seen)
    assert "from the first layer's gradient, its noise weighed" in results[0.01].note
    assert results[0.01].status == "closed_form"
    assert abs(psnr(iv.CIFAR10.encode(results[0.01].images), photo) - results[0.01].expected_psnr) < 8
    assert "its noise weighed" not in results[10.0].note
