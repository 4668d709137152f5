"""Clients of Adam without the jumps that signs make: zero at the truth, and continuous."""

import pytest
import torch

import invlib as iv
from invlib.errors import ConfigError
from invlib.federated.adaptive import without_jumps
from invlib.optim import objectives
from tests.conftest import build_tiny, random_batch

CLIENTS = [
    iv.FedAvg(lr=1e-3, local_steps=3, optimizer="adam"),
    iv.FedAvg(lr=(1e-3, 1e-4), epochs=1, batch_size=1, optimizer="adam", betas=(0.5, 0.9)),
    iv.FedAvg(lr=1e-3, local_steps=2, optimizer="adamw", weight_decay=0.1, clip_norm=0.1, proximal=0.5),
]


def seen_by(client, count=2):
    net = build_tiny().double().eval()
    x, y = random_batch(count)
    return net, x.double(), y, iv.observe(net, x.double(), y, client, normalization=iv.CIFAR10)


def mismatch(net, sought, x, y):
    return iv.GradientMatching(objective=objectives.l2, log_odds=False).score(net, sought, x, y)


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_the_client_s_own_images_have_no_mismatch(client):
    net, x, y, seen = seen_by(client)
    at_truth = without_jumps(net, seen, x, y)
    assert not any(u.any() for u in at_truth.update.values())
    assert mismatch(net, at_truth, x, y) < 1e-20
    other = x.flip(-1)
    near = without_jumps(net, seen, 0.99 * x + 0.01 * other, y)
    assert mismatch(net, near, x, y) < 1e-4 * mismatch(net, near, other, y)


def test_a_number_s_mismatch_passes_through_zero_where_its_sign_changes():
    net, x, y, seen = seen_by(iv.FedAvg(lr=1e-3, local_steps=1, optimizer="adam"), count=1)
    other = x.flip(-1)
    sought = without_jumps(net, seen, other, y)

    def along(share, step):
        inputs = iv.CIFAR10.encode((1 - share) * x + share * other)
        made = step(net, inputs, y, buffers=dict(net.named_buffers()))
        return torch.cat([part.detach().flatten() for part in made.values()])

    shares = torch.linspace(0, 1, 401).tolist()
    plain, smooth = (
        torch.stack([along(t, step) for t in shares]) for step in (seen.protocol, sought.protocol)
    )
    jumps = (plain[1:] - plain[:-1]).abs().amax(0) > 1e-3  # from -0.001 to 0.001
    assert jumps.sum() > 10
    assert (smooth[1:] - smooth[:-1]).abs().max() < 0.02 * smooth.abs().max()


def test_a_client_of_sgd_has_no_jumps():
    net, x, y, seen = seen_by(iv.FedAvg(lr=1e-3, local_steps=2))
    with pytest.raises(ConfigError, match="Adam"):
        without_jumps(net, seen, x, y)
