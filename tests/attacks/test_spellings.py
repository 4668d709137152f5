"""Closed forms see what a network computes: each spelling of it leads to the same image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks.chain import chain
from invlib.attacks.verified import closest_closed_form
from tests.conftest import random_batch
from tests.core.test_calls import Written


def parts(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = {"conv": nn.Conv2d(3, 12, 3, stride=2, padding=1), "head": nn.Linear(192, 5)}
        nn.init.uniform_(built["conv"].weight, -0.5, 0.5)
    return built


def dense(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"one": nn.Linear(192, 24), "two": nn.Linear(24, 5)}


def of_modules(act):
    built = parts()
    return nn.Sequential(built["conv"], act, nn.Flatten(), built["head"])


def of_dense(act):
    built = dense()
    return nn.Sequential(nn.Flatten(), built["one"], act, built["two"])


def through(act):
    """A convolution network with an activation as a function."""
    return lambda: Written(lambda n, x: n.head(act(n.conv(x)).flatten(1)), **parts())


def statement(act):
    def run(n, x):
        x = n.conv(x)
        act(x)
        return n.head(x.view(len(x), -1))

    return lambda: Written(run, **parts())


def numbers(n, x):
    x = F.conv2d(x, n.w, n.b, 2, 1)
    return torch.sigmoid(x).reshape(len(x), -1) @ n.v.T + n.c


def raw(run):
    def build():
        built = parts()
        weights = {"w": built["conv"].weight, "b": built["conv"].bias}
        return Written(run, **weights, v=built["head"].weight, c=built["head"].bias)

    return build


def padded(n, x):
    return n.head(torch.sigmoid(F.conv2d(F.pad(x, (1, 1, 1, 1)), n.conv.weight, n.conv.bias, 2)).flatten(1))


def ground(act):
    return lambda: Written(lambda n, x: n.two(act(n.one(x.flatten(1)))), **dense())


def raw_dense():
    built = dense()
    weights = {"w": built["one"].weight.T.detach().clone(), "b": built["one"].bias}
    return Written(
        lambda n, x: torch.einsum("od,nd->no", n.v, F.relu(x.reshape(len(x), -1) @ n.w + n.b)) + n.c,
        **weights,
        v=built["two"].weight,
        c=built["two"].bias,
    )


def inside(n, x):
    """The client's network normalises by itself and moves channels last, which can both be undone."""
    x = (x - 0.1) / 0.5
    return n.two(F.relu(n.one(x.permute(0, 2, 3, 1).flatten(1))))


SPELLINGS = {
    "torch.sigmoid": (of_modules, nn.Sigmoid(), through(torch.sigmoid)),
    "x.sigmoid()": (of_modules, nn.Sigmoid(), through(lambda x: x.sigmoid())),
    "x.sigmoid_()": (of_modules, nn.Sigmoid(), statement(lambda x: x.sigmoid_())),
    "written out": (of_modules, nn.Sigmoid(), through(lambda x: 1 / (1 + torch.exp(-x)))),
    "functions of parameters": (of_modules, nn.Sigmoid(), raw(numbers)),
    "F.pad before": (of_modules, nn.Sigmoid(), lambda: Written(padded, **parts())),
    "torch.compile": (of_modules, nn.Sigmoid(), lambda: torch.compile(through(torch.sigmoid)())),
    "torch.tanh": (of_modules, nn.Tanh(), through(torch.tanh)),
    "x.tanh_()": (of_modules, nn.Tanh(), statement(lambda x: x.tanh_())),
    "F.softplus": (of_modules, nn.Softplus(2.0), through(lambda x: F.softplus(x, 2.0))),
    "F.leaky_relu": (of_modules, nn.LeakyReLU(0.3), through(lambda x: F.leaky_relu(x, 0.3))),
    "F.leaky_relu_": (of_modules, nn.LeakyReLU(0.3), statement(lambda x: F.leaky_relu_(x, 0.3))),
    "F.elu": (of_modules, nn.ELU(0.7), through(lambda x: F.elu(x, 0.7))),
    "F.elu_": (of_modules, nn.ELU(), statement(F.elu_)),
    "F.selu": (of_modules, nn.SELU(), through(F.selu)),
    "F.celu": (of_modules, nn.CELU(0.7), through(lambda x: F.celu(x, 0.7))),
    "F.relu": (of_dense, nn.ReLU(), ground(F.relu)),
    "F.relu in place": (of_dense, nn.ReLU(), ground(lambda x: F.relu(x, inplace=True))),
    "x.clamp(min=0)": (of_dense, nn.ReLU(), ground(lambda x: x.clamp(min=0))),
    "torch.maximum": (of_dense, nn.ReLU(), ground(lambda x: torch.maximum(x, torch.zeros(())))),
    "F.relu, einsum": (of_dense, nn.ReLU(), raw_dense),
    "F.gelu": (of_dense, nn.GELU(), ground(F.gelu)),
}


