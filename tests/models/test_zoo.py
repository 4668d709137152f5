"""Names, sizes, settings and start of the networks in the zoo."""

import contextlib
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from invlib import errors, models
from invlib.errors import ConfigError, UnknownNameError
from invlib.models.densenet import DenseNet
from invlib.models.irevnet import IRevNet, ReversibleBlock
from invlib.models.resnet import ResNet

# Of the 2020 paper and its code; where neither states one, the architecture's own count.
COUNTS = {
    "ConvNet8": 48_634,
    "ConvNet16": 187_114,
    "ConvNet32": 733_642,
    "ConvNet64": 2_904_970,
    "LeNetZhu": 15_826,
    "MLP": 5_256_202,
    "TwoLP": 6_313_994,
    "ResNet20": 272_474,
    "ResNet20-preactivation": 272_378,
    "ResNet20-nostride": 272_474,
    "ResNet20-4": 4_327_754,
    "ResNet20-4-unpooled": 4_327_754,
    "ResNet20-10": 27_008_810,
    "ResNet28-10": 36_690_090,
    "ResNet32": 466_906,
    "ResNet32-10": 46_371_370,
    "ResNet44": 661_338,
    "ResNet56": 855_770,
    "ResNet110": 1_730_714,
    "ResNet18": 11_173_962,
    "ResNet34": 21_282_122,
    "ResNet50": 23_520_842,
    "ResNet50-2": 93_932_682,
    "ResNet101": 42_512_970,
    "ResNet152": 58_156_618,
    "DenseNet40": 180_082,
    "DenseNet40-4": 2_748_970,
    "DenseNet121": 6_964_106,
    "MobileNet": 2_236_682,
    "MNASNet": 3_115_122,
    "iRevNet": 6_274_826,
}
TRANSFORMERS = {"ViT": 719_690, "TextDecoder": 717_520}
SMALL = (
    "ConvNet8",
    "LeNetZhu",
    "MLP",
    "TwoLP",
    "ResNet20",
    "ResNet20-nostride",
    "DenseNet40",
    "MobileNet",
    "MNASNet",
)


def test_every_name_of_the_paper_is_there() -> None:
    capital = tuple(name for name in models.names() if name != name.lower())
    assert capital == (*COUNTS, *TRANSFORMERS)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_count_and_shape_of_the_output(name: str, count: int) -> None:
    with torch.device("meta"):
        model = models.build(name)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert models.parameter_count(model) == count
    assert not [n for n, module in model.named_modules() if getattr(module, "inplace", False)]


@pytest.mark.parametrize("name", SMALL)
def test_forward_on_two_images(name: str) -> None:
    model = models.build(name, seed=0)
    assert not any(module.training for module in model.modules())
    logits = model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("ConvNet8", 1, 28),
        ("LeNetZhu", 1, 29),
        ("MLP", 2, 8),
        ("ResNet20", 1, 28),
        ("DenseNet40", 1, 28),
        ("DenseNet121", 1, 64),
        ("MobileNet", 4, 16),
        ("MNASNet", 1, 64),
        ("iRevNet", 1, 28),
    ],
)
def test_other_channels_and_sizes(name: str, channels: int, size: int) -> None:
    with torch.device("meta"):
        model = models.build(name, in_channels=channels, image_size=size, num_classes=3)
        assert model(torch.zeros(1, channels, size, size)).shape == (1, 3)


@pytest.mark.parametrize(("name", "least"), [("ConvNet8", 9), ("DenseNet40", 16), ("DenseNet121", 29)])
def test_least_image_size_works_and_one_less_is_refused(name: str, least: int) -> None:
    with torch.device("meta"):
        assert models.build(name, image_size=least)(torch.zeros(1, 3, least, least)).shape == (1, 10)
    with pytest.raises(ConfigError, match=f"image_size is {least - 1}; expected .* at least {least}"):
        models.build(name, image_size=least - 1)


