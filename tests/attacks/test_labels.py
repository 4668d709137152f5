"""Label inference: exact for one image, counts for batches; gradients or updates, with or without bias."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib.attacks.labels import _whole_counts, infer
from invlib.core.network import classifier
from invlib.errors import RecoveryError
from tests.conftest import build_tiny, random_batch

PROTOCOLS = [iv.FedSGD(), iv.FedAvg(lr=0.05, local_steps=4), iv.FedAvg(lr=0.05, epochs=2)]


def without_bias():
    net = build_tiny()
    net[3] = nn.Linear(96, 5, bias=False)
    return net


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize("build", [build_tiny, without_bias])
@pytest.mark.parametrize("label", range(5))
def test_the_label_of_one_image_is_exact(protocol, build, label):
    x, _ = random_batch(seed=label)
    y = torch.tensor([label])
    net = build()
    found = infer(net, iv.observe(net, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=False))
    assert found.labels.tolist() == [label]
    assert found.counts.tolist() == [int(c == label) for c in range(5)]


@pytest.mark.parametrize("protocol", [*PROTOCOLS, iv.FedAvg(lr=0.05, epochs=2, batch_size=2)], ids=str)
@pytest.mark.parametrize("build", [build_tiny, without_bias])
@pytest.mark.parametrize("labels", [[0, 0, 3, 4], [2, 2, 2, 2], [0, 1, 2, 3]])
def test_the_label_counts_of_a_batch(protocol, build, labels):
    x, _ = random_batch(4)
    net = build()
    seen = iv.observe(net, x, torch.tensor(labels), protocol, normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == labels
    assert found.counts.sum() == 4


@pytest.mark.parametrize("labels", [[0, 0, 3, 4], [2, 2, 2, 2]])
def test_features_below_zero_turn_the_row_sums_round(labels):
    net = without_bias()
    net[1] = nn.LogSigmoid()  # gives negative numbers alone
    x, _ = random_batch(4)
    y = torch.tensor(labels)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    assert infer(net, seen).labels.tolist() == labels


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.LogSigmoid, nn.Tanh], ids=["above", "below", "mixed"])
@pytest.mark.parametrize("label", range(5))
def test_the_label_of_one_image_is_exact_for_features_of_any_sign(protocol, activation, label):
    net = without_bias()
    net[1] = activation()
    for seed in range(4):
        x, _ = random_batch(seed=seed)
        y = torch.tensor([label])
        seen = iv.observe(net, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=False)
        assert infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("label", range(5))
@pytest.mark.parametrize("rest", [0.3, 1e-5, 1e-12])
def test_a_confident_wrong_prediction_hides_no_label(sign, label, rest):
    net = without_bias()
    x, _ = random_batch()
    seen = iv.observe(net, x, torch.tensor([0]), iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    wrong = (label + 2) % 5
    factors = torch.full((5,), rest / 4)
    factors[wrong] = 1 - rest  # where rest is small, as long as the label's row, to rounding
    factors[label] -= 1
    features = sign * torch.rand(96, generator=torch.Generator().manual_seed(0))
    seen = replace(seen, update=dict(seen.update) | {"3.weight": 1e-20 * torch.outer(factors, features)})
    assert infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.LogSigmoid], ids=["above", "below"])
@pytest.mark.parametrize("label", range(2))
def test_of_two_classes_random_images_tell_the_sign_of_the_features(activation, label):
    net = build_tiny(classes=2)
    net[1], net[3].bias = activation(), None
    x, _ = random_batch()
    y = torch.tensor([label])
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == [label]
    assert "features of random images" in found.method


def test_a_bias_that_was_not_sent_is_not_needed():
    net = build_tiny()
    net[3].bias.requires_grad_(False)
    x, y = random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == y.tolist()
    assert found.method == "row of the weight gradient that is opposed to all others"


def test_soft_labels_take_the_plain_gradient(tiny, seen):
    attack = iv.GradientMatching(labels="optimize")
    assert [(v.name, v.signed) for v in attack.problem(tiny, seen).variables] == [
        ("images", True),
        ("labels", False),
    ]


def test_the_last_layer_is_found():
    assert classifier(build_tiny()) == ("3.weight", "3.bias")
    assert classifier(without_bias()) == ("3.weight", None)
    assert classifier(nn.Linear(3, 2)) == ("weight", "bias")


def test_a_network_without_a_fully_connected_layer_is_refused():
    with pytest.raises(RecoveryError, match="Conv2d has 0 fully connected layers"):
        classifier(nn.Conv2d(3, 3, 3))


def test_a_zero_gradient_is_refused(tiny, seen):
    zero = replace(seen, update=dict(seen.update) | {"3.bias": torch.zeros(5)})
    with pytest.raises(RecoveryError, match=r"'3\.bias' is all zero"):
        infer(tiny, zero)


def test_a_missing_layer_is_refused(tiny, seen):
    with pytest.raises(RecoveryError, match=r"lacks '3\.weight'"):
        infer(tiny, replace(seen, update={"0.weight": seen.update["0.weight"]}))


@pytest.mark.parametrize(
    ("expected", "present", "total", "counts"),
    [
        ([0.9, 1.6, 0.5], [0, 0, 0], 3, [1, 2, 0]),  # the first two are furthest short
        ([2.9, 2.02, 0.04, 0.04], [0, 0, 1, 1], 5, [2, 1, 1, 1]),  # the second pays for the last two
        ([0.02, 0.03, 0.04, 3.91], [1, 1, 1, 0], 4, [1, 1, 1, 1]),
    ],
)
def test_counts_by_hand(expected, present, total, counts):
    found = _whole_counts(torch.tensor(expected), present=torch.tensor(present).bool(), total=total)
    assert found.tolist() == counts


@given(
    expected=st.lists(st.floats(-2, 6), min_size=1, max_size=8),
    total=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_counts_are_whole_and_add_up(expected, total, data):
    size = len(expected)
    present = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    counts = _whole_counts(torch.tensor(expected), present=torch.tensor(present), total=total)
    assert int(counts.sum()) == total
    assert (counts >= 0).all()
    if sum(present) <= total:
        assert all(c >= 1 for c, p in zip(counts.tolist(), present, strict=True) if p)
