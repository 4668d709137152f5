"""Clients of every kind against a real training loop: the truth scores zero, every attack runs or refuses."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import invlib as iv
from invlib.attacks.orders import likely_orders
from invlib.errors import ConfigError, DoubtWarning, InvlibError
from tests.conftest import build_tiny, random_batch
from tests.doors.test_capture import SHAPE, normed, score

LR, STEPS = 0.05, 3
OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "weight decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {}),
}


def by_torch(net, x, y, kind):
    client = copy.deepcopy(net)
    make, settings = OPTIMIZERS[kind]
    optimizer = make(client.parameters(), lr=LR, **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(client(iv.CIFAR10.encode(x)), y).backward()
        optimizer.step()
    return client.state_dict()


def step_of(kind, how):
    """Return the client's step as a function, with `torch.func` or with `torch.autograd`."""

    def slopes_of(loss_of, now):
        if how == "func":
            return torch.func.grad(loss_of)(now)
        return dict(
            zip(now, torch.autograd.grad(loss_of(now), list(now.values()), create_graph=True), strict=True)
        )

    def client(model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None):
        start = dict(model.named_parameters() if params is None else params)
        now = dict(start)
        one, two = ({n: torch.zeros_like(p) for n, p in start.items()} for _ in range(2))
        for k in range(1, STEPS + 1):

            def loss_of(p):
                return loss(functional_call(model, {**p, **(buffers or {})}, (inputs,)), labels)

            slope = slopes_of(loss_of, now)
            if kind == "weight decay":
                slope = {n: slope[n] + 0.1 * now[n] for n in now}
            if kind == "momentum":
                slope = one = {n: 0.9 * one[n] + slope[n] for n in now}
            if kind == "Adam":
                one = {n: 0.9 * one[n] + 0.1 * slope[n] for n in now}
                two = {n: 0.999 * two[n] + 0.001 * slope[n] ** 2 for n in now}
                slope = {n: one[n] / (1 - 0.9**k) / ((two[n] / (1 - 0.999**k)).sqrt() + 1e-8) for n in now}
            now = {n: now[n] - LR * slope[n] for n in now}
        return {n: now[n] - start[n] for n in start}

    return client


@pytest.mark.parametrize("how", ["func", "autograd"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_clients_optimiser_as_a_function(kind, how):
    net, (x, y) = build_tiny(), random_batch()
    after, step = by_torch(net, x, y, kind), step_of(kind, how)
    facts = {"protocol": step, "num_images": 1, **SHAPE}
    seen = iv.from_state_dicts(net, net.state_dict(), after, labels=y, **facts)
    assert score(net, seen, x, y) < 1e-4
    plain = iv.from_state_dicts(
        net, net.state_dict(), after, labels=y, **{**facts, "protocol": iv.FedAvg(lr=LR, local_steps=STEPS)}
    )
    assert score(net, plain, x, y) > 10 * max(score(net, seen, x, y), 1e-6)
    hidden = iv.from_state_dicts(net, net.state_dict(), after, **facts)
    for attack in (iv.inverting_gradients(steps=2, restarts=2), iv.best(evaluations=4)):
        found = attack(net, hidden)
        assert found.labels.tolist() == y.tolist()
        assert torch.isfinite(found.images).all()


def test_a_step_that_leaves_out_a_parameter_is_named(tiny):
    x, y = random_batch()

    def client(model, inputs, labels, **how):
        update = iv.FedSGD()(model, inputs, labels, **how)
        return {n: u for n, u in update.items() if n != "0.bias"}

    seen = iv.from_arrays(
        tiny, iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10).update, protocol=client,
        num_images=1, labels=y, **SHAPE,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"step gives no '0.bias'"):
        iv.inverting_gradients(steps=1)(tiny, seen)


def test_the_mean_of_two_clients():
    net, (x, y) = build_tiny(), random_batch(2)
    one = iv.FedAvg(lr=0.1, local_steps=3)

    def both(model, inputs, labels, **how):
        parts = [one(model, inputs[k : k + 1], labels[k : k + 1], **how) for k in range(2)]
        return {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]}

    each = [
        iv.observe(net, x[k : k + 1], y[k : k + 1], one, normalization=iv.CIFAR10).update for k in range(2)
    ]
    mean = {n: (each[0][n] + each[1][n]) / 2 for n in each[0]}
    facts = {"protocol": both, "num_images": 2, **SHAPE}
    assert score(net, iv.from_arrays(net, mean, labels=y, **facts), x, y) < 1e-5
    found = iv.inverting_gradients(steps=2)(net, iv.from_arrays(net, mean, **facts))
    assert sorted(found.labels.tolist()) == sorted(y.tolist())


def shuffled(net, x, y, orders):
    client = copy.deepcopy(net)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.5)
    for order in orders:
        for rows in torch.tensor(order).split(2):
            optimizer.zero_grad()
            F.cross_entropy(client(iv.CIFAR10.encode(x[rows])), y[rows]).backward()
            optimizer.step()
    return client.state_dict()


