"""The helpers of 2020: the device, tables of results, seeds, and the options of its commands."""

import argparse
import csv
import datetime
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invlib.errors import ConfigError

_WORDS = (
    "model=ConvNet dataset=CIFAR10 dtype=float optim=ours cost_fn=sim indices=def weights=equal "
    "optimizer=adam scoring_choice=loss init=randn image_path=images/ model_path=models/ "
    "table_path=tables/ data_path=~/data name=iv"
)
_NUMBERS = {"epochs": 120, "accumulation": 0, "num_images": 1, "target_id": None, "restarts": 1, "tv": 1e-4}


def system_startup(args: object = None, defs: object = None) -> dict[str, Any]:
    """Print time, machine and what is given, and return ``device`` and ``dtype`` for ``.to(**setup)``."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if gpu else "cpu")
    print("Currently evaluating -------------------------------:")
    print(datetime.datetime.now().strftime("%A, %d. %B %Y %I:%M%p"))
    print(f"CPUs: {torch.get_num_threads()}, GPUs: {torch.cuda.device_count()} on {socket.gethostname()}.")
    print(*(f"{given}\n" for given in (args, defs) if given is not None), sep="", end="")
    print(f"GPU : {torch.cuda.get_device_name(device)}\n" if gpu else "", end="")
    return {"device": device, "dtype": torch.float}


def save_to_table(out_dir: str | os.PathLike[str], name: str, dryrun: bool, **kwargs: Any) -> None:
    """Append a row to the tab-separated ``table_NAME.csv`` of a folder, and say so; a dry run only says it.

    ConfigError where the table has other columns than the row.
    """
    path = Path(out_dir).expanduser() / f"table_{name}.csv"
    if dryrun:
        print(f"Would save results to {path}.\nWould save these keys: {list(kwargs)}.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        columns = next(csv.reader(file, delimiter="\t"), None)
        if columns not in (None, list(kwargs)):
            raise ConfigError(f"{path} has the columns {columns}; expected those of the row, {list(kwargs)}")
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([*([] if columns else [list(kwargs)]), list(kwargs.values())])
    print(f"Results saved to {path}.")


def set_random_seed(seed: int = 233) -> None:
    """Seed torch's global generators with seed + 1, NumPy's with seed + 4 and Python's with seed + 6."""
    torch.manual_seed(seed + 1)
    torch.cuda.manual_seed_all(seed + 5)
    np.random.seed(seed + 4)  # noqa: NPY002
    random.seed(seed + 6)


def set_deterministic() -> None:
    """Let cuDNN take deterministic algorithms only, and measure none."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def options() -> argparse.ArgumentParser:
    """Return the parser of the 2020 commands; its ``--signed`` and ``--boxed`` switch off, as in 2020."""
    parser = argparse.ArgumentParser(description="The options of the 2020 code.")
    for flag, word in (pair.split("=") for pair in _WORDS.split()):
        parser.add_argument(f"--{flag}", default=word)
    for flag, number in _NUMBERS.items():
        parser.add_argument(f"--{flag}", default=number, type=float if flag == "tv" else int)
    for flag in ("trained_model", "label_flip", "save_image", "deterministic", "dryrun", "signed", "boxed"):
        action = "store_false" if flag in ("signed", "boxed") else "store_true"
        parser.add_argument(f"--{flag}", action=action)
    return parser
