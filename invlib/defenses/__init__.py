"""Defences of a client, what an attacker who knows them minimises, and what no attacker can do."""

from invlib.defenses.accounting import (
    Protection,
    classical_mu,
    delta,
    epsilon,
    gaussian_mu,
    protection,
    subsampled_epsilon,
)
from invlib.defenses.aggregation import SecureAggregation
from invlib.defenses.bottleneck import Bottleneck, in_front, with_bottleneck
from invlib.defenses.bounds import noise_for, reconstruction_bound, subsampled_bound, two_point_bound
from invlib.defenses.captured import defend
from invlib.defenses.coarse import Quantize, Sign, TopK, Transport
from invlib.defenses.defended import Defended
from invlib.defenses.diagnostics import LocalSpectrum, local_spectrum
from invlib.defenses.likelihood import Likelihood
from invlib.defenses.matched import candidate_gradients, matched_attack
from invlib.defenses.mixup import Mixup
from invlib.defenses.perexample import PerExample
from invlib.defenses.soteria import Soteria
from invlib.defenses.transforms import Clip, GaussianNoise, LaplaceNoise, MaskLayer, Transform
from invlib.defenses.witness import WitnessPair, witness_pair

__all__ = [
    "Bottleneck",
    "Clip",
    "Defended",
    "GaussianNoise",
    "LaplaceNoise",
    "Likelihood",
    "LocalSpectrum",
    "MaskLayer",
    "Mixup",
    "PerExample",
    "Protection",
    "Quantize",
    "SecureAggregation",
    "Sign",
    "Soteria",
    "TopK",
    "Transform",
    "Transport",
    "WitnessPair",
    "candidate_gradients",
    "classical_mu",
    "defend",
    "delta",
    "epsilon",
    "gaussian_mu",
    "in_front",
    "local_spectrum",
    "matched_attack",
    "noise_for",
    "protection",
    "reconstruction_bound",
    "subsampled_bound",
    "subsampled_epsilon",
    "two_point_bound",
    "with_bottleneck",
    "witness_pair",
]
