"""Defences of a client, what an attacker who knows them minimises, and what no attacker can do."""

from invlib.defenses.accounting import gaussian_mu
from invlib.defenses.bounds import noise_for, reconstruction_bound, subsampled_bound, two_point_bound
from invlib.defenses.defended import Defended
from invlib.defenses.diagnostics import LocalSpectrum, local_spectrum
from invlib.defenses.likelihood import Likelihood
from invlib.defenses.matched import candidate_gradients, matched_attack
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
from invlib.defenses.witness import WitnessPair, witness_pair

__all__ = [
    "Clip",
    "Defended",
    "GaussianNoise",
    "LaplaceNoise",
    "Likelihood",
    "LocalSpectrum",
    "MaskLayer",
    "Quantize",
    "Sign",
    "TopK",
    "Transform",
    "Transport",
    "WitnessPair",
    "candidate_gradients",
    "gaussian_mu",
    "local_spectrum",
    "matched_attack",
    "noise_for",
    "reconstruction_bound",
    "subsampled_bound",
    "two_point_bound",
    "witness_pair",
]
