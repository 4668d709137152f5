"""The interface of the 2020 code: a config dict in, images in normalised space and a dict of numbers out.

For programs written against the code that came with Geiping et al. 2020, arXiv 2003.14053. Names, arguments,
config keys and their values are that code's; the work is done by `invlib.GradientMatching`, so the restarts
run together. `attack` turns a config into the attack it describes, which is the way to newer code.

Images and updates are in that code's units: images ``(N, C, H, W)`` are normalised by ``mean_std``, and an
update is a list of tensors in the order of ``model.parameters()``. Random draws come from torch's default
generator, in the same order as there, so ``torch.manual_seed`` gives the same starting points.

It differs from the original where that was at fault: a restart whose score is not finite does not shift the
choice to another; a restart that did not run is never chosen; weight updates do not turn label inference
upside down; the config dict and the model's mode stay as they were; scores of FedAvg use ``batch_size``;
ConvNet8, 16 and 32 are as wide as they say; an unknown config key or value is an error that names the
choices.
"""

from invlib.legacy.config import DEFAULT_CONFIG, attack
from invlib.legacy.costs import reconstruction_costs
from invlib.legacy.images import MedianPool2d, psnr, total_variation
from invlib.legacy.models import construct_model, loss_steps
from invlib.legacy.reconstructors import FedAvgReconstructor, GradientReconstructor

__all__ = [
    "DEFAULT_CONFIG",
    "FedAvgReconstructor",
    "GradientReconstructor",
    "MedianPool2d",
    "attack",
    "construct_model",
    "loss_steps",
    "psnr",
    "reconstruction_costs",
    "total_variation",
]
