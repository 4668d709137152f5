"""Witness pairs where the answer is known: networks that forget where things are."""

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.defenses.witness import witness_pair
from invlib.errors import ConfigError


class Pooled(nn.Module):
    """A convolution round the edge, pooled over all places."""

    def __init__(self, stride=1, padding_mode="circular"):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=stride, padding=1, padding_mode=padding_mode)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.sigmoid(self.conv(x)).mean((2, 3)))


@pytest.fixture
def image():
    return iv.data.samples("photos32")[0][1:2, :, ::2, ::2].double()


def search(model, image, **more):
    return witness_pair(model, image, torch.tensor([1]), normalization=iv.UNIT, **more)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_shift_by_the_stride_leaves_the_update(image, stride):
    torch.manual_seed(0)
    pair = search(Pooled(stride).double(), image, steps=0)
    assert pair.relative < 1e-12
    assert pair.apart > 0.1
    assert pair.bound(1e-6) == pytest.approx(0.5)
    shifts = [pair.image.roll(by, axis) for axis in (2, 3) for by in (2, -2, 4, -4, 8, -8)]
    assert any(torch.equal(pair.other, shifted) for shifted in shifts)


def test_search_refines_and_stays_apart(image):
    torch.manual_seed(0)
    model = Pooled(padding_mode="zeros").double()
    before = search(model, image, steps=0, apart=0.15)
    after = search(model, image, steps=60, apart=0.15)
    assert after.distance < before.distance / 2
    assert after.apart >= 0.15
    assert ((after.other >= 0) & (after.other <= 1)).all()
    assert after.apart == pytest.approx(float((after.other - image).square().mean().sqrt()))

    def update_of(x):
        seen = iv.observe(model, x, torch.tensor([1]), iv.FedSGD(), normalization=iv.UNIT)
        return torch.cat([part.flatten() for part in seen.update.values()])

    distance = float((update_of(after.other) - update_of(image)).norm())
    assert after.distance == pytest.approx(distance)
    assert after.relative == pytest.approx(distance / float(update_of(image).norm()))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_others_are_starts_and_far_ones_are_needed(image):
    torch.manual_seed(0)
    model = Pooled().double()
    other = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    grey = torch.full_like(image, 0.5)
    with pytest.raises(ConfigError, match=r"apart is 0\.2, and no start is so far away"):
        search(model, grey, apart=0.2)
    assert torch.equal(search(model, grey, apart=0.2, others=other, steps=0).other, other)
    with pytest.raises(ConfigError, match="apart is 0; expected a positive number"):
        search(model, image, apart=0)


def test_search_goes_along_the_least_distance_not_only_up_to_it(image):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Sigmoid(), nn.Linear(8, 4)).double()
    signs = torch.where(torch.rand(image.shape, dtype=torch.float64) < 0.5, -1.0, 1.0)
    near = (image + 0.12 * signs).clamp(0, 1)
    before, after = (search(net, image, others=near, steps=steps, apart=0.1) for steps in (0, 60))
    assert torch.equal(before.other, near)
    assert 0.1 <= after.apart < 0.101
    assert after.distance < 0.88 * before.distance
