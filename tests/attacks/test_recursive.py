"""The closed form for chains: the image to float precision, and a plain word where it does not apply."""

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks.recursive import recursive_inversion
from invlib.errors import RecoveryError
from tests.conftest import random_batch


def net(activation, *, dilation=1, head=True):
    """A chain whose equations outnumber its unknowns: 3×8×8 images, 64 and 32 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [
            nn.Conv2d(3, 24, 3, padding="same", dilation=dilation),
            activation(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False),
            activation(),
            nn.Flatten(),
            nn.Linear(48 * 16, 20),
        ]
        layers += [activation(), nn.Linear(20, 5)] if head else []
        return nn.Sequential(*layers).double()


def see(model, n=1, protocol=None, reveal=True, dtype=torch.float64):
    x, y = random_batch(n, dtype=dtype, side=8)
    seen = iv.observe(model, x, y, protocol or iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=reveal)
    return x, seen


@pytest.mark.parametrize(
    "activation", [nn.Sigmoid, nn.Tanh, nn.Softplus, lambda: nn.Softplus(beta=3.0), lambda: nn.LeakyReLU(0.2)]
)
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_chain_gives_its_image_away(activation, dilation):
    x, seen = see(net(activation, dilation=dilation))
    found = recursive_inversion()(net(activation, dilation=dilation), seen)
    assert float(iv.metrics.psnr(found.images, x)) > 60
    assert found.status == "closed_form"
    assert found.note.startswith("exact")
    assert found.evaluations == 1


def test_the_label_need_not_be_known():
    x, seen = see(net(nn.Sigmoid), reveal=False)
    found = recursive_inversion()(net(nn.Sigmoid), seen)
    assert float(iv.metrics.psnr(found.images, x)) > 60
    assert found.labels is not None


def test_float32_is_enough():
    x, seen = see(net(nn.Sigmoid).float(), dtype=torch.float32)
    assert float(iv.metrics.psnr(recursive_inversion()(net(nn.Sigmoid).float(), seen).images, x)) > 50


def test_a_closed_relu_leaves_less_and_the_note_says_so():
    x, seen = see(net(nn.ReLU))
    found = recursive_inversion()(net(nn.ReLU), seen)
    exact = float(iv.metrics.psnr(found.images, x)) > 50
    assert found.note.startswith("exact" if exact else "approximate")


def test_saturated_units_do_not_spoil_the_rest():
    model = iv.models.build("LeNetZhu", num_classes=5, image_size=8, seed=0)
    for layer in (model.body[0], model.body[2]):
        layer.weight.data *= 3  # drives sigmoids to their ends
    x, seen = see(model, dtype=torch.float32)
    assert float(iv.metrics.psnr(recursive_inversion()(model, seen).images, x)) > 30


def test_one_step_of_federated_averaging_is_one_gradient():
    x, seen = see(net(nn.Tanh), protocol=iv.FedAvg(lr=0.1, local_steps=1))
    assert float(iv.metrics.psnr(recursive_inversion()(net(nn.Tanh), seen).images, x)) > 60


def test_batches_are_refused():
    _, seen = see(net(nn.Sigmoid), n=2)
    with pytest.raises(RecoveryError, match="num_images is 2; expected 1"):
        recursive_inversion()(net(nn.Sigmoid), seen)


class Skip(nn.Module):
    """Two convolutions beside a shortcut, and so no chain."""

    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), nn.Linear(192, 5)

    def forward(self, x):
        return self.two((x + self.act(self.one(x))).flatten(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Skip(), "what 'one' gives meets another value of the image in 'add'"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)),
            "'0' is followed by max_pool2d",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False)), "it ends in '1'"),
        (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)), "image is followed by relu"),
    ],
)
def test_what_is_no_chain_is_named(model, why):
    _, seen = see(model, dtype=torch.float32)
    with pytest.raises(RecoveryError, match=why):
        recursive_inversion()(model, seen)


def test_a_gradient_that_dies_on_the_way_is_named():
    model = net(nn.ReLU)
    model[0].bias.data -= 100  # every unit closed
    _, seen = see(model)
    with pytest.raises(RecoveryError, match="zero"):
        recursive_inversion()(model, seen)


def test_equations_that_say_nearly_the_same_are_not_fitted_to_rounding(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = ((1, 2), (6, 2), (6, 1))
        convolutions = [nn.Conv2d(n, 6, 5, stride=stride, padding=2) for n, stride in sizes]
        for layer in convolutions:
            nn.init.xavier_normal_(layer.weight, gain=5 / 3)
        layers = [part for layer in convolutions for part in (layer, nn.Tanh())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 49, 10))
    x = nn.functional.interpolate(iv.data.samples("fashion")[0][:1], (28, 28), mode="bilinear").clamp(0, 1)
    seen = iv.observe(model, x, torch.tensor([1]), iv.FedSGD(), normalization=iv.FASHION_MNIST)
    factored = recursive_inversion()(model, seen).images
    monkeypatch.setattr("invlib.attacks.recursive._DENSE", 0)  # the same equations without a factor
    plain = recursive_inversion()(model, seen).images
    torch.testing.assert_close(factored, plain, rtol=0, atol=1e-3)
    assert float(iv.metrics.psnr(factored, x)) > 15
