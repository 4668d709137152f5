"""The interface of the 2020 code (the book has a page on it): ``import invlib.legacy as inversefed``.

For programs written against the code of Geiping et al. 2020, arXiv 2003.14053: names, arguments and
config are that code's, the work is done by `invlib.GradientMatching`. `attack` leads to newer code. Images
``(N, C, H, W)`` are normalised by ``mean_std``, an update is a list of tensors in the order of
``model.parameters()``, and random draws come from torch's default generator, in the same order as there.
"""

from invlib.legacy import consts, data, metrics, nn, reconstruction_algorithms, training, utils
from invlib.legacy.config import DEFAULT_CONFIG, attack
from invlib.legacy.costs import reconstruction_costs
from invlib.legacy.data import construct_dataloaders
from invlib.legacy.metrics import MedianPool2d, psnr, total_variation
from invlib.legacy.nn import MetaMonkey, construct_model
from invlib.legacy.reconstruction_algorithms import FedAvgReconstructor, GradientReconstructor, loss_steps
from invlib.legacy.training import train, training_strategy
from invlib.legacy.utils import options

__all__ = [
    "DEFAULT_CONFIG",
    "FedAvgReconstructor",
    "GradientReconstructor",
    "MedianPool2d",
    "MetaMonkey",
    "attack",
    "construct_dataloaders",
    "construct_model",
    "consts",
    "data",
    "loss_steps",
    "metrics",
    "nn",
    "options",
    "psnr",
    "reconstruction_algorithms",
    "reconstruction_costs",
    "total_variation",
    "train",
    "training",
    "training_strategy",
    "utils",
]
