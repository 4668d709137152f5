"""What the two programs of 2020 fixed for themselves, and lines for the screen where they differ from here.

The table on the page *Coming from the 2020 code* has it flag by flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

# Flag of 2020 that turned something off, the noun of the flags that say it plainly, and what it is about.
SWITCHES = (
    ("signed", "sign", "use the gradient's sign"),
    ("boxed", "box", "keep images in [0, 1]"),
)
_ITERATIONS = {
    ("reconstruct_image", "ours"): 24_000,
    ("reconstruct_image", "zhu"): 300,
    ("rec_mult", "ours"): 4_800,
    ("rec_mult", "zhu"): 500,
}
# Flags that a program read and did not use, with the value that it took.
_UNUSED: dict[tuple[str, str], dict[str, Any]] = {
    ("reconstruct_image", "ours"): {
        "indices": "def",
        "weights": "equal",
        "init": "randn",
        "scoring_choice": "loss",
    },
    ("reconstruct_image", "zhu"): {
        "cost_fn": "l2",
        "indices": "def",
        "weights": "equal",
        "optimizer": "LBFGS",
    },
    ("rec_mult", "ours"): {"optimizer": "adam"},
    ("rec_mult", "zhu"): {
        "cost_fn": "l2",
        "indices": "def",
        "weights": "equal",
        "optimizer": "LBFGS",
        "iterations": 500,
    },
}


def fixed(program: str, optim: str, accumulation: int) -> dict[str, Any]:
    """Return the part of the 2020 config that depends on the program, nothing for an attack of today."""
    if optim == "best":
        return {}
    config: dict[str, Any] = {"max_iterations": _ITERATIONS[program, optim]}
    if program == "reconstruct_image" and optim == "ours" and accumulation:
        config["lr"] = 1.0
    return config


def notes(args: argparse.Namespace, optim: str) -> Iterator[str]:
    """Yield a line for each way in which the command of 2020 differs from what the same options do here.

    Args:
        args: the options of `add_arguments`.
        optim: the attack that is taken, which ``--optim auto`` leaves open.
    """
    program, single = args.program, args.program == "reconstruct_image"
    for flag, noun, _ in SWITCHES:
        if getattr(args, f"{flag}_of_2020"):
            effect = f"turns the {noun} off" if single else "changes nothing"
            yield f"--{flag} {effect}, as in 2020; --use_{noun} and --no_{noun} say it plainly"
    if args.optim == "best":
        pass  # no command of 2020
    elif optim == "best":
        iterations = _ITERATIONS[program, "ours"]
        yield f"2020 ran ours: cosine, signed Adam, {iterations} iterations from each starting point"
    elif single and args.accumulation:
        if optim == "zhu":
            yield "2020 ran ours with --accumulation, whatever --optim said; here it counts"
    else:
        for flag, value in _UNUSED[program, optim].items():
            if getattr(args, flag) not in (None, value):
                yield f"2020 ignored --{flag} here and took {value}; now it counts"
        if not single and args.soft_labels and (optim != "zhu" or args.accumulation):
            yield "2020 ignored --soft_labels but for --optim zhu without --accumulation; now it counts"
    if optim != "best":
        yield "the best step of each starting point is kept; 2020 kept the last"
    if single and args.trained_model and args.dataset != "ImageNet":
        yield f"2020 ignored --trained_model for {args.dataset} and attacked random weights; now it counts"
    if single and args.dataset == "ImageNet" and args.model.lower() not in ("resnet18", "resnet152"):
        yield f"2020 took resnet18 for ImageNet, whatever --model said; now it is {args.model}"
    if args.target_id is not None and args.target_id < 0:
        car = single and args.num_images == 1 and args.target_id == -1
        there = "a photograph of a car" if car else "images from the end of the data set on"
        yield f"--target_id {args.target_id} takes images that come with invlib; 2020 took {there}"
