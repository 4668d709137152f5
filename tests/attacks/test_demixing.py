"""Labels of batches: probabilities of counts, the fit of the last layer, soft labels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import invlib as iv
from invlib.attacks.counts import likeliest, weighed
from invlib.attacks.demixing import _Layer, demix
from invlib.attacks.labels import infer, ranked_labels
from invlib.errors import RecoveryError
from tests.attacks.test_labels import EIGHT, of_photos, photo_net


def test_counts_by_enumeration():
    logs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = weighed(logs, 4)
    prior = [math.lgamma(n + 6) - math.lgamma(n + 1) for n in range(5)]
    every = {
        n: math.exp(sum(float(logs[c, n[c]]) + prior[n[c]] for c in range(3)))
        for n in itertools.product(range(5), repeat=3)
        if sum(n) == 4
    }
    total = sum(every.values())
    for c, k in itertools.product(range(3), range(5)):
        share = sum(p for n, p in every.items() if n[c] == k) / total
        assert float(found.probabilities[c, k]) == pytest.approx(share)
    best = sorted(every.items(), key=lambda one: -one[1])[:4]
    assert [tuple(torch.bincount(row, minlength=3).tolist()) for row in found.labels] == [n for n, _ in best]
    some = sum(p for _, p in best)
    assert found.weights.tolist() == pytest.approx([p / some for _, p in best])


def test_the_likeliest_labels_and_how_sure_they_are():
    table = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.5, 0.1], [0.8, 0.1, 0.1]], dtype=torch.float64)
    labels, sure = likeliest(table)
    assert labels.tolist() == [0, 1]
    assert sure.tolist() == pytest.approx([0.9, 0.6])


def planted(labels, sharp=1.0, seed=0, smoothing=0.0):
    """A last layer of ten classes and what it makes of a batch with given labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = sharp * torch.randn(10, 24, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(10, generator=generator, dtype=torch.float64)
    features = torch.randn(60, 24, generator=generator, dtype=torch.float64).relu()
    y = torch.tensor(labels)
    errors = (features[: len(y)] @ weight.T + bias).softmax(1)
    errors = errors - (1 - smoothing) * F.one_hot(y, 10) - smoothing / 10
    inputs = torch.cat([features[: len(y)], torch.ones(len(y), 1, dtype=torch.float64)], 1)
    return weight, bias, errors.T @ inputs / len(y), features[30:]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("labels", [[1, 1, 4], [0, 3, 3, 9]])
def test_the_last_layer_holds_the_labels_of_a_batch(labels, smoothing):
    guesses = torch.tensor([[0] * len(labels), list(range(len(labels)))]).repeat(16, 1)
    layer, generator = planted(labels, smoothing=smoothing), torch.Generator().manual_seed(0)
    found = demix(*layer, guesses, smoothing=smoothing, generator=generator)
    assert found.certified
    assert found.labels[0].tolist() == labels
    assert found.misfit[0] < 1e-6


def test_a_gradient_of_no_batch_is_not_certified():
    weight, bias, gradient, features = planted([1, 1, 4])
    turned = torch.cat([gradient[:, :-1], gradient[:, -1:].roll(1, 0)], 1)
    guesses = torch.tensor([[1, 1, 4], [0, 1, 2]])
    found = demix(
        weight, bias, turned, features, guesses, rounds=1, generator=torch.Generator().manual_seed(0)
    )
    assert not found.certified
    noisy = gradient + 1e-3 * torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert demix(weight, bias, noisy, features, guesses, generator=torch.Generator().manual_seed(0)) is None
    ten = torch.zeros(2, 10, dtype=torch.int64)
    assert demix(weight, bias, gradient, features, ten, generator=torch.Generator().manual_seed(0)) is None


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_labels_of_a_batch_on_a_trained_network_are_certain(training):
    net = iv.models.build("ResNet20", weights="cifar10")
    x, _ = iv.data.samples("patches32", indices=[3, 21, 33, 44])
    y = torch.tensor([6, 6, 2, 9])
    seen = iv.observe(
        net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False, training_mode=training
    )
    found = infer(net, seen)
    assert found.labels.tolist() == sorted(y.tolist())
    assert not found.guess
    assert found.confidence.tolist() == [1, 1, 1, 1]
    labels, weights = ranked_labels(net, seen)
    assert labels.tolist() == [sorted(y.tolist())]
    assert weights.tolist() == [1]


def test_labels_are_ranked_where_the_gradient_does_not_hold_them():
    net = photo_net()
    seen = of_photos(net, labels=sorted(EIGHT), protocol=iv.FedAvg(lr=0.01, local_steps=3))
    found = infer(net, seen)
    labels, weights = ranked_labels(net, seen, most=5)
    assert labels[0].tolist() == found.labels.tolist()
    assert set(found.labels.tolist()) == set(EIGHT)
    assert labels.shape == (5, 8)
    assert len({tuple(row) for row in labels.tolist()}) == 5
    assert float(weights.sum()) == pytest.approx(1)
    assert (weights[1:].diff() <= 0).all()
    assert found.confidence.shape == (8,)
    assert found.doubt == pytest.approx(max(1 - float(found.confidence.min()), 1e-6))


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
@pytest.mark.parametrize("label", [0, 7])
def test_a_soft_label_of_one_image_is_exact(label, smoothing):
    net = photo_net()
    soft = torch.full((1, 10), smoothing / 10)
    soft[0, label] += 1 - smoothing
    found = infer(net, of_photos(net, told=False, labels=[label]))
    assert found.labels.tolist() == [label]  # a hard one stays a class
    x, _ = iv.data.samples("photos32", indices=[2])
    seen = iv.observe(net, x, soft, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels == pytest.approx(soft, abs=1e-4)
    assert "soft" in found.method


def test_a_mixture_of_two_labels_is_exact():
    net = photo_net()
    soft = torch.tensor([[0.5, 0, 0.3, 0, 0, 0, 0, 0.2, 0, 0]])
    x, _ = iv.data.samples("photos32", indices=[0])
    seen = iv.observe(net, x, soft, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    assert infer(net, seen).labels == pytest.approx(soft, abs=1e-4)
    local = iv.observe(
        net, x, soft, iv.FedAvg(lr=0.1, local_steps=5), normalization=iv.CIFAR10, reveal_labels=False
    )
    with pytest.raises(RecoveryError, match="unexplained"):
        infer(net, local)


@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_the_label_is_exchanged_that_lowers_the_cost_most(smoothing):
    weight, bias, gradient, features = planted([1, 4, 4], smoothing=smoothing)
    generator = torch.Generator().manual_seed(1)
    layer = _Layer(
        weight=weight,
        bias=bias,
        center=features.mean(0),
        target=gradient,
        smoothing=smoothing,
        generator=generator,
    )
    labels = torch.randint(10, (64, 3), generator=generator)
    points = layer.starts(labels)
    changed = layer.exchanged(points, labels, 0.1)
    assert not torch.equal(changed, labels)
    every = [labels]
    for slot in range(3):
        every += [labels.clone().index_fill_(1, torch.tensor(slot), label) for label in range(10)]
    least = torch.stack([layer.cost(points, some, 0.1)[0] for some in every]).amin(0)
    torch.testing.assert_close(layer.cost(points, changed, 0.1)[0], least)
