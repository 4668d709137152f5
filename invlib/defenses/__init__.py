"""Defences of a client, as both sides know them, and what an attacker who knows them minimises."""

from invlib.defenses.aggregation import SecureAggregation
from invlib.defenses.defended import Defended
from invlib.defenses.likelihood import Likelihood
from invlib.defenses.mixup import Mixup
from invlib.defenses.perexample import PerExample
from invlib.defenses.soteria import Soteria
from invlib.defenses.transforms import (
    Clip,
    GaussianNoise,
    LaplaceNoise,
    MaskLayer,
    Quantize,
    Sign,
    TopK,
    Transform,
    Transport,
)

__all__ = [
    "Clip",
    "Defended",
    "GaussianNoise",
    "LaplaceNoise",
    "Likelihood",
    "MaskLayer",
    "Mixup",
    "PerExample",
    "Quantize",
    "SecureAggregation",
    "Sign",
    "Soteria",
    "TopK",
    "Transform",
    "Transport",
]
