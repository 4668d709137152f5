"""torchvision's networks as the oracle: given the same weights, the zoo's compute the same."""

import torch
from torch import Tensor, nn

from invlib import models
from invlib.core.optional import torchvision
from invlib.models import imagenet
from invlib.models.resnet import BasicBlock, Bottleneck


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Give every tensor of one network to the tensor at the same place of the other."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in source.state_dict().items():
        # batch norm must be more than the identity, or its place in the network would not matter
        if name.endswith("running_mean"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    state = target.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in source.state_dict().values()]
    target.load_state_dict(dict(zip(state, source.state_dict().values(), strict=True)))


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_same(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    copy_in_order(theirs, ours)
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert expected.std() > 0
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_densenet121() -> None:
    assert_same(torchvision().models.densenet121(num_classes=10), models.build("DenseNet121"), images(32))


def test_mnasnet() -> None:
    assert_same(torchvision().models.mnasnet1_0(num_classes=10), models.build("MNASNet"), images(32))


def test_mobilenet_with_two_strides_fewer() -> None:
    stages = [[t, c, n, s] for t, c, n, s, _ in _mobilenet_stages()]
    theirs = torchvision().models.MobileNetV2(num_classes=10, inverted_residual_setting=stages)
    theirs.features[0][0].stride = (1, 1)
    assert_same(theirs, models.build("MobileNet"), images(32))


def _mobilenet_stages() -> list[tuple[int, int, int, int, int]]:
    # The paper's table 2, with the 24-channel stage's stride 1 in place of 2.
    return [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 1, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    ]


def test_basic_block_with_a_shortcut() -> None:
    resnet = torchvision().models.resnet
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    theirs = resnet.BasicBlock(4, 8, stride=2, downsample=shortcut)
    assert_same(theirs, BasicBlock(4, 8, 2, "relu", True), images(8, 4))


def test_bottleneck_with_and_without_a_shortcut() -> None:
    resnet = torchvision().models.resnet
    shortcut = nn.Sequential(nn.Conv2d(4, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    theirs = resnet.Bottleneck(4, 8, stride=2, downsample=shortcut)
    assert_same(theirs, Bottleneck(4, 8, 2, "relu", True), images(8, 4))
    assert_same(resnet.Bottleneck(32, 8), Bottleneck(32, 8, 1, "relu", True), images(8, 32))


def test_imagenet_networks_are_torchvisions() -> None:
    with torch.device("meta"):
        for name in imagenet.MODELS:
            ours, theirs = models.build(name), getattr(torchvision().models, name)()
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }
            assert not any(getattr(module, "inplace", False) for module in ours.modules())
