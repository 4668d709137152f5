"""While rounded, every spelling of ReLU is a softplus, also those that are called for their effect."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import invlib as iv

RELU = {
    "module": lambda x: nn.ReLU(inplace=True)(x),
    "relu_": F.relu_,
    "torch.relu_": torch.relu_,
    "method": Tensor.relu_,
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "by position": lambda x: F.relu(x, True),
    "by name": lambda x: F.relu(input=x, inplace=True),
}
CLIP = {
    "ReLU6": lambda x: nn.ReLU6(inplace=True)(x),
    "relu6": lambda x: F.relu6(x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0, True),
    "hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "by name": lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0, inplace=True),
}


@pytest.mark.parametrize(
    ("act", "value"),
    [(act, F.relu) for act in RELU.values()] + [(act, F.relu6) for act in CLIP.values()],
    ids=[*RELU, *(f"clip {name}" for name in CLIP)],
)
def test_an_activation_called_for_its_effect_is_rounded(act, value):
    x = (10 * torch.linspace(-1, 1, 21, dtype=torch.float64)).requires_grad_()

    def statement(x):
        y = 1.0 * x
        used = act(y)
        assert used is y
        return y

    with iv.smoothing.rounded(1e4):
        torch.testing.assert_close(statement(x), value(x))
    slopes = []
    for run in (statement, lambda x: value(1.0 * x)):
        with iv.smoothing.rounded(3.0):
            (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        slopes.append((slope.detach(), torch.autograd.grad(slope.sum(), x)[0]))
    torch.testing.assert_close(slopes[0], slopes[1])


class Net(nn.Module):
    def __init__(self, statement):
        super().__init__()
        self.statement, self.act = statement, nn.ReLU(inplace=True)
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 4, 2)

    def forward(self, x):
        x = self.conv(x)
        if self.statement:
            self.act(x)
        else:
            x = self.act(x)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize(
    "protocol", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2)], ids=["FedSGD", "FedAvg"]
)
def test_a_search_sees_the_same_network_either_way(restarts, protocol):
    x, y = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    found = []
    for statement in (False, True):
        torch.manual_seed(0)
        net = Net(statement)
        seen = iv.observe(net, x, y, protocol, normalization=iv.UNIT)
        attack = iv.GradientMatching(steps=3, restarts=restarts, smoothing=iv.Smoothing())
        found.append(attack(net, seen).images)
    torch.testing.assert_close(found[0], found[1])


def test_the_short_name_leads_to_the_same_module():
    before = iv.smoothing
    sys.modules.pop("invlib.smoothing", None)
    from invlib.smoothing import rounded

    assert rounded is before.rounded
    assert iv.smoothing is before