def test_a_new_order_in_every_epoch():
    net, (x, y), orders = build_tiny(), random_batch(4), ((2, 0, 3, 1), (1, 2, 0, 3))
    after = shuffled(net, x, y, orders)

    def seen(**more):
        protocol = iv.FedAvg(lr=0.5, epochs=2, batch_size=2, **more)
        return iv.from_state_dicts(
            net, net.state_dict(), after, protocol=protocol, num_images=4, labels=y, **SHAPE
        )

    assert score(net, seen(orders=orders), x, y) < 1e-5
    assert score(net, seen(shuffle=True), x, y) < 1e-5
    with pytest.warns(DoubtWarning, match=r"the client shuffles \(FedAvg\(shuffle=True\)\)"):
        assert score(net, seen(), x, y) < 1e-5
    matching = iv.GradientMatching()
    found, least = likely_orders(
        lambda client: matching.score(net, seen(orders=client.orders or ((0, 1, 2, 3),) * 2), x, y),
        iv.FedAvg(lr=0.5, epochs=2, batch_size=2),
        4,
    )
    assert least < 1e-5
    for order, right in zip(found.orders, orders, strict=True):
        assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset(right[:2]), frozenset(right[2:])}


def test_a_client_that_shuffles_draws_its_orders_and_keeps_them_to_itself():
    net, (x, y) = build_tiny(), random_batch(4)
    protocol = iv.FedAvg(lr=0.5, epochs=2, batch_size=2, shuffle=True)
    seen = iv.observe(net, x, y, protocol, normalization=iv.CIFAR10)
    other = iv.observe(
        net, x, y, protocol, normalization=iv.CIFAR10, generator=torch.Generator().manual_seed(1)
    )
    assert seen.protocol.orders is None
    assert not torch.equal(seen.update["3.bias"], other.update["3.bias"])
    assert score(net, seen, x, y) < 1e-5


def test_an_attack_looks_for_the_orders_of_a_client_that_shuffles():
    net, (x, _) = build_tiny(), random_batch(3)
    protocol = iv.FedAvg(lr=1.0, epochs=3, batch_size=1, shuffle=True)
    seen = iv.observe(net, x, torch.arange(3), protocol, normalization=iv.CIFAR10)
    in_order = replace(seen, protocol=replace(protocol, shuffle=False))
    for attack, share in ((iv.inverting_gradients(steps=30), 1), (iv.best(evaluations=60), 0.8)):
        found = attack(net, seen)
        assert found.score <= share * attack(net, in_order).score
    assert "in a likely order" in found.note


def test_orders_that_are_no_permutations_are_refused(tiny):
    for orders in ((), ((0, 0),), ((0, 1), (0, 1, 2)), ((1, 2),)):
        with pytest.raises(ConfigError, match="orders"):
            iv.FedAvg(lr=0.1, epochs=2, batch_size=1, orders=orders)
    with pytest.raises(ConfigError, match="orders are of 2 images; expected the 3"):
        iv.FedAvg(lr=0.1, epochs=1, orders=((0, 1),)).batches(3)


PROTOCOLS = {
    "FedSGD": iv.FedSGD(),
    "one local step": iv.FedAvg(lr=0.1, local_steps=1),
    "local steps": iv.FedAvg(lr=0.1, local_steps=3),
    "minibatches of one": iv.FedAvg(lr=0.1, epochs=2, batch_size=1),
    "minibatches of two": iv.FedAvg(lr=0.1, epochs=2, batch_size=2),
    "a last smaller one left out": iv.FedAvg(lr=0.1, epochs=1, batch_size=2, drop_last=True),
    "shuffled": iv.FedAvg(lr=0.1, epochs=2, batch_size=2, shuffle=True),
    "Adam, a function": step_of("Adam", "func"),
}
ATTACKS = {
    "best": iv.best(evaluations=4),
    "inverting gradients": iv.inverting_gradients(steps=2),
    "deep leakage": iv.deep_leakage(steps=2),
    "improved deep leakage": iv.improved_deep_leakage(steps=2),
    "beyond inferring": iv.beyond_inferring(steps=2),
    "CPL": iv.client_privacy_leakage(steps=2),
    "GradInversion": iv.see_through_gradients(steps=2),
    "modern": iv.modern(steps=2),
    "two restarts": iv.inverting_gradients(steps=2, restarts=2),
    "forward": iv.ForwardMatching(steps=2),
    "fully connected": iv.fully_connected(),
    "recursive": iv.recursive_inversion(),
}


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_on_every_protocol_runs_or_is_refused_by_name(attack, protocol, training):
    refused = 0
    build = normed if training else dense if attack == "fully connected" else build_tiny
    for hidden, count in ((False, 3), (True, 2)) if training else itertools.product((False, True), (1, 3)):
        net, (x, y) = build(), random_batch(count)
        size = getattr(PROTOCOLS[protocol], "batch_size", None) or 1
        if size > count:
            continue
        seen = iv.observe(
            net, x, y, PROTOCOLS[protocol], normalization=iv.CIFAR10,
            reveal_labels=not hidden, training_mode=training,
        )  # fmt: skip
        state = torch.random.get_rng_state()
        try:
            found = ATTACKS[attack](net, seen)
        except InvlibError:
            refused += 1
        else:
            assert found.images.shape == x.shape
            assert torch.isfinite(found.images).all()
            assert found.labels is None or len(found.labels) == count
        assert torch.equal(torch.random.get_rng_state(), state)
    few = attack in ("fully connected", "recursive", "forward", "GradInversion", "modern")
    hard = protocol.startswith("Adam")  # of a batch the labels may remain unknown
    assert few or refused <= hard, (
        "only closed forms, and what needs one FedSGD step or statistics, may refuse"
    )


def dense():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
