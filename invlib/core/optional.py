"""What a machine may lack: optional packages, and a GPU."""

from importlib import import_module
from types import ModuleType

import torch

from invlib.errors import ConfigError, DependencyError, DeviceError


def package(name: str, extra: str) -> ModuleType:
    """Import an optional package, which the extra of that name installs.

    Raises:
        DependencyError: the package is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise DependencyError(f"{name} is not installed; `pip install invlib[{extra}]` brings it") from error


def torchvision() -> ModuleType:
    """Return the torchvision module, also where PyPI's build meets a CPU-only torch.

    Raises:
        DependencyError: torchvision is not installed.
    """
    try:
        return package("torchvision", "vision")
    except DependencyError:
        raise
    except RuntimeError:
        # PyPI's torchvision carries CUDA operators that a CPU-only torch cannot register: its import
        # stops at "operator torchvision::nms does not exist". Declaring the two it asks for is enough.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float bar) -> Tensor")
        return import_module("torchvision")


def device_of(name: str | None = None) -> torch.device:
    """Return the device of a ``--device`` option; None takes a GPU where there is one.

    Raises:
        ConfigError: torch knows no such device.
        DeviceError: there is no GPU of that number.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; expected 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}; expected 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device is {name!r}, but torch finds {torch.cuda.device_count()} GPUs; expected 'cpu'"
        )
    return device
