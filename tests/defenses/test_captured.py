"""Defences tried on a captured update do what they do inside the client."""

import pytest
import torch

import invlib as iv
from invlib.defenses import Clip, GaussianNoise, TopK
from invlib.errors import ConfigError
from tests.conftest import random_batch


@pytest.fixture
def model():
    return iv.models.build("LeNetZhu", seed=0)


def seen(model, protocol):
    images, labels = random_batch(1, side=32)
    return iv.observe(
        model, images, labels, protocol, normalization=iv.CIFAR10, generator=torch.Generator().manual_seed(5)
    )


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("transforms", [(Clip(0.1), GaussianNoise(0.01)), (TopK(0.1),), ()])
def test_a_captured_update_is_defended_as_it_would_be_in_the_client(model, transforms, public):
    inside = seen(model, iv.Defended(iv.FedSGD(), transforms, public=public))
    plain = seen(model, iv.FedSGD())
    outside = iv.defenses.defend(plain, transforms, public=public, generator=torch.Generator().manual_seed(5))
    assert outside.protocol == inside.protocol
    assert outside.sent.keys() == inside.sent.keys()
    for name, value in inside.update.items():
        assert torch.equal(outside.update[name], value)
    assert all(torch.equal(outside.sent[n], mask) for n, mask in inside.sent.items())


def test_noise_is_the_same_at_each_call_and_nothing_else_is_moved(model):
    plain = seen(model, iv.FedSGD())
    before, state = {n: u.clone() for n, u in plain.update.items()}, torch.get_rng_state()
    one, other = (iv.defenses.defend(plain, [GaussianNoise(0.1)]) for _ in range(2))
    assert all(torch.equal(one.update[n], other.update[n]) for n in before)
    assert all(torch.equal(plain.update[n], u) for n, u in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_client_that_has_defences_is_refused(model):
    told = seen(model, iv.Defended(iv.FedSGD(), [Clip(1.0)]))
    with pytest.raises(ConfigError, match="without defences"):
        iv.defenses.defend(told, [GaussianNoise(0.1)])
