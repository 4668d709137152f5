"""Packages that only some of the library needs, imported where they are first used."""

from importlib import import_module
from types import ModuleType

import torch

from invlib.errors import DependencyError


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
