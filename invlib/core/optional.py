"""The one place that imports torchvision, which only ImageNet models and downloaded data sets need."""

from importlib import import_module
from types import ModuleType

import torch

from invlib.errors import DeviceError


def torchvision() -> ModuleType:
    """Return the torchvision module, mended where PyPI's build meets a CPU-only torch.

    Raises `DeviceError` where torchvision is not installed.
    """
    try:
        return import_module("torchvision")
    except ModuleNotFoundError as error:
        raise DeviceError("torchvision is not installed; `pip install invlib[vision]` brings it") from error
    except RuntimeError:
        # PyPI's torchvision carries CUDA operators that a CPU-only torch cannot register: its import
        # stops at "operator torchvision::nms does not exist". Declaring the two it asks for is enough.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float bar) -> Tensor")
        return import_module("torchvision")
