"""Gradient inversion in federated learning: what a shared gradient gives away, and how to check your own.

Images are ``(N, C, H, W)`` in [0, 1] everywhere; the client's normalisation travels with the observation.
"""

from importlib import import_module
from typing import Any

from invlib import errors, labels, metrics, objectives, optimizers, priors
from invlib.analytic import fully_connected
from invlib.capture import from_arrays, from_gradients, from_state_dicts, load_observation, save_observation
from invlib.federated import FedAvg, FedSGD, observe
from invlib.forward import ForwardMatching
from invlib.matching import (
    GradientMatching,
    attack_many,
    deep_leakage,
    improved_deep_leakage,
    inverting_gradients,
)
from invlib.metrics import Report, evaluate
from invlib.natural import NaturalImages
from invlib.objectives import Layers
from invlib.observation import (
    CIFAR10,
    CIFAR100,
    FASHION_MNIST,
    IMAGENET,
    MNIST,
    UNIT,
    Normalization,
    Observation,
)
from invlib.optimizers import LBFGS, SGD, Adam, StepDecay
from invlib.presets import best
from invlib.reconstruction import Frames, Progress, Reconstruction
from invlib.recursive import recursive_inversion
from invlib.smoothing import Smoothing
from invlib.surrogate import as_one_gradient

__version__ = "0.1.0"

# Loaded on first use: they bring matplotlib, torchvision or the model zoo, which an audit may not need.
_LAZY = ("analytic", "data", "experiments", "kernels", "legacy", "models", "training", "viz")

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "FASHION_MNIST",
    "IMAGENET",
    "LBFGS",
    "MNIST",
    "SGD",
    "UNIT",
    "Adam",
    "FedAvg",
    "FedSGD",
    "ForwardMatching",
    "Frames",
    "GradientMatching",
    "Layers",
    "NaturalImages",
    "Normalization",
    "Observation",
    "Progress",
    "Reconstruction",
    "Report",
    "Smoothing",
    "StepDecay",
    "as_one_gradient",
    "attack_many",
    "best",
    "deep_leakage",
    "errors",
    "evaluate",
    "from_arrays",
    "from_gradients",
    "from_state_dicts",
    "fully_connected",
    "improved_deep_leakage",
    "inverting_gradients",
    "labels",
    "load_observation",
    "metrics",
    "objectives",
    "observe",
    "optimizers",
    "priors",
    "recursive_inversion",
    "save_observation",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"invlib.{name}")
    raise AttributeError(f"module 'invlib' has no attribute {name!r}")
