"""How close a reconstruction is to the truth, which is the second argument; only here are they compared."""

from invlib.metrics.identification import (
    Features,
    Identified,
    by_lpips,
    by_pixels,
    by_ssim,
    identifiability,
)
from invlib.metrics.quality import lpips, mse, psnr, ssim
from invlib.metrics.report import Report, evaluate, matching_order

__all__ = [
    "Features",
    "Identified",
    "Report",
    "by_lpips",
    "by_pixels",
    "by_ssim",
    "evaluate",
    "identifiability",
    "lpips",
    "matching_order",
    "mse",
    "psnr",
    "ssim",
]
