"""Engines: the same cost and gradient whatever runs the step, and clear words where one cannot."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import invlib as iv
from invlib.autodiff import layers
from invlib.autodiff.gradients import GradientMode
from invlib.autodiff.layers import DoubleBackwardLayers
from invlib.autodiff.stacked import NotStackable
from invlib.core.network import in_mode
from invlib.errors import ConfigError, DeviceError
from invlib.optim import priors
from invlib.search.engines import graphed, selection
from invlib.search.engines.batched import stacked_parameters
from tests.conftest import build_tiny, random_batch
from tests.models.test_gradients import FAMILIES

CLIENTS = {
    "FedSGD": iv.FedSGD(),
    "FedAvg": iv.FedAvg(lr=0.05, local_steps=3, batch_size=1),
}


def see(net, n=1, client=None, side=8, **facts):
    x, y = random_batch(n, side=side, dtype=next(net.parameters()).dtype)
    return iv.observe(net, x, y, client or iv.FedSGD(), normalization=iv.CIFAR10, **facts)


def build(family):
    make, side = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval(), side


def by_transforms(problem, values, sharpness, factor):
    """The slow and obvious way: torch.func, one restart after another, with torch's own layers."""
    step = torch.func.grad_and_value(
        partial(problem.cost, prior_factor=factor), argnums=tuple(range(len(values))), has_aux=True
    )
    with iv.smoothing.rounded(sharpness):
        found = [step(*[v[r] for v in values]) for r in range(len(values[0]))]
    slopes = [torch.stack([slopes[k] for slopes, _ in found]) for k in range(len(values))]
    return (
        torch.stack([c.detach() for _, (c, _) in found]),
        torch.stack([o.detach() for _, (_, o) in found]),
        slopes,
    )


def compare(net, seen, engine, *, sharpness=None, factor=1.0, restarts=2, **settings):
    attack = iv.GradientMatching(priors=((0.1, priors.total_variation),), restarts=restarts, **settings)
    problem = attack.problem(net, seen)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    expected = by_transforms(problem, starts, sharpness, factor)
    got = selection.build(engine, problem)(starts, list(range(restarts)), sharpness, factor)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-12)
    return got


class ClippedSGD(iv.FedSGD):
    """A client as somebody would write it who clips the whole update, with no thought of restarts."""

    def __call__(self, *args, **kwargs):
        return clipped(super().__call__(*args, **kwargs))


class ClippedAvg(iv.FedAvg):
    def __call__(self, *args, **kwargs):
        return clipped(super().__call__(*args, **kwargs))


def clipped(update, most=0.01):
    norm = torch.sqrt(sum(u.square().sum() for u in update.values()))
    return {name: u * (most / norm).clamp(max=1.0) for name, u in update.items()}


@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize(
    "client", [ClippedSGD(), ClippedAvg(lr=0.1, local_steps=2)], ids=lambda c: type(c).__name__
)
def test_a_client_derived_from_ours_is_computed_by_its_own_rule(client, engine):
    net = build_tiny(torch.float64)
    seen = see(net, 2, client)
    cost, _, _ = compare(net, seen, engine, restarts=4, objective=iv.objectives.l2)
    ours = iv.GradientMatching(objective=iv.objectives.l2, restarts=4, steps=3, engine=engine)
    one_by_one = replace(ours, chunk=1)
    torch.testing.assert_close(ours(net, seen).trials, one_by_one(net, seen).trials)
    assert len(cost) == 4


@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_cost_and_gradient(family, client, engine):
    net, side = build(family)
    compare(net, see(net, 2, CLIENTS[client], side), engine)


@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize("family", ["ResNet", "LeNetZhu"])
@pytest.mark.parametrize(
    "settings",
    [
        {"labels": "optimize"},
        {"labels": "optimize_shared"},
        {"sharpness": 4.0, "factor": 0.3},
        {"coordinates": iv.NaturalImages()},
        {"objective": iv.objectives.l1},
        {"layers": iv.Layers(which="last", count=3, weights="linear")},
        {"restarts": 1},
    ],
    ids=lambda s: "-".join(s),
)
def test_every_setting_has_the_same_cost_and_gradient(family, settings, engine):
    net, side = build(family)
    compare(net, see(net, 2, side=side), engine, **settings)


@pytest.mark.parametrize("engine", ["eager", "batched"])
def test_batch_norm_that_learns_from_the_batch(engine):
    net, side = build("ResNet")
    seen = see(net, 3, side=side, training_mode=True)
    with in_mode(net, training=True):
        compare(net, seen, engine)


