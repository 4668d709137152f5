"""Closed forms: float precision for one image, and no more claimed for a batch than is true."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib.attacks import analytic
from invlib.errors import RecoveryError
from tests.conftest import random_batch


def chain(*biases, activation=nn.ReLU, dtype=torch.float32):
    """Three fully connected layers on 3×8×8 images, each with a bias or without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        widths = (192, 40, 30, 5)
        layers = [nn.Flatten()]
        for k, bias in enumerate(biases):
            layers += [nn.Linear(widths[k], widths[k + 1], bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def see(net, n=1, protocol=None, seed=0, labels=None):
    """Return images and what the server sees of them; labels that are given are hidden from it."""
    dtype = next(net.parameters()).dtype
    x, y = random_batch(n, seed=seed, dtype=dtype)
    y, hidden = (y, False) if labels is None else (torch.tensor(labels), True)
    return x, iv.observe(
        net, x, y, protocol or iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=not hidden
    )


def relative_error(found, truth):
    return float((found - truth).norm() / truth.norm())


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    scale=st.floats(1e-12, 1e6),
    seed=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_input_comes_back_whatever_the_size_of_the_gradient(rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, generator=generator)
    delta = torch.randn(rows, generator=generator) * scale
    found = analytic.layer_input(torch.outer(delta, x), delta)
    assert relative_error(found.inputs, x) < 1e-5
    assert found.kind == "exact"


def test_all_rows_together_beat_a_badly_chosen_row():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, generator=generator)
    delta = torch.tensor([1.0, 1e-4, 0.3])
    noise = 1e-6 * torch.randn(3, 50, generator=generator)
    weight = torch.outer(delta, x) + noise
    _, rows = analytic.row_inputs(weight, delta)
    errors = [relative_error(r, x) for r in rows]
    together = relative_error(analytic.layer_input(weight, delta).inputs, x)
    assert errors[1] > 1000 * together
    assert together <= min(errors)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Softplus])
@pytest.mark.parametrize(
    "biases",
    [
        (True, True, True),
        (False, True, True),
        (False, False, True),
        (False, False, False),
        (True, False, False),
    ],
)
def test_a_fully_connected_network_gives_its_image_back(activation, biases):
    net = chain(*biases, activation=activation, dtype=torch.float64)
    x, seen = see(net)
    rec = iv.fully_connected()(net, seen)
    assert relative_error(rec.images, x) < 1e-5
    assert rec.score < 1e-5
    assert rec.status == "closed_form"
    assert rec.note.startswith("exact")


def test_single_precision_is_enough():
    net = chain(True, True, True)
    x, seen = see(net)
    assert relative_error(iv.fully_connected()(net, seen).images, x) < 1e-5


def test_no_label_is_needed_where_no_layer_has_a_bias():
    net = chain(False, False, False, dtype=torch.float64)
    x, seen = see(net)
    rec = iv.fully_connected()(net, replace(seen, labels=None))
    assert relative_error(rec.images, x) < 1e-5


@pytest.mark.parametrize("protocol", [iv.FedSGD(), iv.FedAvg(lr=0.05, local_steps=3)], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("label", range(5))
def test_the_hidden_label_of_one_image_comes_with_it(protocol, last, label):
    net = chain(True, True, last, dtype=torch.float64)
    x, seen = see(net, protocol=protocol, labels=[label])
    rec = iv.fully_connected()(net, seen)
    assert rec.labels.tolist() == [label]
    assert relative_error(rec.images, x) < 1e-5


@pytest.mark.parametrize("labels", [[4, 1, 1], [2, 2, 2], [3, 0, 4, 1]])
def test_the_hidden_labels_of_a_batch_are_counted(labels):
    net = chain(True, True, True, dtype=torch.float64)
    _, seen = see(net, n=len(labels), labels=labels)
    assert iv.fully_connected()(net, seen).labels.tolist() == sorted(labels)


def test_of_a_batch_whose_images_move_rows_of_their_own_all_images_and_labels_come_back():
    # Image k is bright in its own row of pixels, and unit k looks there and nowhere else.
    x = 0.1 + 0.2 * torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 5)).double()
    with torch.no_grad():
        net[1].weight.zero_()
        for k in range(3):
            x[k, :, k] += 0.6
            net[1].weight[k].view(3, 8, 8)[:, k] = 1 / 24
        net[1].bias.fill_(-0.5)
    labels = torch.tensor([3, 0, 3])
    seen = iv.observe(net, x, labels, iv.FedSGD(), normalization=iv.UNIT, reveal_labels=False)
    rec = iv.fully_connected()(net, seen)
    report = iv.evaluate(rec, x, labels)
    assert min(report.psnr) > 100
    assert report.labels_right == 3


def test_labels_that_are_given_are_kept():
    net = chain(True, True, True, dtype=torch.float64)
    _, seen = see(net, n=3)
    given = torch.tensor([4, 0, 2])
    assert torch.equal(iv.fully_connected()(net, replace(seen, labels=given)).labels, given)


