"""Gradient inversion in federated learning: what a shared gradient gives away, and how to check your own.

Images are ``(N, C, H, W)`` in [0, 1] everywhere; the client's normalisation travels with the observation.
"""

from importlib import import_module
from typing import Any

import invlib.core.interrupt  # noqa: F401 - first of all, before the imports that take seconds
from invlib import defenses, errors, kernels, metrics
from invlib.attacks import analytic, labels
from invlib.attacks.analytic import fully_connected
from invlib.attacks.auto import best
from invlib.attacks.batches import crossover
from invlib.attacks.buffers import buffers_alone
from invlib.attacks.exact import exact_batch
from invlib.attacks.forward import ForwardMatching
from invlib.attacks.many import attack_many
from invlib.attacks.matching import GradientMatching
from invlib.attacks.patches import patch_embedding
from invlib.attacks.published import (
    beyond_inferring,
    client_privacy_leakage,
    deep_leakage,
    improved_deep_leakage,
    inverting_gradients,
    modern,
    see_through_gradients,
)
from invlib.attacks.recursive import recursive_inversion
from invlib.attacks.tokens import token_embedding
from invlib.autodiff import smoothing
from invlib.autodiff.smoothing import Smoothing
from invlib.core.normalization import CIFAR10, CIFAR100, FASHION_MNIST, IMAGENET, MNIST, UNIT, Normalization
from invlib.core.observation import Observation
from invlib.core.reconstruction import Frames, Progress, Reconstruction
from invlib.core.version import __version__ as __version__
from invlib.defenses import Defended
from invlib.federated import (
    FedAvg,
    FedSGD,
    as_one_gradient,
    fitted_place,
    from_arrays,
    from_gradients,
    from_state_dicts,
    load_observation,
    observe,
    record_client,
    save_observation,
    several_rounds,
)
from invlib.metrics import Identified, Report, evaluate, identifiability
from invlib.optim import objectives, optimizers, priors
from invlib.optim.coordinates import NaturalImages, Tiles
from invlib.optim.objectives import Layers
from invlib.optim.optimizers import LBFGS, SGD, Adam
from invlib.optim.schedules import CosineDecay, StepDecay

# Loaded on first use: rooms that bring matplotlib, torchvision or the model zoo, and what stands beside this
# file rather than below it ("room:name").
_LAZY = {
    "AuditReport": "invlib.auditing:AuditReport",
    "Presend": "invlib.auditing:Presend",
    "audit": "invlib.auditing:audit",
    "data": "invlib.data",
    "experiments": "invlib.experiments",
    "legacy": "invlib.legacy",
    "models": "invlib.models",
    "presend": "invlib.auditing:presend",
    "training": "invlib.models.training",
    "viz": "invlib.viz",
}

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
    "CosineDecay",
    "Defended",
    "FedAvg",
    "FedSGD",
    "ForwardMatching",
    "Frames",
    "GradientMatching",
    "Identified",
    "Layers",
    "NaturalImages",
    "Normalization",
    "Observation",
    "Progress",
    "Reconstruction",
    "Report",
    "Smoothing",
    "StepDecay",
    "Tiles",
    "analytic",
    "as_one_gradient",
    "attack_many",
    "best",
    "beyond_inferring",
    "buffers_alone",
    "client_privacy_leakage",
    "crossover",
    "deep_leakage",
    "defenses",
    "errors",
    "evaluate",
    "exact_batch",
    "fitted_place",
    "from_arrays",
    "from_gradients",
    "from_state_dicts",
    "fully_connected",
    "identifiability",
    "improved_deep_leakage",
    "inverting_gradients",
    "kernels",
    "labels",
    "load_observation",
    "metrics",
    "modern",
    "objectives",
    "observe",
    "optimizers",
    "patch_embedding",
    "priors",
    "record_client",
    "recursive_inversion",
    "save_observation",
    "see_through_gradients",
    "several_rounds",
    "smoothing",
    "token_embedding",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        room, _, member = _LAZY[name].partition(":")
        return getattr(import_module(room), member) if member else import_module(room)
    raise AttributeError(f"module 'invlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY, *(name for name in globals() if name.startswith("__"))})
