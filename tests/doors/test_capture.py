"""Updates, models and labels as other libraries hand them over: right, or refused by name."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import DoubtWarning, InvlibError, ObservationError
from tests.conftest import build_tiny, random_batch

SHAPE = {"image_shape": (3, 8, 8), "normalization": iv.CIFAR10}
AVERAGE = iv.FedAvg(lr=0.1, local_steps=2)


def normed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, stride=2)
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))


def trained(net, x, y, *, lr=0.1, steps=2):
    """Return the client's network after plain torch's own training loop, in training mode."""
    client = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(client.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(client(iv.CIFAR10.encode(x)), y).backward()
        optimizer.step()
    return client


def gradient(net, x, y, loss=F.cross_entropy):
    return torch.autograd.grad(loss(net(iv.CIFAR10.encode(x)), y), list(net.parameters()))


def score(net, seen, x, y):
    return iv.GradientMatching().score(net, seen, x, y)


def arrays_of(net):
    return [value.numpy() for value in net.state_dict().values()]


NAMES = list(normed().state_dict())
ROUNDS = {
    "dicts of arrays": lambda a, b, n, **f: iv.from_state_dicts(
        n, dict(zip(NAMES, a, strict=True)), dict(zip(NAMES, b, strict=True)), **f
    ),
    "lists of arrays": lambda a, b, n, **f: iv.from_state_dicts(n, a, b, **f),
    "differences of lists": lambda a, b, n, **f: iv.from_gradients(
        n, [q - p for p, q in zip(a, b, strict=True)], **f
    ),
    "named differences": lambda a, b, n, **f: iv.from_arrays(
        n, {m: q - p for m, p, q in zip(NAMES, a, b, strict=True)}, **f
    ),
    "under a prefix": lambda a, b, n, **f: iv.from_state_dicts(
        n,
        {f"module._orig_mod.{m}": p for m, p in zip(NAMES, a, strict=True)},
        {f"module._orig_mod.{m}": q for m, q in zip(NAMES, b, strict=True)},
        **f,
    ),
}


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
@pytest.mark.parametrize("way", ROUNDS)
def test_a_round_as_a_server_has_it_scores_zero_at_the_truth(way):
    net, (x, y) = normed(), random_batch(2)
    client = trained(net, x, y)
    facts = {"protocol": AVERAGE, "num_images": 2, "labels": y, "training_mode": True, **SHAPE}
    seen = ROUNDS[way](arrays_of(net), arrays_of(client), net, **facts)
    assert score(net, seen, x, y) < 1e-5
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(seen.buffers[name], client.state_dict()[name])


def test_a_prefix_is_said():
    net, (x, y) = build_tiny(), random_batch()
    update = {
        f"_module.{n}": g for (n, _), g in zip(net.named_parameters(), gradient(net, x, y), strict=True)
    }
    with pytest.warns(DoubtWarning, match="'_module.'.*taken off"):
        seen = iv.from_arrays(net, update, num_images=1, labels=y, **SHAPE)
    with pytest.warns(DoubtWarning, match="'_module.'"):
        found = iv.inverting_gradients(steps=1)(net, seen)
    assert any("_module." in doubt for doubt in found.warnings)


def test_state_dicts_that_are_lists_of_another_length_are_refused():
    net = normed()
    with pytest.raises(ObservationError, match="before has 6 tensors; expected 9, one for each entry of the"):
        iv.from_state_dicts(net, arrays_of(net)[:6], arrays_of(net), protocol=AVERAGE, num_images=1, **SHAPE)


TYPES = {
    "NumPy, float64": lambda g: g.double().numpy(),
    "half": lambda g: g.half(),
    "bfloat16": lambda g: g.bfloat16(),
    "sparse": lambda g: g.to_sparse(),
    "nested lists": lambda g: g.tolist(),
    "with a graph": lambda g: g.clone().requires_grad_(),
    "whole numbers": lambda g: (g * 2**24).round().int(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_of_every_type(kind):
    net, (x, y) = build_tiny(), random_batch()
    seen = iv.from_gradients(
        net, [TYPES[kind](g) for g in gradient(net, x, y)], num_images=1, labels=y, **SHAPE
    )
    assert score(net, seen, x, y) < 1e-4
    assert torch.isfinite(iv.inverting_gradients(steps=1)(net, seen).images).all()


def test_tensors_made_in_inference_mode():
    net, (x, y) = build_tiny(), random_batch()
    parts = gradient(net, x, y)
    with torch.inference_mode():
        seen = iv.from_gradients(net, [g + 0 for g in parts], num_images=1, labels=y + 0, **SHAPE)
        again = iv.observe(net, x + 0, y + 0, iv.FedSGD(), normalization=iv.CIFAR10)
        found = iv.inverting_gradients(steps=2)(net, seen)
        assert score(net, seen, x + 0, y + 0) < 1e-5
    assert found.status == "max_steps"
    torch.testing.assert_close(again.update, seen.update)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: g.to(torch.complex64), "update.*complex numbers"),
        (lambda g: "text", "is a str; expected a tensor or a NumPy array"),
        (lambda g: object(), "is a object; expected"),
        (lambda g: [[1.0], [2.0, 3.0]], "cannot be read as an array"),
        (lambda g: g.to("meta"), "on the meta device"),
        (lambda g: g[None], "has shape"),
    ],
)
def test_what_is_no_update_is_refused(wrong, message):
    net, (x, y) = build_tiny(), random_batch()
    with pytest.raises(ObservationError, match=message):
        iv.from_gradients(net, [wrong(g) for g in gradient(net, x, y)], num_images=1, **SHAPE)


def test_a_parameter_that_the_loss_does_not_reach():
    net, (x, y) = build_tiny(), random_batch()
    net.extra = nn.Linear(2, 2)
    net.forward = lambda inputs: net[3](net[2](net[1](net[0](inputs))))
    F.cross_entropy(net(iv.CIFAR10.encode(x)), y).backward()
    sent = [p.grad for p in net.parameters()]
    assert sent[-1] is None
    seen = iv.from_gradients(net, sent, num_images=1, labels=y, **SHAPE)
    assert score(net, seen, x, y) < 1e-5
    with pytest.raises(ObservationError, match="no numbers at all"):
        iv.from_gradients(net, [None] * len(sent), num_images=1, **SHAPE)


LABELS = {
    "list": [3, 1],
    "NumPy int32": np.array([3, 1], dtype=np.int32),
    "uint8": torch.tensor([3, 1], dtype=torch.uint8),
    "a column": torch.tensor([[3], [1]]),
    "one-hot": F.one_hot(torch.tensor([3, 1]), 5),
    "one-hot floats": F.one_hot(torch.tensor([3, 1]), 5).float().tolist(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type(kind):
    net, (x, _) = build_tiny(), random_batch(2)
    y = torch.tensor([3, 1])
    for seen in (
        iv.from_gradients(net, gradient(net, x, y), num_images=2, labels=LABELS[kind], **SHAPE),
        iv.observe(net, x, LABELS[kind], iv.FedSGD(), normalization=iv.CIFAR10),
    ):
        assert seen.labels.dtype == torch.int64
        assert seen.labels.tolist() == [3, 1]
        assert score(net, seen, x, LABELS[kind] if kind != "one-hot" else y) < 1e-5


def test_images_as_bytes_or_arrays_and_in_the_type_of_the_model():
    x, y = random_batch()
    whole = (x * 255).round().to(torch.uint8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net = build_tiny(dtype)
        expected = iv.observe(net, (whole / 255).to(dtype), y, iv.FedSGD(), normalization=iv.CIFAR10)
        for given in (whole, whole.numpy()):
            seen = iv.observe(net, given, y, iv.FedSGD(), normalization=iv.CIFAR10)
            torch.testing.assert_close(seen.update, expected.update)
            assert seen.update["0.weight"].dtype == dtype
        assert torch.isfinite(iv.inverting_gradients(steps=1)(net, seen).images).all()


def test_a_normalization_and_a_shape_as_plain_tuples():
    net, (x, y) = build_tiny(), random_batch()
    pair = (list(iv.CIFAR10.mean), iv.CIFAR10.std)
    seen = iv.from_gradients(
        net, gradient(net, x, y), num_images=1, image_shape=[3, 8, 8], normalization=pair, labels=y
    )
    assert (seen.normalization, seen.image_shape) == (iv.CIFAR10, (3, 8, 8))
    for shape in ((8, 8), (3, 8.5, 8), 8, (3, 0, 8), (3, 10**6, 10**6)):
        with pytest.raises(ObservationError, match="image_shape"):
            iv.from_gradients(
                net, gradient(net, x, y), num_images=1, image_shape=shape, normalization=pair, labels=y
            )
    for wrong in (None, "CIFAR10", ((0.5,), (0.5,), (0.5,)), 3, ((1, 2), (1, 2))):
        with pytest.raises(InvlibError, match="normalization"):
            iv.from_gradients(
                net, gradient(net, x, y), num_images=1, image_shape=(3, 8, 8), normalization=wrong
            )


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = build_tiny(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


OUTPUTS = {
    "tuple": lambda logits: (logits, None),
    "list": lambda logits: [logits],
    "dict": lambda logits: OrderedDict(loss=None, logits=logits),
    "dict of one": lambda logits: {"scores": logits},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_inside_of_what_the_model_gives(kind):
    net, (x, y) = Wrapped(OUTPUTS[kind]), random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    plain = iv.observe(net.net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    assert all(torch.equal(seen.update[f"net.{n}"], value) for n, value in plain.update.items())
    assert iv.inverting_gradients(steps=2, restarts=2)(net, seen).status == "max_steps"


@pytest.mark.parametrize("wrap", [lambda _: None, lambda _: {}, lambda _: "text", lambda x: {"a": x, "b": x}])
def test_a_model_that_gives_no_logits_is_refused(wrap):
    x, y = random_batch()
    with pytest.raises(ObservationError, match="the model gives a"):
        iv.observe(Wrapped(wrap), x, y, iv.FedSGD(), normalization=iv.CIFAR10)


def hooked():
    net = build_tiny()
    net[3].register_full_backward_hook(lambda module, given, back: None)
    return net


WRAPPERS = {
    "DataParallel": lambda: nn.DataParallel(build_tiny()),
    "compiled": lambda: torch.compile(build_tiny()),
    "a part compiled": lambda: nn.Sequential(torch.compile(build_tiny()), nn.Identity()),
    "backward hook": hooked,
    "forward hook": lambda: _with_forward_hook(build_tiny()),
}


def _with_forward_hook(net):
    net[1].register_forward_hook(lambda module, given, output: None)
    return net


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_models_give_what_is_inside(kind):
    net, (x, y) = WRAPPERS[kind](), random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    plain = iv.observe(build_tiny(), x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    for value, expected in zip(seen.update.values(), plain.update.values(), strict=True):
        torch.testing.assert_close(value, expected)
    assert iv.inverting_gradients(steps=2)(net, seen).status == "max_steps"


def test_hooks_that_are_not_run_are_said_and_stay():
    net, (x, y) = hooked(), random_batch()
    with pytest.warns(DoubtWarning, match="'3' has hooks on its backward pass"):
        iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    assert len(net[3]._backward_hooks) == 1


MODELS = {
    "traced": (lambda: torch.jit.trace(build_tiny(), torch.zeros(1, 3, 8, 8)), "scripted or traced"),
    "scripted": (lambda: torch.jit.script(build_tiny()), "scripted or traced"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), "is lazy"),
    "meta": (lambda: build_tiny().to("meta"), "on the meta device"),
    "a class": (lambda: nn.Identity, "is the class Identity"),
    "a function": (lambda: torch.relu, "expected an instance of torch.nn.Module"),
    "frozen": (lambda: build_tiny().requires_grad_(False), "0 trainable parameters"),
    "a map": (lambda: nn.Conv2d(3, 5, 3), r"expected logits \(N, classes\)"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_run_are_named(kind, seen):
    build, message = MODELS[kind]
    net, (x, y) = build(), random_batch()
    with pytest.raises(ObservationError, match=message):
        iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(ObservationError, match=message):
        iv.inverting_gradients(steps=1)(net, seen)


def test_parts_of_an_update_count_alone():
    net, (x, y) = build_tiny(), random_batch()
    full = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    facts = {"num_images": 1, "labels": y, **SHAPE}
    sizes = torch.cat([u.abs().flatten() for u in full.update.values()])
    least = sizes.topk(len(sizes) // 3).values[-1]
    largest = {n: torch.where(u.abs() >= least, u, 0.0) for n, u in full.update.items()}
    last = {n: u for n, u in full.update.items() if n.startswith("3.")}
    scattered = {
        n: torch.rand(u.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        for n, u in full.update.items()
    }
    with pytest.warns(DoubtWarning, match="zeros are taken as not sent"):
        detected = iv.from_arrays(net, largest, **facts)
    for seen in (
        detected,
        iv.from_arrays(net, largest, sent="nonzero", **facts),
        iv.from_arrays(net, last, sent="given", **facts),
        iv.from_gradients(net, [None, None, *last.values()], sent="given", **facts),
        iv.from_arrays(net, full.update, sent=scattered, **facts),
    ):
        assert score(net, seen, x, y) < 1e-5
        assert "not sent" in repr(seen)
        for attack in (iv.best(evaluations=8), iv.inverting_gradients(steps=2, restarts=2)):
            found = attack(net, seen)
            assert found.status != "closed_form"
    assert score(net, iv.from_arrays(net, largest, sent="all", **facts), x, y) > 1e-3
    with pytest.raises(ObservationError, match="sent is 'some'"):
        iv.from_arrays(net, last, sent="some", **facts)
    with pytest.raises(ObservationError, match=r"update lacks.*sent='given'"):
        iv.from_arrays(net, last, **facts)


def test_parts_of_a_weight_difference_are_compared_after_all_layers_trained():
    net, (x, y) = build_tiny(), random_batch(2)
    y = torch.arange(2)
    client = trained(net, x, y, lr=1.0, steps=3)
    last = {n: p.detach() - q for (n, p), q in zip(client.named_parameters(), net.parameters(), strict=True)}
    last = {n: u.detach() for n, u in last.items() if n.startswith("3.")}
    seen = iv.from_arrays(
        net, last, sent="given", num_images=2, labels=y, protocol=iv.FedAvg(lr=1.0, local_steps=3), **SHAPE
    )
    assert score(net, seen, x, y) < 1e-5
    frozen = copy.deepcopy(net)
    frozen[0].requires_grad_(False)
    alone = iv.from_arrays(frozen, last, num_images=2, labels=y, protocol=seen.protocol, **SHAPE)
    assert score(frozen, alone, x, y) > 1e-2, "the layers that were not sent trained, too"


def test_a_gradient_with_dead_units_is_not_taken_for_compressed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5))
        with torch.no_grad():
            net[1].bias[16:] = -10
    x, y = random_batch()
    seen = iv.from_gradients(net, gradient(net, x, y), num_images=1, labels=y, **SHAPE)
    assert not seen.sent


def test_an_observation_prints_a_line(seen):
    assert len(repr(seen)) < 200
    assert "653 numbers in 4 tensors" in repr(seen)