@pytest.mark.parametrize("client", [iv.FedAvg(lr=0.05, local_steps=4), CLIENTS["FedAvg"]], ids=str)
@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize("labels", ["auto", "optimize"])
def test_recomputed_local_steps_change_nothing(engine, client, labels):
    net, side = build("ResNet")
    compare(net, see(net, 2, client, side), engine, recompute=True, labels=labels)


@pytest.mark.parametrize("engine", ["eager", "batched"])
def test_recomputed_local_steps_have_the_kinks_of_the_walk(engine):
    net, side = build("ResNet")
    compare(net, see(net, 2, CLIENTS["FedAvg"], side), engine, recompute=True, sharpness=4.0)


class Multiplied(TorchDispatchMode):
    """Takes down in which types convolutions and matrix products multiply."""

    HEAVY = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.HEAVY:
            self.types |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("family", ["ResNet", "LeNetZhu"])
def test_bfloat16_multiplies_in_it_there_and_back(family, client, engine):
    net, side = build(family)
    net = net.float()
    seen = see(net, 2, CLIENTS[client], side)
    found = {}
    for precision in ("full", "bfloat16"):
        attack = iv.GradientMatching(restarts=2, precision=precision)
        problem = attack.problem(net, seen)
        starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
        with Multiplied() as multiplied:
            found[precision] = selection.build(engine, problem)(starts, [0, 1], None, 1.0)
        assert multiplied.types == {torch.float32 if precision == "full" else torch.bfloat16}
    cost, rough = (found[precision][0] for precision in found)
    torch.testing.assert_close(rough, cost, rtol=0.02, atol=0)
    slope, rough = (found[precision][2][0].flatten(1) for precision in found)
    assert rough.dtype is torch.float32
    assert F.cosine_similarity(slope, rough).min() > 0.95  # a kink near zero can turn


def test_scores_are_measured_in_full_precision():
    net = build_tiny()
    seen = see(net)
    attack = iv.GradientMatching(steps=2, precision="bfloat16")
    found = attack(net, seen)
    assert found.score == pytest.approx(iv.GradientMatching().score(net, seen, found.images, seen.labels))


def test_bfloat16_needs_a_client_that_it_knows():
    net = build_tiny()
    seen = replace(see(net), protocol=lambda *args, **kwargs: iv.FedSGD()(*args, **kwargs))
    with pytest.raises(ConfigError, match="precision='bfloat16' needs a client of invlib"):
        iv.GradientMatching(precision="bfloat16")(net, seen)
    with pytest.raises(ConfigError, match="precision is 'half'"):
        iv.GradientMatching(precision="half")


