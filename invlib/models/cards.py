"""What training leaves on disk: weights with a model card beside them, and checkpoints to go on from."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from invlib.core.files import atomic_write, check_writable, regular
from invlib.core.fingerprint import differences
from invlib.errors import ConfigError, DataError
from invlib.models import weights, zoo


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network in evaluation mode and its model card.

    Args:
        model: the network.
        card: how it was made: model, data, accuracy and test set, every setting, seed, command, commit.
    """

    model: nn.Module
    card: dict[str, Any]


def save(trained: Trained, path: str | os.PathLike[str]) -> Path:
    """Write the weights as safetensors and the card beside them as JSON of the same name.

    Weights are kept in half precision where the card has ``"stored": "float16"``. Both files are written
    beside their place and then renamed.

    Returns:
        The path of the card.

    Raises:
        ConfigError: where the path does not end in ``.safetensors``, or a weight is not finite.
        DataError: where either cannot be written; the weights are not written without their card.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target} ends in {target.suffix!r}; expected a name that ends in '.safetensors'")
    if bad := not_finite(trained.model):
        raise ConfigError(f"{bad} of the network has numbers that are not finite; expected none to save it")
    half = trained.card.get("stored") == "float16"
    state = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in trained.model.state_dict().items()
    }
    card = target.with_suffix(".json")
    text = json.dumps(trained.card, indent=1, ensure_ascii=False) + "\n"
    check_writable(target)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(beside: Path) -> None:
        # not save_file, whose files only their owner can read
        beside.write_bytes(safetensors.torch.save(state))
        atomic_write(card, lambda other: other.write_text(text, encoding="utf-8"))

    atomic_write(target, write)
    return card


def not_finite(model: nn.Module) -> str:
    """Return the name of a parameter or buffer that has NaN or infinite numbers; nothing where none has."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), "")


def load(path: str | os.PathLike[str], model: str | None = None) -> Trained:
    """Read what `save` wrote.

    Args:
        path: the ``.safetensors`` file.
        model: the name of the network; None takes that of the card.

    Raises:
        DataError: where weights or card are missing or corrupt, or do not fit each other.
        UnknownNameError: where the zoo has no model of the name.
        ConfigError: the card is that of another model.
    """
    target = Path(path)
    card = weights.model_card("", target)  # a path names its card by itself
    name = model or card.get("model")
    if name is None:
        raise DataError(f"model card of {target} has no 'model'; expected a card that save() wrote")
    return Trained(model=zoo.build(name, weights=target), card=card)


def own_file(model: str, slug: str, folder: Path) -> Path:
    """Return the file in a folder that weights of a model for a data set are expected in."""
    return folder / f"{model}-{slug}.safetensors"


def find(model: str, slug: str, folder: Path) -> Path | None:
    """Return the file of trained weights: the folder's before the shipped one; None where neither is."""
    own = own_file(model, slug, folder)
    if own.is_file():
        return own
    return weights.locate(model, slug) if slug in weights.available().get(model, ()) else None


def training_command(model: str, dataset: str, out: Path, *flags: str) -> str:
    """Return the command that makes weights which are missing."""
    words = ["--model", model, "--dataset", dataset, *flags, "--out", str(out)]
    return "python -m invlib train " + shlex.join(words)


def write_checkpoint(
    path: Path,
    card: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> None:
    """Keep what `read_checkpoint` needs to go on; `card` holds the settings that must be the same then."""
    state = {
        "settings": card,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    atomic_write(path, lambda beside: torch.save(state, beside))


def read_checkpoint(
    path: Path, card: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """Put a checkpoint into model and optimiser, and return the history of the epochs that are over."""
    regular(path, "checkpoint")
    device = next(model.parameters()).device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        was = state["settings"]
        differ = differences({key: was.get(key) for key in card}, card)
        if not differ:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = list(state["history"])
            for epoch in history:
                float(epoch["loss"]), float(epoch["accuracy"])
            if bad := not_finite(model):
                raise ValueError(bad)
            return history
    except weights.BROKEN as error:
        # torch's own message is a page long and advises to read the file unsafely
        what = f"corrupt checkpoint ({type(error).__name__}), expected one that training wrote"
        raise DataError(f"{path}: {what}; remove it to start anew") from error
    raise ConfigError(f"{path} is the checkpoint of another training: {'; '.join(differ)}")


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: the commit of some repository around it means nothing
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
