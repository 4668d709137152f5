"""How close a reconstruction is to the truth, which is the second argument; only here are they compared."""

from invlib.metrics.quality import lpips, mse, psnr, ssim
from invlib.metrics.report import Report, evaluate, matching_order

__all__ = [
    "Report",
    "evaluate",
    "lpips",
    "matching_order",
    "mse",
    "psnr",
    "ssim",
]