def test_max_pooling_and_no_stride_change_the_function_and_not_the_size() -> None:
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, unstrided = models.build("ResNet20", seed=3), models.build("ResNet20-nostride", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), unstrided.parameters(), strict=True))
    assert not torch.allclose(plain(images), unstrided(images))
    maps = []
    highest = ResNet(layers=(1,), width=4, pool="max").eval()
    highest.layers[0].register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    logits = highest(images)
    torch.testing.assert_close(logits, highest.fc(maps[0].flatten(2).max(2).values))


def test_seed_fixes_the_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (models.build("ConvNet8", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_seed_is_no_matter_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in models.build("ConvNet8", seed=1).parameters())


def test_without_a_seed_the_global_generator_decides_and_does_not_move() -> None:
    torch.manual_seed(5)
    one, alike = models.build("LeNetZhu"), models.build("LeNetZhu")
    torch.rand(1)
    other = models.build("LeNetZhu")
    torch.manual_seed(5)
    again = models.build("LeNetZhu")
    for network in (alike, again):
        assert torch.equal(next(one.parameters()), next(network.parameters()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    "use",
    [
        lambda: models.build("ConvNet8"),
        lambda: models.build("LeNetZhu", weights="fashion-mnist"),
        lambda: models.build("resnet18", num_classes=2),
        lambda: models.build("LeNetZhu", weights="nothing"),
        lambda: models.build("LeNetZhu", weights="fashion-mnist", num_classes=3),
        lambda: models.build("iRevNet", image_size=30),
        lambda: models.build("ConvNet8", seed=2**70),
    ],
)
def test_global_state_is_left_alone_also_where_building_raises(use: Callable[[], object]) -> None:
    before = torch.get_rng_state(), _numpys(), random.getstate()
    with contextlib.suppress(errors.InvlibError):
        use()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (_numpys(), random.getstate()) == before[1:]


def _numpys() -> str:
    return str(np.random.get_state())  # noqa: NPY002 - the global one is what this is about


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ConvNet8", {"num_classes": 10**12}),
        ("ResNet20", {"num_classes": 10**8}),
        ("MLP", {"image_size": 10**6}),
        ("LeNetZhu", {"image_size": 10**12}),
        ("ConvNet8", {"in_channels": 10**9}),
        ("MLP", {"num_classes": 10**7, "in_channels": 10**7, "image_size": 10**7}),
    ],
)
def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(name: str, settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .* expected a network of at most 2,147,483,648 numbers"):
        models.build(name, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 2**64},
        {"seed": 0.5},
        {"seed": "a"},
        {"activation": ["relu"]},
        {"activation": 3},
        {"batch_norm": "no"},
        {"weights": 3},
        {"num_classes": "ten"},
    ],
    ids=str,
)
def test_settings_of_another_type_are_named(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        models.build("ConvNet8", **settings)


@pytest.mark.parametrize("name", [None, 3, ["ConvNet8"], ""])
def test_a_name_of_another_type_is_named(name: object) -> None:
    with pytest.raises((UnknownNameError, ConfigError), match=r"no model|build name is"):
        models.build(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["relu", "relu6", "sigmoid", "softplus", "gelu", "tanh"])
def test_activation_replaces_the_familys_own(name: str) -> None:
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    kinds = {
        type(module)
        for module in models.build("LeNetZhu", activation=name).modules()
        if not list(module.children()) and not list(module.parameters())
    }
    assert kinds == {
        {
            "relu": nn.ReLU,
            "relu6": nn.ReLU6,
            "sigmoid": nn.Sigmoid,
            "softplus": nn.Softplus,
            "gelu": nn.GELU,
            "tanh": nn.Tanh,
        }[name]
    }
    for family in ("ConvNet8", "MLP", "ResNet20", "DenseNet40", "MobileNet", "MNASNet"):
        with torch.device("meta"):
            model = models.build(family, activation=name)
        others = {nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.GELU, nn.Tanh} - kinds
        assert not any(type(module) in others for module in model.modules())
    assert torch.isfinite(models.build("ConvNet8", seed=0, activation=name)(images)).all()


@pytest.mark.parametrize("name", ["ConvNet8", "ResNet20", "ResNet56"])
def test_without_batch_norm_the_signal_keeps_its_size(name: str) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = models.build(name, seed=0, batch_norm=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not list(model.buffers())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert 0.05 < model(images).std() < 5


def test_a_fully_connected_network_has_no_batch_norm_to_leave_out() -> None:
    assert models.parameter_count(models.build("TwoLP", batch_norm=False)) == COUNTS["TwoLP"]


def test_irevnet_gives_its_images_back_from_its_features() -> None:
    model = IRevNet(blocks=(2, 2, 2), channels=(8, 32, 128)).double().eval()
    for index, module in enumerate(
        module for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    ):
        module.running_mean.fill_(-0.1 * index)  # type: ignore[union-attr]
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = model.features(images)
    assert features.shape == (2, 256, 2, 2)
    assert (features - features.mean((2, 3), keepdim=True)).abs().max() > 0.1
    torch.testing.assert_close(model.inverse(features), images, rtol=0, atol=1e-10)


def test_reversible_blocks_use_their_branch() -> None:
    block = ReversibleBlock(4, 4, 1, first=False, activation="relu").eval()
    a, b = torch.rand(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    left, right = block((a, b))
    assert torch.equal(left, b)
    torch.testing.assert_close(right, a + block.branch(b))
    assert block.branch(b).abs().max() > 0


def test_unknown_name_lists_names_and_the_closest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no model 'ConvNet46'; did you mean .*ConvNet64.* There are: ConvNet8"
    ):
        models.build("ConvNet46")
    with pytest.raises(UnknownNameError, match=r"did you mean .*ResNet18 or .*resnet18"):
        models.build("Resnet18")
    with pytest.raises(UnknownNameError, match="no model 'xyz'; There are: "):
        models.build("xyz")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ConvNet8", {"in_channels": 0}, "in_channels is 0; expected a whole number of at least 1"),
        ("ConvNet8", {"num_classes": -1}, "num_classes is -1; expected a whole number of at least 1"),
        ("ResNet20", {"image_size": 2.5}, "image_size is 2.5; expected a whole number"),
        ("ResNet20", {"activation": "swish"}, "activation is 'swish'; expected one of relu, relu6, sigmoid"),
        ("DenseNet40", {"batch_norm": False}, "batch_norm is False; expected True for DenseNet40"),
        ("iRevNet", {"in_channels": 33}, "in_channels is 33; expected at most 32"),
        ("iRevNet", {"image_size": 30}, "image_size is 30; expected a multiple of 4"),
        ("resnet18", {"in_channels": 1}, "in_channels is 1; expected 3"),
        ("resnet18", {"image_size": 16}, "image_size is 16; expected .* at least 32"),
        ("resnet18", {"activation": "gelu"}, "activation is 'gelu'; expected None"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, **settings)  # type: ignore[arg-type]


def test_unknown_parts_of_a_family_are_refused() -> None:
    with pytest.raises(ConfigError, match="pool is 'min'; expected 'mean' or 'max'"):
        ResNet(pool="min")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block is 'wide'; expected one of basic"):
        ResNet(block="wide")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stem is 'mnist'; expected 'cifar' or 'imagenet'"):
        DenseNet(stem="mnist")  # type: ignore[arg-type]


def test_pre_activation_leaves_the_shortcut_alone():
    net = models.build("ResNet20-preactivation", seed=0).eval()
    first, wider = net.layers[0][0], net.layers[1][0]
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        # Sums of branches and the identity: what goes in comes out again where the branch is silent.
        branch = first.conv2(first.bn2(first.conv1(first.bn1(x).relu())).relu())
        torch.testing.assert_close(first(x), x + branch)
        first.conv2.weight.zero_()
        torch.testing.assert_close(first(x), x)
        wider.conv2.weight.zero_()
        torch.testing.assert_close(wider(x), wider.downsample(wider.bn1(x).relu()))


@pytest.mark.gpu
def test_seed_gives_the_same_weights_on_a_gpu() -> None:
    before = torch.cuda.get_rng_state()
    with torch.device("cuda"):
        model = models.build("ConvNet8", seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for a, b in zip(model.parameters(), models.build("ConvNet8", seed=1).parameters(), strict=True):
        assert a.is_cuda
        assert torch.equal(a.cpu(), b)