# The largest memory of a process only grows, so the cases come in the order of what they should take.
MEMORY = """
import re
import torch
import invlib as iv
from invlib.models.convnet import ConvNet

torch.set_num_threads(1)
net = ConvNet(width=4, image_size=32).eval()
x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
for steps, recompute in ((1, True), (20, True), (20, False)):
    seen = iv.observe(net, x, y, iv.FedAvg(lr=0.01, local_steps=steps), normalization=iv.CIFAR10)
    iv.GradientMatching(steps=1, recompute=recompute)(net, seen)
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_recomputed_local_steps_take_hardly_more_memory_than_one():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    one, many, unrolled = map(int, done.stdout.split())
    assert unrolled - one > 4 * (many - one)


def test_many_local_steps_are_recomputed_by_default():
    net = build_tiny()
    for steps, expected in ((9, False), (10, True)):
        seen = see(net, 1, iv.FedAvg(lr=0.01, local_steps=steps))
        assert iv.GradientMatching().problem(net, seen).recompute is expected
        assert iv.GradientMatching(recompute=False).problem(net, seen).recompute is False


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_has_first_and_second_derivatives(stride, groups, bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    inputs = [draw(2, 4, 5, 6), draw(6, 4 // groups, 3, 2)] + ([draw(6)] if bias else [])

    def ours(x, weight, b=None):
        with DoubleBackwardLayers(fixed=False):
            return F.conv2d(x, weight, b, stride=stride, padding=(1, 0), groups=groups)

    torch.testing.assert_close(ours(*inputs), F.conv2d(*inputs, stride=stride, padding=(1, 0), groups=groups))
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("layer", ["convolution", "columns", "pixels", "product"])
def test_a_layer_of_stacked_weights_is_one_for_each(layer, fixed, monkeypatch):
    """Two restarts of two images or more, in one batch; fixed weights are the same for both."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if layer == "convolution":
        x, weight, apart = draw(4, 4, 3, 4), draw(2, 4, 2, 3, 2), partial(F.conv2d, groups=2, padding=(1, 0))
        stacked = partial(layers.convolution, groups=2, padding=(1, 0), fixed=fixed, first=False)
    elif layer == "columns":
        # Taken for first layers, of which there is one here that is asked for the slope of its images.
        monkeypatch.setattr(layers, "_as_columns", lambda *_: True)
        x, weight, apart = draw(4, 2, 4, 5), draw(2, 3, 2, 3, 2), partial(F.conv2d, stride=2, padding=(1, 0))
        stacked = partial(layers.convolution, stride=2, padding=(1, 0), fixed=fixed, first=False)
    elif layer == "pixels":
        x, weight, apart = draw(4, 3, 3, 4), draw(2, 4, 3, 1, 1), partial(F.conv2d, stride=(2, 1))
        stacked = partial(layers.convolution, stride=(2, 1), fixed=fixed, first=False)
        monkeypatch.setattr(layers.Convolve, "out", None)
    else:
        x, weight, apart = draw(6, 4), draw(2, 5, 4), F.linear
        stacked = partial(layers.product, fixed=fixed, first=False)
    if fixed:
        weight = weight[:1].expand_as(weight)
    x, weight = x.requires_grad_(), weight.contiguous().requires_grad_()

    def by_hand(x, weight):
        return torch.cat([apart(part, w) for part, w in zip(x.chunk(2), weight, strict=True)])

    found, expected = stacked(x, weight), by_hand(x, weight)
    torch.testing.assert_close(found, expected)
    along = [draw(*expected.shape), draw(*x.shape), draw(*weight.shape)]
    results = []
    for out in (found, expected):
        first = torch.autograd.grad(out, (x, weight), along[0], create_graph=True)
        # What an attack asks for: the slope of the images, through both slopes of the layer.
        second = torch.autograd.grad(first, x, along[1:])
        results.append([*first, *second])
    torch.testing.assert_close(*results)
    if not fixed:
        assert torch.autograd.gradgradcheck(stacked, (x, weight))


def stacked_step(net, seen, **settings):
    problem = iv.GradientMatching(restarts=2, **settings).problem(net, seen)
    starts = [torch.rand(2, *problem.shape, generator=torch.Generator().manual_seed(0)).to(problem.like)]
    return problem.costs(
        starts,
        rows=[0, 1],
        prior_factor=1.0,
        params=stacked_parameters(problem, 2),
        mode=GradientMode(kind="stacked"),
    )


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_restarts_of_a_family_go_through_it_as_one_batch(family, client):
    net, side = build(family)
    stacked_step(net, see(net, 2, CLIENTS[client], side))


class Mixing(nn.Module):
    """A network that does one more thing to its features than the tiny one."""

    def __init__(self, act):
        super().__init__()
        self.body, self.act = build_tiny(torch.float64), act

    def forward(self, x):
        head = self.body[3]
        return head(self.act(self.body[:3](x), self))


