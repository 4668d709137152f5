"""The model zoo: the networks of the 2020 paper by name, trained weights, and torchvision's for ImageNet.

Names with capitals are networks for small images (32 pixels, 10 classes unless told otherwise);
torchvision's lower-case names are its networks for ImageNet (224 pixels, 1000 classes), and so is
``efficientnet_lite0``. ``ResNet18`` and ``resnet18`` are two different networks. ``TextDecoder`` alone takes
words instead of images. Nothing in invlib asks for a network from this zoo: any ``torch.nn.Module`` that maps
images ``(N, C, H, W)`` to logits ``(N, K)`` will do, best one without layers that work in place.
"""

from invlib.models.weights import available, model_card
from invlib.models.zoo import build, names, parameter_count

__all__ = [
    "available",
    "build",
    "model_card",
    "names",
    "parameter_count",
]
