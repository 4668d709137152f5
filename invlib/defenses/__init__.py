"""Defences, and what they prove: how much privacy noise gives, and what no attacker can do."""

from invlib.defenses.accounting import gaussian_mu
from invlib.defenses.bounds import (
    noise_for,
    reconstruction_bound,
    subsampled_bound,
    two_point_bound,
)
from invlib.defenses.matched import candidate_gradients, matched_attack

__all__ = [
    "candidate_gradients",
    "gaussian_mu",
    "matched_attack",
    "noise_for",
    "reconstruction_bound",
    "subsampled_bound",
    "two_point_bound",
]
