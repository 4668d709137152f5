"""Local diagnostics: exact where the map is linear, and no bound where it jumps."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invlib as iv
from invlib.defenses.diagnostics import local_spectrum
from invlib.errors import ConfigError, DoubtWarning


class Weighing(nn.Module):
    """One number, linear in the weight, so that its gradient is a matrix times the image."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))

    def forward(self, x):
        return (x.flatten(1) @ self.matrix.T @ self.weight)[:, None]


def total(logits, labels):
    return logits.sum()


IMAGE = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABEL = torch.tensor([0])


def test_linear_map_has_its_own_posterior():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    white = iv.NaturalImages(falloff=0.0, contrast=0.3)
    found = local_spectrum(
        Weighing(matrix), IMAGE, LABEL, normalization=iv.UNIT, noise=0.5, photographs=white, loss=total
    )
    torch.testing.assert_close(found.singular_values[:10], torch.linalg.svdvals(matrix))
    assert found.singular_values[10:].max() < 1e-6
    assert (found.rank, found.smooth) == (10, True)
    posterior = torch.linalg.inv(matrix.T @ matrix / 0.25 + torch.eye(16) / 0.09)
    assert found.expected_psnr == pytest.approx(-10 * math.log10(float(posterior.trace()) / 16))
    values = torch.linalg.svdvals(matrix)
    assert found.i2f == pytest.approx(0.5 * float(values.norm() / values[0] ** 2))


def test_ceiling_is_what_the_best_estimate_reaches():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    photographs = iv.NaturalImages()
    found = local_spectrum(
        Weighing(matrix), IMAGE, LABEL, normalization=iv.UNIT, noise=0.5, loss=total, photographs=photographs
    )
    codes = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    unit = torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    spread = (photographs.images(unit) - photographs.mean).view(16, 16)
    images = codes @ spread
    seen = images @ matrix.T + 0.5 * torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    both = matrix @ spread.T
    best = seen @ torch.linalg.solve(both @ both.T + 0.25 * torch.eye(10), both @ spread)
    errors = (best - images).square().mean(1)
    expected = 10 ** (-found.expected_psnr / 10)
    assert float(errors.mean()) == pytest.approx(expected, abs=3 * float(errors.std()) / math.sqrt(4000))


def test_layer_of_smooth_units_has_full_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = local_spectrum(model, IMAGE, LABEL, normalization=iv.UNIT, noise=1e-9)
    assert found.rank == 16
    assert model.training


class Functional(nn.Module):
    """A network whose ReLU is no module."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(16, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x):
        return self.head(F.relu(self.layer(x.flatten(1))))


def test_kinks_are_doubted_and_size_is_refused():
    with pytest.warns(DoubtWarning, match="ReLU or the like"):
        found = local_spectrum(Functional(), IMAGE, LABEL, normalization=iv.UNIT, noise=1e-9)
    assert not found.smooth
    large = nn.Sequential(nn.Flatten(), nn.Linear(16384, 3))
    with pytest.raises(ConfigError, match=r"the Jacobian has 49155 x 16384 numbers"):
        local_spectrum(large, torch.rand(1, 1, 128, 128), LABEL, normalization=iv.UNIT, noise=1.0)


def test_one_neuron_tells_more_than_its_derivative():
    # A unit behind ReLU: weight 1, bias 0, and the input u varies little about zero. What it sends is
    # (delta u, delta) where u > 0 and nothing elsewhere. Van Trees' inequality sees the slope alone.
    generator = torch.Generator().manual_seed(0)
    delta, spread, noise, count = 1.0, 0.01, 0.1, 20_000
    u = spread * torch.randn(count, generator=generator, dtype=torch.float64)
    w = torch.ones(count, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    sent = torch.stack(torch.autograd.grad(delta * F.relu(w * u + b).sum(), [w, b]))
    information = delta**2 * (u > 0).double().mean() / noise**2
    no_attack_below = 1 / (information + 1 / spread**2)
    assert no_attack_below / spread**2 > 0.99

    seen = sent + noise * torch.randn(sent.shape, generator=generator, dtype=torch.float64)
    on = seen[1] > delta / 2  # the jump of the bias's gradient is ten times the noise
    guess = torch.where(on, 1.0, -1.0) * spread * math.sqrt(2 / math.pi)
    reached = (guess - u).square().mean()
    assert reached / spread**2 == pytest.approx(1 - 2 / math.pi, abs=0.02)
    assert reached < 0.4 * no_attack_below
