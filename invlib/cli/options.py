"""The command-line options of the 2020 code, shared by ``reconstruct_image`` and ``rec_mult``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from invlib.attacks import auto
from invlib.errors import ConfigError, DeviceError
from invlib.legacy import DEFAULT_CONFIG
from invlib.legacy.config import FILTERS, INITS, OPTIMIZERS, SCORINGS
from invlib.legacy.costs import DISTANCES, SUBSETS, WEIGHTS

# What --optim stands for; a flag that is given goes before it.
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {**DEFAULT_CONFIG, "signed": True, "total_variation": 1e-4},
    "zhu": {
        **DEFAULT_CONFIG,
        "boxed": False,
        "cost_fn": "l2",
        "optim": "LBFGS",
        "max_iterations": 300,
        "total_variation": 1e-4,
        "lr_decay": False,
    },
    "best": {**DEFAULT_CONFIG, "max_iterations": auto.STEPS, "total_variation": auto.TV},
}
AUTO = "auto"
# What --optim best chooses by itself, so that a flag for it would go unheard, and what it chooses, where a
# flag can say it.
_CHOSEN: dict[str, Any] = {
    "cost_fn": "sim",
    "indices": "def",
    "weights": "equal",
    "optim": None,
    "signed": None,
    "boxed": None,
    "lr": None,
    "init": None,
    "filter": "none",
    "scoring_choice": "loss",
}
# Config key → the name of its flag.
_FLAGS = {key: key for key in DEFAULT_CONFIG if key != "lr_decay"} | {
    "optim": "optimizer",
    "max_iterations": "iterations",
    "total_variation": "tv",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shared options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("the client")
    what.add_argument("--model", default="ConvNet", help="name of a network (ConvNet is ConvNet64)")
    what.add_argument("--dataset", default="CIFAR10", help="or CIFAR100, MNIST, FashionMNIST, ImageNet")
    what.add_argument("--trained_model", action="store_true", help="use trained weights")
    what.add_argument(
        "--epochs", type=int, help="insist on weights that were trained for so many epochs (their card says)"
    )
    what.add_argument("--num_images", type=int, default=1, help="private images, each of another class")
    what.add_argument(
        "--target_id",
        type=int,
        help="first validation image; -1 takes an embedded image, for which no data set is needed",
    )
    what.add_argument("--label_flip", action="store_true", help="the client uses the next class as label")
    what.add_argument(
        "--accumulation", type=int, default=0, help="local steps of federated averaging; 0 sends a gradient"
    )
    what.add_argument("--local_lr", type=float, default=1e-4, help="the client's learning rate (%(default)s)")
    what.add_argument("--batch_size", type=int, default=0, help="images in a local step; 0 takes all")

    how = parser.add_argument_group("the attack", "Defaults are those of --optim.")
    how.add_argument(
        "--optim",
        default=AUTO,
        choices=[AUTO, *PRESETS],
        help="ours: cosine and signed Adam (Geiping et al. 2020), 4800 iterations; zhu: squared distance and "
        "L-BFGS (Zhu et al. 2019), 300 iterations of 20; best: this project's strongest, "
        f"{auto.STEPS} evaluations; auto: best on trained weights, where the published attack finds "
        "little, unless another option asks for what best does not do, and else ours (%(default)s)",
    )
    how.add_argument(
        "--restarts",
        type=int,
        default=1,
        help="starting points (%(default)s); best stops the worse ones early",
    )
    how.add_argument("--iterations", "--max_iterations", type=int, help="steps of each restart")
    how.add_argument("--cost_fn", help=_choices(DISTANCES))
    how.add_argument("--indices", help=f"which tensors are compared: {_choices(SUBSETS)}")
    how.add_argument("--weights", help=f"how they are weighed: {_choices(WEIGHTS)}")
    how.add_argument("--optimizer", help=_choices(OPTIMIZERS))
    how.add_argument("--signed", action=argparse.BooleanOptionalAction, help="use the gradient's sign")
    how.add_argument("--boxed", action=argparse.BooleanOptionalAction, help="keep images in [0, 1]")
    how.add_argument("--lr", type=float, help="step size of adam and adamw (0.1)")
    how.add_argument("--tv", type=float, help="weight of total variation (1e-4)")
    how.add_argument("--init", help=_choices(INITS))
    how.add_argument("--filter", help=f"median filter every 500 steps: {_choices(FILTERS)}")
    how.add_argument("--scoring_choice", help=f"how the result is chosen: {_choices(SCORINGS)}")
    how.add_argument("--soft_labels", action="store_true", help="find the labels too, do not give them")
    how.add_argument("--dtype", default="float", help="float, double or half, for the attack (%(default)s)")
    how.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    how.add_argument("--chunk", type=int, help="restarts that run together (all on a GPU, 4 on a CPU)")
    how.add_argument("--seed", type=int, help="of the untrained network and the starting points; random")
    how.add_argument("--deterministic", action="store_true", help="only deterministic algorithms of cuDNN")
    how.add_argument("--dryrun", action="store_true", help="take one step and write nothing")

    files = parser.add_argument_group("files")
    files.add_argument("--save_image", action="store_true", help="save the reconstruction and the original")
    files.add_argument("--image_path", default="images/", help="folder for images (%(default)s)")
    files.add_argument("--table_path", default="tables/", help="folder for tables (%(default)s)")
    files.add_argument(
        "--model_path", default="models/", help="folder with weights MODEL-DATASET.safetensors (%(default)s)"
    )
    files.add_argument("--data_path", help="folder with data sets; by default INVLIB_DATA, or the cache")
    files.add_argument("--name", default="iv", help="goes into the name of the table (%(default)s)")


def _choices(names: Any) -> str:
    return ", ".join(names)


def attack_of(args: argparse.Namespace) -> tuple[str, str]:
    """Return what --optim stands for, and in a sentence why."""
    if args.optim != AUTO:
        return args.optim, "as --optim says"
    if not args.trained_model:
        return (
            "ours",
            "the published one, for the weights are fresh; --optim best takes this project's strongest",
        )
    unheard = _unheard(args)
    if unheard:
        return "ours", f"the published one, for this project's strongest takes no {', '.join(unheard)}"
    return (
        "best",
        "this project's strongest, for the weights are trained; --optim ours takes the published one",
    )


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the 2020 config that the options describe."""
    name, _ = attack_of(args)
    unheard = _unheard(args) if name == "best" else []
    if unheard:
        raise ConfigError(
            f"--optim best was given {', '.join(unheard)}; expected only --iterations, --restarts "
            "and --tv of the attack's options (it chooses the others by itself)"
        )
    return PRESETS[name] | {key: value for key, value in _given(args).items() if value is not None}


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, flag) for key, flag in _FLAGS.items()}


def _unheard(args: argparse.Namespace) -> list[str]:
    """Return the options that are given and that --optim best would not do."""
    given = _given(args)
    unheard = [f"--{_FLAGS[key]}" for key, does in _CHOSEN.items() if given[key] not in (None, does)]
    return [*unheard, "--soft_labels"] if args.soft_labels else unheard


def device_of(name: str | None) -> torch.device:
    """Return the device of ``--device``; None takes a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; expected 'cpu' or 'cuda'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device is {name!r}, but torch finds {torch.cuda.device_count()} GPUs; expected 'cpu'"
        )
    return device
