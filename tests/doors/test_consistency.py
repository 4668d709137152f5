"""Facts in one call that contradict each other: refused where impossible, said where doubtful."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import DoubtWarning, ObservationError
from tests.conftest import build_tiny, random_batch
from tests.doors.test_capture import AVERAGE, SHAPE, gradient, normed, score, trained

QUICK = iv.inverting_gradients(steps=1)


def facts(y, **more):
    return {"protocol": AVERAGE, "num_images": len(y), "labels": y, **SHAPE, **more}


def test_statistics_that_moved_prove_training_mode():
    net, (x, y) = normed(), random_batch(2)
    before, after = net.state_dict(), trained(net, x, y).state_dict()
    with pytest.raises(ObservationError, match=r"'1.running_mean' moved.*training_mode=True"):
        iv.from_state_dicts(net, before, after, **facts(y))
    still = {n: before[n] if "running" in n else v for n, v in after.items()}
    with pytest.warns(DoubtWarning, match="no batch-norm statistics moved"):
        seen = iv.from_state_dicts(net, before, still, **facts(y, training_mode=True))
    assert score(net, seen, x, y) < 1e-5


def test_training_mode_needs_no_statistics():
    net, (x, y) = normed(), random_batch(2)
    client = copy.deepcopy(net).train()
    parts = gradient(client, x, y)
    seen = iv.from_gradients(net, parts, num_images=2, labels=y, training_mode=True, **SHAPE)
    assert score(net, seen, x, y) < 1e-5


def test_a_model_that_is_not_before_is_refused():
    net, (x, y) = build_tiny(), random_batch()
    before, client = copy.deepcopy(net.state_dict()), trained(net, x, y)
    after = client.state_dict()
    assert score(net, iv.from_state_dicts(net, before, after, **facts(y)), x, y) < 1e-5
    with pytest.raises(ObservationError, match="differ from before"):
        iv.from_state_dicts(client, before, after, **facts(y))
    with pytest.raises(ObservationError, match="differ from before"):
        iv.from_state_dicts(net, after, before, **facts(y))
    with pytest.raises(ObservationError, match="hold the same weights"):
        iv.from_state_dicts(client, client.state_dict(), after, **facts(y))
    with pytest.raises(ObservationError, match=r"after\['0.bias'\] has shape \(1,\); expected \(6,\)"):
        iv.from_state_dicts(net, before, {**after, "0.bias": torch.zeros(1)}, **facts(y))
    with pytest.raises(ObservationError, match="FedSGD, which sends gradients"):
        iv.from_state_dicts(net, before, after, **facts(y, protocol=iv.FedSGD()))


def test_weights_that_were_sent_in_half_precision_are_those_of_the_model():
    net, (x, y) = build_tiny(), random_batch()
    before, after = ({n: v.half() for n, v in m.state_dict().items()} for m in (net, trained(net, x, y)))
    assert score(net, iv.from_state_dicts(net, before, after, **facts(y)), x, y) < 0.01


@pytest.mark.parametrize("attack", [QUICK, iv.best(evaluations=4)])
def test_an_update_of_zeros_is_doubtful(attack, tiny):
    _, y = random_batch()
    zeros = {n: torch.zeros_like(p) for n, p in tiny.named_parameters()}
    seen = iv.from_arrays(tiny, zeros, num_images=1, labels=y, **SHAPE)
    with pytest.warns(DoubtWarning, match="all zero"):
        found = attack(tiny, seen)
    assert any("all zero" in doubt for doubt in found.warnings)
    assert "all zero" in found.note


def test_an_update_longer_than_the_client_can_make_it_is_doubtful(tiny):
    x, y = random_batch()
    seen = iv.observe(tiny, x, y, AVERAGE, normalization=iv.CIFAR10)
    long = replace(seen, protocol=iv.FedAvg(lr=1e-6, local_steps=2))
    with pytest.warns(DoubtWarning, match="times as long as what FedAvg"):
        assert len(QUICK(tiny, long).warnings) == 1
    assert QUICK(tiny, seen).warnings == ()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build_tiny()

    def forward(self, x):
        return self.net(x + 0.5 * torch.randn_like(x))


def dropped():
    net = build_tiny()
    net.insert(2, nn.Dropout(0.5))
    return net


@pytest.mark.parametrize(("build", "training"), [(dropped, True), (Noisy, False)])
def test_a_random_network_is_said_and_drawn_from_the_generator(build, training):
    net, (x, y) = build(), random_batch()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=training)
    assert score(net, seen, x, y) > 1e-3, "the attack must not draw what the client drew"
    runs = []
    for seed in (0, 0, 1):
        with pytest.warns(DoubtWarning, match="random in .* mode"):
            found = iv.inverting_gradients(steps=3)(net, seen, generator=torch.Generator().manual_seed(seed))
        assert "random in" in found.note
        runs.append(found.images)
        torch.manual_seed(1)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    if training:
        off = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
        assert QUICK(net, off).warnings == ()
        assert score(net, off, x, y) < 1e-5


def test_spectral_norm_in_training_mode_begins_anew_at_each_evaluation():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, stride=2))
        net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))
    kept = copy.deepcopy(net.state_dict())
    x, y = random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=True)
    assert [score(net, seen, x, y) < 1e-5 for _ in range(3)] == [True] * 3
    found = iv.inverting_gradients(steps=3, restarts=2)(net, seen)
    assert found.status == "max_steps"
    for name, value in net.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_a_wrong_normalization_is_never_called_exact():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    x, y = random_batch()
    parts = gradient(net, x, y)
    told = {"num_images": 1, "image_shape": (3, 8, 8), "labels": y}
    for attack in (iv.fully_connected(), iv.best(evaluations=2)):
        right = attack(net, iv.from_gradients(net, parts, normalization=iv.CIFAR10, **told))
        assert right.warnings == ()
        with pytest.warns(DoubtWarning, match="outside"):
            wrong = attack(net, iv.from_gradients(net, parts, normalization=iv.UNIT, **told))
        assert any("outside" in doubt for doubt in wrong.warnings)
        assert not wrong.note.startswith("exact")


def test_labels_and_shapes_that_contradict_the_number_of_images(tiny):
    x, y = random_batch(2)
    parts = gradient(tiny, x, y)
    with pytest.raises(ObservationError, match=r"labels have shape \(2,\); expected \(3,\)"):
        iv.from_gradients(tiny, parts, num_images=3, labels=y, **SHAPE)
    for count in (0, 1.5, True, "2", 10**12):
        with pytest.raises(ObservationError, match="num_images"):
            iv.from_gradients(tiny, parts, num_images=count, **SHAPE)
    for protocol in (iv.FedSGD, "FedSGD", 3):
        with pytest.raises(ObservationError, match="protocol is"):
            iv.from_gradients(tiny, parts, num_images=2, protocol=protocol, **SHAPE)


def test_a_loss_that_does_not_take_the_labels_is_refused(tiny):
    x, y = random_batch(2)
    with pytest.raises(ObservationError, match="the loss does not take logits"):
        iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10, loss=F.binary_cross_entropy_with_logits)
    with pytest.raises(ObservationError, match=r"expected .*one number"):
        iv.observe(
            tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10,
            loss=lambda o, t: F.cross_entropy(o, t, reduction="none"),
        )  # fmt: skip
