"""The client's step: closed forms, signs, minibatches, and that it leaves the model alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib.errors import ConfigError, ObservationError
from tests.conftest import build_tiny, random_batch


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.fixture
def double():
    return build_tiny(torch.float64)


@pytest.fixture
def batch():
    return random_batch(4, dtype=torch.float64)


def test_fedsgd_is_what_autograd_gives(double, batch):
    x, y = batch
    loss = F.cross_entropy(double(x), y)
    expected = dict(
        zip(
            dict(double.named_parameters()), torch.autograd.grad(loss, list(double.parameters())), strict=True
        )
    )
    close(iv.FedSGD()(double, x, y), expected)


def test_one_full_batch_step_is_minus_lr_times_the_gradient(double, batch):
    gradient = iv.FedSGD()(double, *batch)
    update = iv.FedAvg(lr=0.05, local_steps=1)(double, *batch)
    close(update, {name: -0.05 * g for name, g in gradient.items()})


def test_the_gradient_of_a_batch_is_the_mean_of_single_ones(double, batch):
    x, y = batch
    singles = [iv.FedSGD()(double, x[k : k + 1], y[k : k + 1]) for k in range(4)]
    close(iv.FedSGD()(double, x, y), {n: torch.stack([s[n] for s in singles]).mean(0) for n in singles[0]})


@pytest.mark.parametrize(
    ("protocol", "rows"),
    [
        (iv.FedAvg(lr=0.1, local_steps=3), [[0, 1, 2, 3]] * 3),
        (iv.FedAvg(lr=0.1, epochs=2, batch_size=2), [[0, 1], [2, 3]] * 2),
        (iv.FedAvg(lr=0.1, local_steps=3, batch_size=3), [[0, 1, 2], [3], [0, 1, 2]]),
        (iv.FedAvg(lr=0.1, local_steps=2, batch_size=3, drop_last=True), [[0, 1, 2]] * 2),
    ],
)
def test_fedavg_is_plain_sgd_over_its_minibatches(double, batch, protocol, rows):
    x, y = batch
    client = copy.deepcopy(double)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    for r in rows:
        optimizer.zero_grad()
        F.cross_entropy(client(x[r]), y[r]).backward()
        optimizer.step()
    before, after = dict(double.named_parameters()), dict(client.named_parameters())
    expected = {n: (after[n] - before[n]).detach() for n in before}
    close(protocol(double, x, y), expected, rtol=1e-9, atol=1e-12)


@given(
    num_images=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    epochs=st.integers(1, 3),
    drop_last=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_epoch_uses_every_image_once(num_images, batch_size, epochs, drop_last):
    protocol = iv.FedAvg(lr=1.0, epochs=epochs, batch_size=batch_size, drop_last=drop_last)
    if batch_size > num_images:
        with pytest.raises(ConfigError, match=f"batch_size is {batch_size}"):
            protocol.batches(num_images)
        return
    used = [k for rows in protocol.batches(num_images) for k in range(num_images)[rows]]
    kept = num_images - num_images % batch_size if drop_last else num_images
    assert used == list(range(kept)) * epochs


def test_the_step_is_differentiable_in_the_images(double, batch):
    x, y = batch
    names = list(iv.FedSGD()(double, x, y))

    def first_layer(inputs):
        return iv.FedAvg(lr=0.5, local_steps=2)(double, inputs, y)[names[0]]

    assert torch.autograd.gradcheck(first_layer, (x.requires_grad_(),))


def test_the_mean_gradient_of_an_update_has_the_sign_of_a_gradient(double, batch):
    update = iv.FedAvg(lr=1e-4, local_steps=5)(double, *batch)
    gradient = iv.FedSGD()(double, *batch)
    protocol = iv.FedAvg(lr=1e-4, local_steps=5)
    for name, value in update.items():
        torch.testing.assert_close(protocol.mean_gradient(value, 4), gradient[name], rtol=2e-2, atol=1e-4)


def test_observing_leaves_the_model_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    net[1].eval()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    for training in (False, True):
        iv.observe(net, *random_batch(2), iv.FedSGD(), normalization=iv.CIFAR10, training_mode=training)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    close(net.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_training_mode_sends_the_statistics_that_training_gives():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    x, y = random_batch(3)
    protocol = iv.FedAvg(lr=0.1, local_steps=2)
    seen = iv.observe(net, x, y, protocol, normalization=iv.UNIT, training_mode=True)
    client = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(client(x), y).backward()
        optimizer.step()
    close(dict(seen.buffers), dict(client.named_buffers()), rtol=1e-5, atol=1e-6)
    expected = {
        n: p.detach() - q.detach()
        for (n, p), q in zip(client.named_parameters(), net.parameters(), strict=True)
    }
    close(dict(seen.update), expected, rtol=1e-4, atol=1e-6)


def test_hidden_labels_are_not_in_the_observation(tiny):
    seen = iv.observe(tiny, *random_batch(), iv.FedSGD(), normalization=iv.UNIT, reveal_labels=False)
    assert seen.labels is None


def test_frozen_parameters_are_not_sent(tiny):
    tiny[0].weight.requires_grad_(False)
    seen = iv.observe(tiny, *random_batch(), iv.FedSGD(), normalization=iv.UNIT)
    assert list(seen.update) == ["0.bias", "3.weight", "3.bias"]
    seen.validate(tiny)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0, "local_steps": 1}, "lr is 0.0; expected a positive"),
        ({"lr": 0.1}, "local_steps=None and epochs=None; expected exactly one"),
        ({"lr": 0.1, "local_steps": 1, "epochs": 1}, "expected exactly one"),
        ({"lr": 0.1, "local_steps": 0}, "local_steps is 0; expected a whole number from 1"),
        ({"lr": 0.1, "epochs": 1, "batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
    ],
)
def test_bad_fedavg_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        iv.FedAvg(**arguments)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 8, 8), torch.tensor([0]), r"images have shape \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "N at least 1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.tensor([0]), "torch.int64"),
        (torch.full((1, 3, 8, 8), 1.5), torch.tensor([0]), r"images lie in \[1.5, 1.5\]; expected \[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), torch.tensor([0]), "expected \\[0, 1\\]"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([0.0]), "expected int64"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([0, 1]), r"labels have shape \(2,\)"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([7]), r"labels \[7\] are out of range; expected 0 to 4"),
    ],
)
def test_a_bad_batch_is_refused(tiny, x, y, message):
    with pytest.raises(ObservationError, match=message):
        iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
