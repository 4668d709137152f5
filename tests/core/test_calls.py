"""What a network does with an image is read off its operations, however its code is spelled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from invlib.core.calls import logits_layer, logits_layer_inputs, trace
from invlib.errors import RecoveryError

SHAPE = (3, 2, 2)


class Written(nn.Module):
    """A network whose forward pass is a function of itself and the images."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        return self.run(self, x)


def flat(x):
    return x.flatten(1)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


HEADS = {
    "module": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), ("1.weight", "1.bias")),
    "no bias": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False)), ("1.weight", None)),
    "dropout": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout()), ("1.weight", "1.bias")),
    "registered first": (
        lambda: Written(
            lambda n, x: n.head(F.relu(n.hidden(flat(x)))), head=nn.Linear(8, 5), hidden=nn.Linear(12, 8)
        ),
        ("head.weight", "head.bias"),
    ),
    "x @ w + b": (
        lambda: Written(lambda n, x: flat(x) @ n.w + n.b, w=drawn(12, 5), b=drawn(5)),
        ("w", "b"),
    ),
    "x @ w.T + b": (
        lambda: Written(lambda n, x: flat(x) @ n.w.T + n.b, w=drawn(12, 12), b=drawn(12)),
        ("w", "b"),
    ),
    "einsum": (
        lambda: Written(lambda n, x: torch.einsum("nd,od->no", flat(x), n.w), w=drawn(5, 12)),
        ("w", None),
    ),
    "1×1 convolution": (
        lambda: Written(lambda n, x: n.head(x).mean((2, 3)), head=nn.Conv2d(3, 5, 1)),
        ("head.weight", "head.bias"),
    ),
    "function of a convolution": (
        lambda: Written(
            lambda n, x: F.adaptive_avg_pool2d(F.conv2d(x, n.w) + n.b[:, None, None], 1).flatten(1),
            w=drawn(5, 3, 1, 1),
            b=drawn(5),
        ),
        ("w", "b"),
    ),
    "log_softmax of a scale": (
        lambda: Written(lambda n, x: F.log_softmax(n.head(flat(x)) / 2, 1), head=nn.Linear(12, 5)),
        ("head.weight", "head.bias"),
    ),
    "tokens": (
        lambda: Written(lambda n, x: n.head(x.flatten(2).mT).mean(1), head=nn.Linear(3, 5)),
        ("head.weight", "head.bias"),
    ),
    "a computed weight": (
        lambda: Written(
            lambda n, x: n.head(flat(x)), head=nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
        ),
        ("head.weight", "head.bias"),
    ),
    "a gate beside": (
        lambda: Written(
            lambda n, x: n.head(x * n.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3)),
            head=nn.Conv2d(3, 5, 1),
            gate=nn.Linear(3, 3),
        ),
        ("head.weight", "head.bias"),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_layer_that_makes_the_logits_and_what_enters_it(name):
    build, expected = HEADS[name]
    torch.manual_seed(0)
    model = build().eval()
    found = logits_layer(model, SHAPE)
    assert tuple(found)[:2] == expected
    # The gradient of class 0's mean logit is the mean of the inputs, up to a factor after the layer.
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    logits, inputs = logits_layer_inputs(model, x)
    assert torch.equal(logits, model(x))
    own = dict(model.named_parameters()).get(found.weight)
    if own is not None and "log_softmax" not in found.how:
        (slope,) = torch.autograd.grad(model(x)[:, 0].mean(), own)
        row = slope[:, 0] if found.transposed else slope[0]
        torch.testing.assert_close(inputs.mean(0), row.flatten())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)), "come out of 'softmax'"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU()), "come out of 'relu'"),
        (Written(lambda n, x: n.a(flat(x)) + n.b(flat(x)), a=nn.Linear(12, 5), b=nn.Linear(12, 5)), "'add'"),
        (Written(lambda n, x: n.a(n.a(flat(x))), a=nn.Linear(12, 12)), "'a.bias' is used 2 times"),
        (Written(lambda n, x: n.a(flat(x))[:, :3], a=nn.Linear(12, 5)), "leaves some out"),
        (Written(lambda n, x: n.a(flat(x)).flip(1), a=nn.Linear(12, 5)), "order of the classes"),
        (Written(lambda n, x: -2 * n.a(flat(x)), a=nn.Linear(12, 5)), "one positive number"),
        (Written(lambda n, x: n.a(x).amax((2, 3)), a=nn.Conv2d(3, 5, 1)), "come out of 'amax'"),
        (Written(lambda n, x: n.a(x), a=nn.Conv2d(3, 5, 1)), "has shape"),
        (Written(lambda n, x: flat(x) @ F.normalize(n.a), a=drawn(12, 5)), "is computed"),
        (Written(lambda n, x: x.mean((2, 3))), "do not come from a layer"),
    ],
)
def test_logits_that_no_layer_makes_are_refused_by_name(model, why):
    with pytest.raises(RecoveryError, match=why):
        logits_layer(model, SHAPE)


def operations(run, x):
    return [call.op for call in trace(Written(run), x).calls]


def test_functions_modules_and_in_place_forms_are_the_same_operations():
    x = torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    acts = [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_()]
    assert {tuple(operations(lambda n, x, act=act: act(2 * x), x)) for act in acts} == {("mul", "relu")}

    def statement(n, x):
        y = 2 * x
        F.relu_(y.view(3, 4))
        return y

    # The name of what a view was made of stands for what was written through the view.
    assert operations(statement, x) == ["mul", "view", "relu", "view"]
    assert operations(lambda n, x: torch.from_numpy(x.numpy()) + 1, x)[-1] == "add"


def test_a_trace_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.rand(2, *SHAPE), torch.get_rng_state()
    trace(model, x, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
