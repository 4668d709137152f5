"""Every closed form runs on every protocol, or refuses by name."""

import itertools
import math

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.errors import RecoveryError
from tests.conftest import random_batch


def momentum(model, inputs, labels, *, params=None, buffers=None, loss=None, on_step=None):
    """Two steps with momentum, a client of a user's own."""
    params = dict(model.named_parameters()) if params is None else dict(params)
    start, velocity = dict(params), dict.fromkeys(params, 0.0)
    for _ in range(2):
        out = torch.func.functional_call(model, {**params, **(buffers or {})}, (inputs,))
        slopes = torch.autograd.grad(
            nn.functional.cross_entropy(out, labels), list(params.values()), create_graph=True
        )
        for name, slope in zip(list(params), slopes, strict=True):
            velocity[name] = 0.9 * velocity[name] + slope
            params[name] = params[name] - 0.1 * velocity[name]
    return {name: params[name] - start[name] for name in params}


PROTOCOLS = {
    "FedSGD": (iv.FedSGD(), (1, 2, 3)),
    "one step": (iv.FedAvg(lr=0.1, local_steps=1), (1, 2, 3)),
    "three steps": (iv.FedAvg(lr=0.1, local_steps=3), (1, 2)),
    "minibatches of one": (iv.FedAvg(lr=0.1, local_steps=2, batch_size=1), (1, 2)),
    "minibatches of two": (iv.FedAvg(lr=0.1, epochs=1, batch_size=2), (2, 3)),
    "epochs": (iv.FedAvg(lr=0.1, epochs=2), (1, 3)),
    "epochs of minibatches": (iv.FedAvg(lr=0.1, epochs=2, batch_size=2), (3, 4)),
    "drop_last": (iv.FedAvg(lr=0.1, epochs=2, batch_size=2, drop_last=True), (3,)),
    "shuffled": (iv.FedAvg(lr=0.1, epochs=2, batch_size=2, shuffle=True), (4,)),
    "momentum": (momentum, (1, 2)),
    "nesterov": (
        iv.FedAvg(lr=0.1, epochs=2, batch_size=2, momentum=0.9, nesterov=True, weight_decay=0.01),
        (2, 3),
    ),
    "clipped": (iv.FedAvg(lr=(0.1, 0.2), local_steps=2, clip_norm=0.1, proximal=0.5), (1, 2)),
    "adam": (iv.FedAvg(lr=0.01, epochs=1, batch_size=1, optimizer="adam"), (1, 2)),
    "adamw": (iv.FedAvg(lr=0.01, local_steps=2, optimizer="adamw", weight_decay=0.01), (1, 2)),
}


def network(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "convolution":
            return nn.Sequential(
                nn.Conv2d(1, 9, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 3)
            )
        bias = kind == "biases"
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12, bias=bias), nn.ReLU(), nn.Linear(12, 3, bias=bias)
        )


CELLS = [(kind, name, n) for kind in ("biases", "no biases", "convolution") for name in PROTOCOLS
         for n in PROTOCOLS[name][1]]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "count"), CELLS)
def test_closed_forms_run_or_refuse_by_name(kind, name, count):
    model, protocol = network(kind), PROTOCOLS[name][0]
    x, y = random_batch(count, side=4, classes=3, seed=1)
    x = x[:, :1]
    for hidden in (False,) if name == "momentum" else (False, True):
        seen = iv.observe(model, x, y, protocol, normalization=iv.UNIT, reveal_labels=not hidden)
        attacks = (iv.fully_connected(), iv.recursive_inversion(), iv.best(evaluations=1))
        for attack, form in itertools.zip_longest(attacks, ("dense", "chain")):
            try:
                found = attack(model, seen)
            except RecoveryError:
                if form is None:  # the strongest attack searches where no closed form applies
                    raise
                continue
            assert found.images.shape == x.shape
            assert math.isfinite(found.score)
            one_step = name in ("FedSGD", "one step") or (name == "momentum" and kind == "biases")
            if count == 1 and not hidden and one_step and form == ("chain" if "conv" in kind else "dense"):
                assert float(iv.metrics.psnr(found.images, x)) > 60