def see(model, protocol=None, n=1, shape=(3, 8, 8)):
    x, y = random_batch(n, seed=3)
    x = x if shape == (3, 8, 8) else torch.rand(n, *shape, generator=torch.Generator().manual_seed(3))
    seen = iv.observe(model, x, y % 2, protocol or iv.FedSGD(), normalization=iv.UNIT)
    return x, seen


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_gives_the_same_image(name):
    modules, act, functions = SPELLINGS[name]
    found = []
    for model in (modules(act), functions()):
        x, seen = see(model)
        found.append(iv.best(evaluations=1)(model, seen))
        assert found[-1].status == "closed_form"
        assert float(iv.metrics.psnr(found[-1].images, x)) > 80
    torch.testing.assert_close(found[0].images, found[1].images, rtol=0, atol=1e-6)
    assert found[0].note.partition(":")[0] == found[1].note.partition(":")[0]


def test_what_is_done_to_the_image_first_is_undone():
    model = Written(inside, **dense())
    x, seen = see(model)
    assert iv.fully_connected()(model, seen).note.startswith("exact")
    assert float(iv.metrics.psnr(iv.fully_connected()(model, seen).images, x)) > 90


def skip(n, x):
    y = n.conv(x)
    return n.head((torch.sigmoid(y) + y).flatten(1))


def reused(n, x):
    return n.two(torch.tanh(n.same(torch.tanh(n.same(x)))).flatten(1))


def noise(n, x):
    return n.head(n.conv(torch.relu(x)).flatten(1))


REFUSED = {
    "skip connection": (lambda: Written(skip, **parts()), "what 'conv' gives goes into"),
    "reuse": (
        lambda: Written(reused, same=nn.Conv2d(3, 3, 3, padding=1), two=nn.Linear(192, 5)),
        "'same.weight' is used more than once",
    ),
    "max pooling": (
        lambda: Written(
            lambda n, x: n.head(F.max_pool2d(n.conv(x), 2).flatten(1)),
            conv=parts()["conv"],
            head=nn.Linear(48, 5),
        ),
        "'conv' is followed by max_pool2d",
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 5)),
        "the image is followed by a 3-group convolution",
    ),
    "a computed weight": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.Flatten(), nn.Linear(216, 5)
        ),
        "a convolution whose weight is computed",
    ),
    "reflection": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.Flatten()),
        "the image is followed by reflection_pad2d",
    ),
    "cut": (lambda: Written(lambda n, x: n.two(F.relu(x[:, 0].flatten(1))), two=nn.Linear(64, 5)), "select"),
    "relu first": (lambda: Written(noise, **parts()), "the image is followed by relu"),
    "no bias at the end": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 5, bias=False)),
        "it ends in '2'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_note_says_why_no_closed_form_applies(name):
    build, why = REFUSED[name]
    model = build()
    _, seen = see(model)
    closed, tried = closest_closed_form(model, seen, F.cross_entropy)
    assert closed is None
    assert tried.why.startswith("no closed form applies: ")
    assert why in tried.why
    if name == "max pooling":
        assert "'conv' is followed by max_pool2d" in iv.best(evaluations=2)(model, seen).note


def test_beside_the_image_other_uses_of_it_do_not_matter():
    def run(n, x):
        flat = x.flatten(1)
        return n.two(torch.cat([F.relu(n.one(flat)), flat.mean(1, keepdim=True)], 1))

    model = Written(run, one=nn.Linear(192, 24), two=nn.Linear(25, 5))
    x, seen = see(model)
    assert [stage.name for stage in chain(model, seen).stages] == ["one"]
    assert float(iv.metrics.psnr(iv.best(evaluations=1)(model, seen).images, x)) > 90


def signal(n, x):
    return n.head(torch.sigmoid(n.conv(x.squeeze(2))).flatten(1))


def of_image(shape):
    """A convolution network of an image of any shape, and as many equations as pixels."""
    channels, height, width = shape
    kernel = (min(3, height), min(3, width))
    places = (height - kernel[0] + 1) * (width - kernel[1] + 1)
    count = 2 * channels * height * width // places + 4
    return nn.Sequential(
        nn.Conv2d(channels, count, kernel), nn.Sigmoid(), nn.Flatten(), nn.Linear(count * places, 5)
    )


def of_pixels(shape):
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 24), nn.Tanh(), nn.Linear(24, 5))


SHAPES = [(3, 1, 1), (1, 1, 1), (3, 1, 16), (1, 16, 1), (1, 5, 9), (2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", [of_image, of_pixels])
def test_images_of_any_shape(shape, build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build(shape)
    for protocol, count in ((iv.FedSGD(), 1), (iv.FedAvg(lr=0.1, local_steps=2), 1), (iv.FedSGD(), 2)):
        x, seen = see(model, protocol, count, shape)
        found = iv.best(evaluations=1)(model, seen)
        assert found.images.shape == x.shape
        if count == 1 and protocol == iv.FedSGD():
            assert found.status == "closed_form"
            assert float(iv.metrics.psnr(found.images, x)) > 60


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_a_signal_comes_back_through_its_convolution(padding):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conv = nn.Conv1d(2, 12, 4, padding=padding)
        model = Written(signal, conv=conv, head=nn.Linear(12 * conv(torch.zeros(1, 2, 16)).shape[-1], 5))
    x, seen = see(model, shape=(2, 1, 16))
    found = iv.best(evaluations=1)(model, seen)
    assert found.note.startswith("closed form, layer by layer")
    assert float(iv.metrics.psnr(found.images, x)) > 80