def test_where_the_last_layer_was_not_sent_the_image_comes_without_its_label():
    net = chain(True, True, True, dtype=torch.float64)
    net[-1].requires_grad_(False)
    x, seen = see(net, labels=[2])
    rec = iv.fully_connected()(net, seen)
    assert relative_error(rec.images, x) < 1e-5
    assert rec.labels is None
    assert "the labels are unknown: labels not inferred, because the update lacks" in rec.note


@pytest.mark.parametrize("n", [1, 3])
def test_a_first_layer_that_was_not_sent_is_named(n):
    net = chain(True, True, True)
    net[1].requires_grad_(False)
    _, seen = see(net, n=n)
    with pytest.raises(RecoveryError, match=r"the update lacks '1.weight'; expected it"):
        iv.fully_connected()(net, seen)


def test_fedavg_of_one_image_is_exact_at_the_first_layer():
    net = chain(True, True, True, dtype=torch.float64)
    x, seen = see(net, protocol=iv.FedAvg(lr=0.05, local_steps=7))
    assert relative_error(iv.fully_connected()(net, seen).images, x) < 1e-5


def test_fedavg_behind_an_unbiased_layer_is_called_approximate():
    net = chain(False, True, True, dtype=torch.float64)
    x, seen = see(net, protocol=iv.FedAvg(lr=0.5, local_steps=7))
    rec = iv.fully_connected()(net, seen)
    assert rec.note.startswith("approximate")
    assert relative_error(rec.images, x) > 1e-3


def test_a_batch_is_called_a_mixture():
    net = chain(True, True, True, dtype=torch.float64)
    x, seen = see(net, n=3)
    found = analytic.layer_input_of(net, seen, "1")
    assert found.kind == "mixture"
    assert found.residual > 0.05
    rec = iv.fully_connected()(net, seen)
    assert rec.images.shape == x.shape
    assert rec.note.startswith("mixtures")


def test_each_row_of_a_batch_is_the_mixture_that_theory_says():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 7, generator=generator)
    delta = torch.randn(3, 4, generator=generator)
    rows, mixtures = analytic.row_inputs(delta.T @ x, delta.sum(0))
    assert rows.tolist() == [0, 1, 2, 3]
    expected = torch.stack([(delta[:, j, None] * x).sum(0) / delta[:, j].sum() for j in range(4)])
    torch.testing.assert_close(mixtures, expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_one_image_moved_gives_that_image():
    x = torch.rand(2, 7, generator=torch.Generator().manual_seed(0))
    delta = torch.tensor([[1.0, 0.0, 0.5], [1.0, 2.0, 0.0]])
    _, rows = analytic.row_inputs(delta.T @ x, delta.sum(0))
    torch.testing.assert_close(rows[1], x[1])
    torch.testing.assert_close(rows[2], x[0])


def test_behind_a_flatten_the_features_come_back():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x, seen = see(net)
    features = net[:3](iv.CIFAR10.encode(x))[0].detach()
    assert relative_error(analytic.layer_input_of(net, seen, "3").inputs, features) < 1e-5
    with pytest.raises(
        RecoveryError, match="begins with convolution '0'; expected a fully connected layer on all 192"
    ):
        iv.fully_connected()(net, seen)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3), "bias gradient is zero in every row"),
        (torch.zeros(3, 2), torch.tensor([0.0, torch.nan, 1.0]), "NaN or infinite"),
        (torch.zeros(3, 2), torch.ones(2), r"shape \(3, 2\) and the bias gradient \(2,\)"),
        (torch.zeros(3), torch.ones(3), r"expected \(out, in\) and \(out,\)"),
    ],
)
def test_what_cannot_be_divided_is_refused(weight, bias, message):
    for closed_form in (analytic.layer_input, analytic.row_inputs):
        with pytest.raises(RecoveryError, match=message):
            closed_form(weight, bias)


def test_a_layer_without_a_bias_is_refused():
    net = chain(False, True, True)
    _, seen = see(net)
    with pytest.raises(RecoveryError, match=r"'1' is Linear; expected .* with a bias, one of \['3', '5'\]"):
        analytic.layer_input_of(net, seen, "1")


def test_a_batch_behind_an_unbiased_layer_is_refused():
    net = chain(False, True, True)
    _, seen = see(net, n=2)
    with pytest.raises(RecoveryError, match="'1' has no bias and the batch has 2 images; expected 1"):
        iv.fully_connected()(net, seen)


def test_dead_units_are_named():
    net = chain(False, True, True)
    with torch.no_grad():
        net[1].weight.fill_(0)
        net[1].weight[0] = -1.0
    x, y = torch.ones(1, 3, 8, 8), torch.tensor([0])
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.UNIT)
    with pytest.raises(RecoveryError, match="the gradient behind '1' is all zero"):
        iv.fully_connected()(net, seen)
