"""Defences of a client, as both sides know them, and what an attacker who knows them minimises."""

from invlib.defenses.coarse import Quantize, Sign, TopK, Transport
from invlib.defenses.defended import Defended
from invlib.defenses.likelihood import Likelihood
from invlib.defenses.transforms import Clip, GaussianNoise, LaplaceNoise, MaskLayer, Transform

__all__ = [
    "Clip",
    "Defended",
    "GaussianNoise",
    "LaplaceNoise",
    "Likelihood",
    "MaskLayer",
    "Quantize",
    "Sign",
    "TopK",
    "Transform",
    "Transport",
]
