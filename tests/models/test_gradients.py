"""Every family can be differentiated twice under vmap, which is how restarts run together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from invlib import models
from invlib.models.convnet import ConvNet
from invlib.models.densenet import DenseNet
from invlib.models.irevnet import IRevNet
from invlib.models.lenet import LeNetZhu
from invlib.models.mlp import FullyConnected
from invlib.models.mobile import MobileNetwork
from invlib.models.resnet import ResNet

STAGES = ((1, 8, 1, 1, 3), (3, 8, 2, 2, 5))
# One small member of each family, built as the large ones are, with the size of its images.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ConvNet": (lambda: ConvNet(width=2, image_size=9), 9),
    "ConvNet without batch norm": (lambda: ConvNet(width=2, image_size=9, batch_norm=False), 9),
    "LeNetZhu": (lambda: LeNetZhu(image_size=8), 8),
    "MLP": (lambda: FullyConnected(hidden=(8, 8), image_size=4), 4),
    "ResNet": (lambda: ResNet(layers=(1, 1), width=4), 8),
    "ResNet of bottlenecks": (lambda: ResNet(block="bottleneck", layers=(1, 1), width=4), 8),
    "ResNet with a max": (lambda: ResNet(layers=(1, 1), width=4, pool="max"), 8),
    "ResNet without batch norm": (
        lambda: ResNet(block="bottleneck", layers=(1, 1), width=4, batch_norm=False),
        8,
    ),
    "DenseNet": (lambda: DenseNet(growth=4, blocks=(1, 2), image_size=8), 8),
    "DenseNet for ImageNet": (lambda: DenseNet(growth=4, blocks=(1, 2), stem="imagenet", image_size=32), 32),
    "MobileNet": (lambda: MobileNetwork(stages=STAGES, stem_stride=1, activation="relu6"), 8),
    "MNASNet": (lambda: MobileNetwork(stages=STAGES, stem_stride=2), 8),
    "iRevNet": (lambda: IRevNet(blocks=(2, 2), channels=(4, 16), image_size=8), 8),
    "torchvision": (lambda: models.build("resnet18", num_classes=10, image_size=32), 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_gradient_under_vmap_equals_two_backward_passes(family: str) -> None:
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model = make().double().eval()
    labels = torch.tensor([1, 7])
    # torchvision's large tensors would only make this slow
    parameters = {name: p for name, p in model.named_parameters() if p.numel() <= 50_000}
    names = list(parameters)
    guesses = torch.rand(2, 2, 3, size, size, dtype=torch.float64)
    directions = [torch.randn_like(parameter) for parameter in parameters.values()]

    def loss(values: dict[str, Tensor], images: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, values, (images,)), labels)

    def cost(images: Tensor) -> Tensor:
        update = grad(loss)(parameters, images)
        return sum((update[name] * v).sum() for name, v in zip(names, directions, strict=True))

    together = vmap(grad(cost))(guesses)
    assert together.abs().max() > 0
    for guess, found in zip(guesses, together, strict=True):
        images = guess.clone().requires_grad_()
        update = torch.autograd.grad(
            cross_entropy(model(images), labels), list(parameters.values()), create_graph=True
        )
        (expected,) = torch.autograd.grad(
            sum((g * v).sum() for g, v in zip(update, directions, strict=True)), images
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
