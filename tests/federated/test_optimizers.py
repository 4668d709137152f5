"""Clients with momentum, Adam, clipping, schedules and a proximal term: the real loop of torch."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import invlib as iv
from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.errors import ConfigError, DoubtWarning, RecoveryError
from tests.conftest import build_tiny, random_batch

DOUBLE = build_tiny(torch.float64)
X, Y = random_batch(4, dtype=torch.float64)


def trained(optimizer_of, rows, *, clip=None, proximal=0.0, scheduler_of=None, net=DOUBLE):
    """Return the weight difference after a loop as anyone writes it."""
    client = copy.deepcopy(net)
    optimizer = optimizer_of(client.parameters())
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    for some in rows:
        optimizer.zero_grad()
        loss = F.cross_entropy(client(X[some]), Y[some])
        if proximal:
            pairs = zip(client.parameters(), net.parameters(), strict=True)
            loss = loss + proximal / 2 * sum((p - p0.detach()).square().sum() for p, p0 in pairs)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(client.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    before, after = dict(net.named_parameters()), dict(client.named_parameters())
    return {name: (after[name] - p).detach() for name, p in before.items()}


def same(update, expected, *, rtol=1e-9, atol=1e-12):
    assert update.keys() == expected.keys()
    for name, value in update.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)


ALL = [[0, 1, 2, 3]]
# Clients, and the optimisers that they stand for.
CLIENTS = {
    "momentum": ({"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
    "nesterov": ({"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}, torch.optim.SGD),
    "dampening": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}, torch.optim.SGD),
    "decay": ({"lr": 0.1, "weight_decay": 0.2}, torch.optim.SGD),
    "adam": ({"lr": 0.01}, torch.optim.Adam),
    "adam with decay": ({"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}, torch.optim.Adam),
    "adamw": ({"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}, torch.optim.AdamW),
}


def client_of(name, **more):
    arguments, kind = CLIENTS[name]
    optimizer = {} if kind is torch.optim.SGD else {"optimizer": kind.__name__.lower()}
    return iv.FedAvg(**arguments, **optimizer, **more)


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(
    ("batches", "rows"),
    [({"local_steps": 5}, ALL * 5), ({"epochs": 2, "batch_size": 3}, [[0, 1, 2], [3]] * 2)],
    ids=["whole", "minibatches"],
)
def test_a_client_is_the_loop_of_torch(name, batches, rows):
    arguments, kind = CLIENTS[name]
    same(client_of(name, **batches)(DOUBLE, X, Y), trained(lambda p: kind(p, **arguments), rows))


@given(
    steps=st.integers(1, 6),
    lr=st.floats(1e-4, 0.5),
    momentum=st.floats(0, 1.2),
    dampening=st.floats(0, 1),
    nesterov=st.booleans(),
    weight_decay=st.floats(0, 0.5),
    clip=st.none() | st.floats(0.01, 2),
    proximal=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_sgd_of_any_settings_is_that_of_torch(
    steps, lr, momentum, dampening, nesterov, weight_decay, clip, proximal
):
    nesterov = nesterov and momentum > 0
    own = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    own["dampening"] = 0.0 if nesterov else dampening
    client = iv.FedAvg(**own, local_steps=steps, clip_norm=clip, proximal=proximal)
    expected = trained(lambda p: torch.optim.SGD(p, **own), ALL * steps, clip=clip, proximal=proximal)
    same(client(DOUBLE, X, Y), expected, rtol=1e-8, atol=1e-10)


@given(
    steps=st.integers(1, 6),
    kind=st.sampled_from([torch.optim.Adam, torch.optim.AdamW]),
    lr=st.floats(1e-4, 0.1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.1, 0.9999)),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=st.floats(0, 0.5),
    clip=st.none() | st.floats(0.01, 2),
    proximal=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_adam_of_any_settings_is_that_of_torch(steps, kind, lr, betas, eps, weight_decay, clip, proximal):
    own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    client = iv.FedAvg(
        **own, optimizer=kind.__name__.lower(), local_steps=steps, clip_norm=clip, proximal=proximal
    )
    expected = trained(lambda p: kind(p, **own), ALL * steps, clip=clip, proximal=proximal)
    same(client(DOUBLE, X, Y), expected, rtol=1e-6, atol=1e-8)  # the root of small numbers


def test_a_schedule_of_rates_is_that_of_lambdalr():
    factors = [1.0, 0.5, 0.0, 2.0]
    expected = trained(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        ALL * 4,
        scheduler_of=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: factors[min(k, 3)]),
    )
    client = iv.FedAvg(lr=tuple(0.1 * f for f in factors), momentum=0.9, local_steps=4)
    same(client(DOUBLE, X, Y), expected)
    same(replace(client, lr=(*client.lr, 7.0))(DOUBLE, X, Y), expected)


def test_a_clipped_gradient_of_zero_stays_zero():
    images = X.clone().requires_grad_()
    update = iv.FedAvg(lr=0.1, local_steps=2, clip_norm=0.5)(DOUBLE, images, Y, loss=lambda z, y: 0 * z.sum())
    slopes = torch.autograd.grad(sum(u.square().sum() for u in update.values()), images)
    assert not any(u.any() for u in update.values())
    assert torch.isfinite(slopes[0]).all()


SOME = ["nesterov", "dampening", "adam with decay", "adamw"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.3, "proximal": 0.5}], ids=["", "clipped"])
def test_the_steps_are_differentiable_in_the_images(name, more):
    client = client_of(name, local_steps=2, **more)

    def first_bias(inputs):
        return client(DOUBLE, inputs, Y[:1])["0.bias"]

    assert torch.autograd.gradcheck(first_bias, (X[:1].clone().requires_grad_(),), eps=1e-7)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.3, "proximal": 0.5}], ids=["", "clipped"])
@pytest.mark.parametrize(
    "mode",
    [
        GradientMode(kind="tape"),
        GradientMode(kind="tape", recompute=True),
        GradientMode(kind="mapped"),
        GradientMode(kind="stacked"),
        GradientMode(kind="stacked", recompute=True),
    ],
    ids=lambda mode: mode.kind + " again" * mode.recompute,
)
def test_every_way_to_a_gradient_gives_the_same_update_and_slope(name, more, mode):
    client = replace(client_of(name, epochs=2, batch_size=1, **more), lr=(0.05, 0.02, 0.01, 0.03))
    alone = [X[:2].clone(), X[2:].clone()]
    own = {n: p.detach().requires_grad_() for n, p in DOUBLE.named_parameters()}

    def cost(update):
        return sum((k + 1) * u.square().sum() + u.sum() for k, u in enumerate(update.values()))

    expected = []
    for images in alone:
        images.requires_grad_()
        update = client(DOUBLE, images, Y[:2], params=own, mode=PLAIN)
        expected.append((update, torch.autograd.grad(cost(update), images)[0]))
    if mode.kind == "tape":
        images = X[:2].clone().requires_grad_()
        update = client(DOUBLE, images, Y[:2], params=own, mode=mode)
        same(update, expected[0][0])
        torch.testing.assert_close(torch.autograd.grad(cost(update), images)[0], expected[0][1])
        return
    images = torch.stack(alone, 1).detach().requires_grad_()
    stacks = {n: p.detach().expand(2, *p.shape).clone().requires_grad_() for n, p in own.items()}
    update = client(DOUBLE, images, Y[:2, None].expand(2, 2), params=stacks, mode=mode)
    slopes = torch.autograd.grad(cost(update), images)[0]
    for k, (one, slope) in enumerate(expected):
        same({n: u[k] for n, u in update.items()}, one)
        torch.testing.assert_close(slopes[:, k], slope)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_every_engine_takes_the_same_steps_through_them(name):
    net, (x, y) = build_tiny(torch.float64), random_batch(dtype=torch.float64)
    seen = iv.observe(net, x, y, client_of(name, local_steps=5), normalization=iv.CIFAR10)
    ways = {
        "eager": {},
        "batched": {},
        "eager again": {"recompute": True},
        "batched again": {"recompute": True},
    }
    attacks = {
        way: iv.inverting_gradients(steps=5, restarts=2, engine=way.split()[0], **more)
        for way, more in ways.items()
    }
    found = {way: attack(net, seen) for way, attack in attacks.items()}
    first = found["eager"]
    assert attacks["eager"].score(net, seen, x, y) < 1e-12
    assert first.score < first.history.objective[0].min()
    for way, one in found.items():
        assert one.engine == way.split()[0]
        torch.testing.assert_close(one.trial_scores, first.trial_scores, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_the_strongest_attack_runs_through_them(name):
    net, (x, y) = build_tiny(), random_batch()
    seen = iv.observe(net, x, y, client_of(name, local_steps=5), normalization=iv.CIFAR10)
    found = iv.best(evaluations=60)(net, seen)
    assert torch.isfinite(found.images).all()
    assert found.score < 0.1


def test_adam_has_a_finite_slope_where_a_gradient_is_zero():
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
    )
    with torch.no_grad():
        net[1].bias.fill_(-100)  # no unit is active: their gradients are zero
    images, y = random_batch()
    images.requires_grad_()
    update = iv.FedAvg(lr=0.01, local_steps=3, optimizer="adam")(net, images, y)
    assert not update["1.weight"].any()
    assert torch.isfinite(torch.autograd.grad(sum(u.sum() for u in update.values()), images)[0]).all()


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_read_off_its_optimizer_and_loader(name):
    arguments, kind = CLIENTS[name]
    net = copy.deepcopy(DOUBLE)
    optimizer = kind(net.parameters(), **arguments)
    assert iv.FedAvg.from_optimizer(optimizer, local_steps=3) == client_of(name, local_steps=3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True, shuffle=True)
    expected = client_of(name, epochs=2, batch_size=3, drop_last=True, shuffle=True, clip_norm=1.0)
    assert iv.FedAvg.from_optimizer(optimizer, loader, epochs=2, clip_norm=1.0) == expected


def test_a_schedule_is_read_off_its_scheduler_which_stays_as_it_is():
    optimizer = torch.optim.SGD(copy.deepcopy(DOUBLE).parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    read = iv.FedAvg.from_optimizer(optimizer, scheduler=scheduler, local_steps=5)
    assert read.lr == (0.4, 0.4, 0.2, 0.2, 0.1)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    read = iv.FedAvg.from_optimizer(optimizer, loader, scheduler=scheduler, per_epoch=True, epochs=3)
    assert read.lr == (0.4, 0.4, 0.4, 0.4, 0.2, 0.2)
    read = iv.FedAvg.from_optimizer(optimizer, loader, scheduler=scheduler, epochs=2)
    assert read.lr == (0.4, 0.4, 0.2, 0.2)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0, 0.4)


def test_adam_with_decoupled_decay_is_adamw():
    optimizer = torch.optim.Adam(DOUBLE.parameters(), lr=0.1, weight_decay=0.2, decoupled_weight_decay=True)
    assert iv.FedAvg.from_optimizer(optimizer, local_steps=1).optimizer == "adamw"


def _groups():
    first, *rest = copy.deepcopy(DOUBLE).parameters()
    return [{"params": [first], "lr": 0.3}, {"params": rest}]


def _loader(**settings):
    return DataLoader(TensorDataset(X, Y), **settings)


@pytest.mark.parametrize(
    ("optimizer", "loader", "given", "message"),
    [
        (torch.optim.RMSprop(DOUBLE.parameters()), None, {}, "optimizer is RMSprop; expected"),
        (torch.optim.Adam(DOUBLE.parameters(), amsgrad=True), None, {}, "amsgrad=True"),
        (torch.optim.SGD(DOUBLE.parameters(), maximize=True), None, {}, "maximize=True"),
        (torch.optim.SGD(_groups(), lr=0.1), None, {}, "lr=0.3 and lr=0.1"),
        (None, _loader(sampler=WeightedRandomSampler([1.0] * 4, 4)), {}, "draws by WeightedRandomSampler"),
        (None, _loader(batch_size=5, drop_last=True), {}, "expected one that has batches"),
        (None, None, {"momentum": 0.5}, "momentum is given as 0.5"),
        (None, None, {"patience": 5}, "unexpected keyword argument 'patience'"),
    ],
)
def test_what_a_client_does_not_have_is_refused_by_name(optimizer, loader, given, message):
    optimizer = optimizer or torch.optim.SGD(DOUBLE.parameters(), lr=0.1)
    with pytest.raises((ConfigError, TypeError), match=message):
        iv.FedAvg.from_optimizer(optimizer, loader, epochs=1, **given)


def test_an_optimizer_that_has_taken_steps_is_doubted():
    net = copy.deepcopy(DOUBLE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(net(X), Y).backward()
    optimizer.step()
    with pytest.warns(DoubtWarning, match="has taken steps"):
        iv.FedAvg.from_optimizer(optimizer, local_steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": -0.1}, "momentum is -0.1; expected a number from 0 on"),
        ({"nesterov": True}, "nesterov is True with momentum=0.0"),
        ({"eps": 1e-3}, "eps is 0.001 and optimizer is 'sgd'"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum is 0.5 and optimizer is 'adam'"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, "betas is"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; expected 'sgd', 'adam' or 'adamw'"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"lr": ()}, r"lr is \(\)"),
        ({"lr": (0.1, -1.0)}, "lr is"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        iv.FedAvg(**({"lr": 0.1, "local_steps": 2} | arguments))


def test_missing_rates_are_named():
    with pytest.raises(ConfigError, match="lr has 2 rates; expected one for each of 3 steps"):
        iv.FedAvg(lr=(0.1, 0.1), local_steps=3)(DOUBLE, X, Y)


def test_a_client_prints_what_is_not_as_usual():
    client = iv.FedAvg(lr=0.1, local_steps=2, momentum=0.9)
    assert str(client) == "FedAvg(lr=0.1, local_steps=2, momentum=0.9)"
    assert pickle.loads(pickle.dumps(client)) == client


LINEAR = [
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.4, "proximal": 0.5},
    {"lr": (1e-6, 3e-6, 0.0, 2e-6)},
    {"weight_decay": 0.5},
]


@pytest.mark.parametrize("more", LINEAR, ids=str)
def test_the_mean_gradient_is_the_gradient_where_the_weights_hardly_move(more):
    client = iv.FedAvg(**({"lr": 1e-6, "local_steps": 4} | more))
    gradient, update = iv.FedSGD()(DOUBLE, X, Y), client(DOUBLE, X, Y)
    for name, p in DOUBLE.named_parameters():
        expected = gradient[name] + more.get("weight_decay", 0) * p.detach()
        torch.testing.assert_close(client.mean_gradient(update[name], 4), expected, rtol=1e-3, atol=1e-5)


def test_weight_decay_is_taken_off_where_the_model_is_told():
    client = iv.FedAvg(lr=(0.1, 0.3), local_steps=2, momentum=0.5, weight_decay=0.2)
    seen = iv.observe(DOUBLE, X, Y, replace(client, lr=(1e-7, 3e-7)), normalization=iv.CIFAR10)
    gradient = iv.FedSGD()(DOUBLE, iv.CIFAR10.encode(X), Y)["3.weight"]
    torch.testing.assert_close(seen.mean_gradient("3.weight", DOUBLE), gradient, rtol=1e-4, atol=1e-6)
    with pytest.warns(DoubtWarning, match="weight decay of 0.2 is read as a part of its gradient"):
        assert (seen.mean_gradient("3.weight") - gradient).norm() > 0.1 * gradient.norm()
    silent = iv.observe(DOUBLE, X, Y, client, normalization=iv.CIFAR10, loss=lambda z, y: 0 * z.sum())
    assert silent.mean_gradient("3.weight", DOUBLE).abs().max() < 1e-12


def test_the_update_of_adam_is_no_mean_gradient():
    client = iv.FedAvg(lr=0.1, local_steps=2, optimizer="adam")
    assert not hasattr(client, "mean_gradient")
    seen = iv.observe(DOUBLE, X, Y, client, normalization=iv.CIFAR10)
    with pytest.raises(RecoveryError, match=r"optimizer='adam'.*has no method mean_gradient"):
        seen.mean_gradient("0.weight")


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("label", range(5))
def test_the_hidden_label_of_one_image_is_read_off(name, label):
    net, (x, _) = build_tiny(), random_batch(seed=label)
    client, y = client_of(name, local_steps=3), torch.tensor([label])
    seen = iv.observe(net, x, y, client, normalization=iv.CIFAR10, reveal_labels=False)
    assert iv.labels.infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize(
    "more",
    [{"momentum": 0.9}, {"clip_norm": 0.1, "proximal": 1.0}, {"momentum": 0.5, "weight_decay": 0.1}],
    ids=str,
)
def test_one_image_of_a_first_layer_is_exact(more):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
    )
    (x, y), net = random_batch(dtype=torch.float64), net.double()
    client = iv.FedAvg(lr=(0.1, 0.05, 0.2), local_steps=3, **more)
    found = iv.fully_connected()(net, iv.observe(net, x, y, client, normalization=iv.CIFAR10))
    assert float(iv.metrics.psnr(found.images, x)) > 100
    adam = iv.observe(net, x, y, client_of("adam", local_steps=3), normalization=iv.CIFAR10)
    for attack in (iv.fully_connected(), iv.recursive_inversion(), iv.exact_batch()):
        with pytest.raises(RecoveryError, match=r"optimizer='adam'\) is no sum of gradients"):
            attack(net, adam)
    with pytest.raises(RecoveryError, match="expected a client of SGD"):
        iv.analytic.layer_input_of(net, adam, "1")


def dropping():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = torch.nn.Linear(192, 16), torch.nn.Sigmoid(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 5)
        return torch.nn.Sequential(torch.nn.Flatten(), *parts).double()


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_of_a_known_seed_is_that_of_the_loop(recompute):
    net = dropping()
    client = iv.FedAvg(lr=0.1, local_steps=4, momentum=0.9, dropout=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ALL * 4, net=net.train())
    before = torch.get_rng_state()
    own = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
    images = X.clone().requires_grad_()
    update = client(net, images, Y, params=own, mode=GradientMode(kind="tape", recompute=recompute))
    same(update, expected)
    [slope] = torch.autograd.grad(sum(u.square().sum() for u in update.values()), images)
    assert torch.equal(torch.get_rng_state(), before)
    once_more = client(net, images, Y, params=own)
    same(once_more, expected)
    [other] = torch.autograd.grad(sum(u.square().sum() for u in once_more.values()), images)
    torch.testing.assert_close(slope, other)


def test_an_attack_draws_the_masks_of_a_known_seed_or_takes_their_mean():
    net, (x, y) = dropping(), random_batch(dtype=torch.float64)
    client = iv.FedAvg(lr=0.1, local_steps=3, dropout=5)
    seen = iv.observe(net, x, y, client, normalization=iv.CIFAR10, training_mode=True)
    for engine in ("eager", "batched"):
        attack = iv.inverting_gradients(steps=2, restarts=2, engine=engine)
        found = attack(net, seen)
        assert attack.score(net, seen, x, y) < 1e-12
        assert attack.score(net, seen, found.images, y) == pytest.approx(found.score)
        assert not any("random" in warning for warning in found.warnings)
    mean = replace(seen, protocol=replace(client, dropout="expected"))
    scores = [iv.GradientMatching().score(net, mean, x, y) for _ in range(2)]
    assert scores[0] == scores[1] > 1e-6
    steady = replace(client, dropout="expected")(net.train(), X, Y)
    same(steady, replace(client, dropout="drawn")(net.eval(), X, Y))
    assert net.train()[3].training