STRANGE = {
    "the mean of the batch": (lambda x, _: x - x.mean(0), "Tensor.mean"),
    "the mean of everything": (lambda x, _: x - x.mean(), "Tensor.mean"),
    "a sum over the batch by name": (lambda x, _: x - torch.sum(x, dim=-2), "torch.sum"),
    "images one after another": (lambda x, _: x.reshape(-1, 96), "Tensor.reshape"),
    "images side by side": (lambda x, _: torch.cat([x, x], 0)[: len(x)], "torch.cat"),
    "images turned round": (lambda x, _: x.flip(0), "Tensor.flip"),
    "a norm of the batch": (
        lambda x, _: F.batch_norm(x[:, None], None, None, training=True)[:, 0],
        "learns from the batch",
    ),
    "a parameter by itself": (lambda x, net: x * net.body[0].bias.sum(), "Tensor.sum of a parameter"),
    "an unknown function": (lambda x, _: torch.cumsum(x, 1), "torch.cumsum"),
    "a norm of each image": (lambda x, _: F.layer_norm(x, (96,)), "layer_norm"),
    "a layer on more dimensions": (lambda x, _: x[:, None].flatten(1), None),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_could_mix_images_is_mapped_instead(case):
    act, reason = STRANGE[case]
    net = Mixing(act)
    seen = see(net, 2)
    if reason is None:
        stacked_step(net, seen)
    else:
        with pytest.raises(NotStackable, match=reason):
            stacked_step(net, seen)
    compare(net, seen, "batched")


def test_a_tensor_of_the_clients_batch_is_mapped_too():
    shift = torch.rand(2, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Mixing(lambda x, _: x + shift if len(x) > 1 else x)
    compare(net, see(net, 2), "batched")


def test_an_error_of_a_later_step_is_not_taken_for_a_network_that_mixes_images():
    broken = []

    def act(x, _):
        if broken and len(x) == 4:  # both restarts of two images in one batch
            raise RuntimeError("the device is gone")
        return x

    net = Mixing(act)
    seen = see(net, 2)
    problem = iv.GradientMatching(restarts=2).problem(net, seen)
    step = selection.build("batched", problem)
    values = [torch.rand(2, *problem.shape, dtype=torch.float64)]
    step(values, [0, 1], None, 1.0)
    broken.append(True)
    with pytest.raises(RuntimeError, match="the device is gone"):
        step(values, [0, 1], None, 1.0)


WEIGHT = torch.arange(1.0, 6, dtype=torch.float64)
LOSSES = {
    "weighted": (
        lambda out, y: F.cross_entropy(out, y, WEIGHT),
        "cross entropy",
    ),
    "summed": (lambda out, y: F.cross_entropy(out, y, reduction="sum"), "cross entropy"),
    "squared": (lambda out, y: F.cross_entropy(out, y).square(), "follows the loss"),
    "of its own": (lambda out, y: F.mse_loss(out, F.one_hot(y, 5).to(out)), "mse_loss|one_hot"),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1), None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_plain_cross_entropy_is_mapped_instead(name):
    loss, reason = LOSSES[name]
    net = build_tiny(torch.float64)
    seen = see(net, 2, loss=loss)
    if reason is None:
        stacked_step(net, seen, loss=loss)
    else:
        with pytest.raises(NotStackable, match=reason):
            stacked_step(net, seen, loss=loss)
    compare(net, seen, "batched", loss=loss)


def test_a_third_derivative_is_refused_instead_of_being_wrong():
    x, w = (torch.rand(1, 1, 3, 3, requires_grad=True) for _ in range(2))
    with DoubleBackwardLayers(fixed=False):
        y = F.conv2d(x, w).square().sum()
    first = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
    second = torch.autograd.grad(first, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_left_to_torch(padding):
    x, w = torch.rand(1, 2, 5, 5), torch.rand(3, 2, 3, 3)
    with DoubleBackwardLayers(fixed=True):
        assert torch.equal(F.conv2d(x, w, padding=padding), torch.conv2d(x, w, padding=padding))


@pytest.mark.parametrize(
    "optimizer", [iv.Adam(signed=True), iv.LBFGS(max_iter=3)], ids=lambda o: type(o).__name__
)
def test_engines_give_one_result(optimizer):
    net = build_tiny(torch.float64)
    seen = see(net)
    attack = iv.GradientMatching(optimizer=optimizer, steps=6, restarts=3, record_every=1)
    eager, batched, auto = (replace(attack, engine=e)(net, seen) for e in ("eager", "batched", "auto"))
    for other in (batched, auto):
        torch.testing.assert_close(other.trials, eager.trials, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(other.history.cost, eager.history.cost, rtol=1e-5, atol=1e-9)
    assert (eager.engine, eager.engine_reason) == ("eager", "asked for")
    together = optimizer.together
    assert auto.engine == ("batched" if together else "eager")
    assert auto.engine_reason == ("3 restarts of 653 parameters" if together else "one restart at a time")
    assert auto.chunks == ((3,) if together else (1, 1, 1))


def test_a_large_network_takes_its_restarts_in_turn(monkeypatch):
    monkeypatch.setattr(selection, "LARGE", 10)
    net = build_tiny()
    found = iv.GradientMatching(steps=1, restarts=2)(net, see(net))
    assert found.engine == "eager"
    assert found.engine_reason == "653 parameters, with which one restart keeps a CPU busy"


class Stranger:
    """A client that somebody else wrote, with nothing of invlib in it."""

    def __call__(
        self, model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None
    ):
        values = dict(model.named_parameters()) if params is None else params
        return torch.func.grad(lambda p: loss(torch.func.functional_call(model, p, (inputs,)), labels))(
            values
        )

    def mean_gradient(self, update, num_images):
        return update


class Boastful(Stranger):
    """It says that it can be stacked, but cannot be told how to compute the gradient of a stack."""

    stackable = True


@pytest.mark.parametrize("client", [Stranger(), Boastful()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("engine", ["eager", "batched"])
def test_a_client_of_ones_own_runs_too(engine, client):
    net = build_tiny(torch.float64)
    compare(net, replace(see(net), protocol=client), engine)


@pytest.mark.parametrize(
    ("engine", "settings", "error", "words"),
    [
        ("graphed", {}, DeviceError, "engine='graphed' needs a CUDA device, got cpu"),
        ("compiled", {}, ConfigError, "engine is 'compiled'; expected 'auto', 'eager'"),
        ("quick", {}, ConfigError, "engine is 'quick'; expected 'auto', 'eager'"),
    ],
)
def test_an_engine_that_cannot_run_says_so(tiny, seen, engine, settings, error, words):
    with pytest.raises(error, match=words):
        iv.GradientMatching(engine=engine, **settings)(tiny, seen)


def test_a_client_of_ones_own_is_not_captured(tiny, seen):
    with pytest.raises(ConfigError, match="FedSGD or FedAvg"):
        iv.GradientMatching(engine="graphed")(tiny, replace(seen, protocol=Stranger()))


def test_attacks_run_where_grad_mode_is_off(tiny, seen):
    attack = iv.GradientMatching(steps=3, restarts=2)
    with torch.no_grad():
        found = attack(tiny, seen)
    assert torch.equal(found.images, attack(tiny, seen).images)
    assert all(p.grad is None for p in tiny.parameters())


class Replayed:
    """A stand-in for a CUDA graph: what was captured runs again on the same memory."""

    def __init__(self, step, inside, rows, sharpness, fade):
        self.again = lambda: step(inside, rows, sharpness, fade)
        self.found = self.again()

    def replay(self):
        cost, objective, slopes = self.again()
        for old, new in zip([*self.found[:2], *self.found[2]], [cost, objective, *slopes], strict=True):
            old.copy_(new)


def test_a_replayed_step_takes_the_values_and_the_fading_of_its_call(monkeypatch):
    net, side = build("ResNet")
    seen = see(net, 1, side=side)
    attack = iv.GradientMatching(restarts=2, priors=((0.1, priors.total_variation),))
    problem = attack.problem(net, seen)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    step = selection.build("batched", problem)
    captures = []

    def capture(step, values, rows, sharpness):
        inside, factor = [v.clone() for v in values], values[0].new_ones(())
        graph = Replayed(step, inside, rows, sharpness, factor)
        captures.append(rows)
        return graphed.Captured(graph=graph, values=inside, prior_factor=factor, results=graph.found)

    monkeypatch.setattr(graphed, "capture", capture)
    replayed = graphed.GraphedStep(step)
    results = []
    for scale, fade in ((1.0, 1.0), (1.1, 0.3)):
        values = [s * scale for s in starts]
        results.append(replayed(values, [0, 1], None, fade))
        torch.testing.assert_close(results[-1], step(values, [0, 1], None, fade))
    assert not torch.equal(results[0][0], results[1][0])  # nor did the second replay write to the first
    assert captures == [[0, 1]]
    replayed([s[:1] for s in starts], [0], None, 1.0)
    assert captures == [[0, 1], [0]]


def test_where_capture_fails_the_step_runs_uncaptured_and_says_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphed, "capture", fail)
    step = graphed.GraphedStep(lambda values, rows, sharpness, fade: "as it is")
    assert step([torch.zeros(1)], [0], None, 1.0) == "as it is"
    assert step.fallback == "operation not permitted when stream is capturing"


@pytest.mark.gpu
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("family", ["ConvNet", "ResNet", "LeNetZhu"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_a_captured_step_is_the_step(family, client, restarts):
    net, side = build(family)
    seen = see(net, 2, CLIENTS[client], side)
    attack = iv.GradientMatching(steps=6, restarts=restarts, record_every=1)
    expected = replace(attack, engine="eager")(net, seen)
    found = attack(net.cuda(), seen)
    assert found.engine == "graphed"
    torch.testing.assert_close(found.trials.cpu(), expected.trials, rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_runs_uncaptured():
    class Waiting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build_tiny()

        def forward(self, x):
            logits = self.inner(x)
            float(self.inner[0].weight.detach().sum())  # a look at the device, which a capture forbids
            return logits

    net = Waiting()
    seen = see(net)
    found = iv.GradientMatching(steps=3)(net.cuda(), seen)
    assert found.engine == "batched"
    assert found.engine_reason.startswith("steps cannot be captured: ")
    assert found.status == "max_steps"
