"""Trained weights: where the shipped ones are, what their model cards say, and whether a file fits."""

import json
import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from invlib.core.files import regular
from invlib.core.normalization import Normalization
from invlib.errors import ConfigError, DataError, UnknownNameError
from invlib.models import efficientnet

# What a card says about how the network is built.
SETTINGS = ("num_classes", "in_channels", "image_size", "activation", "batch_norm")
# What torch.load and load_state_dict raise for a file that they cannot use.
BROKEN = (
    *(OSError, LookupError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, AssertionError),
    *(OverflowError, MemoryError, struct.error, pickle.UnpicklingError, SafetensorError),
)
_TORCH = (".pth", ".pt", ".th")
# Class: how the 2020 code called its tensors, which stand in the same order here.
_NAMES_OF_2020 = {
    "ConvNet": r"model\.(conv|bn)\d\.|model\.linear\.",
    "LeNetZhu": r"body\.[024]\.|fc\.0\.",
    "FullyConnected": r"linear[0-3]\.",
    "DenseNet": r"features\.|classifier\.",
    "MobileNetwork": r"layers\.|classifier\.1\.",
}
# Class: what its tensors of 2020 are called, and why they cannot be used.
_OTHER_IN_2020 = {
    "DenseNet": (r"dense1\.", "there each layer puts its new channels before those it was given, not after"),
    "IRevNet": (r"stack\.|bn1\.|linear\.", "there the squeeze orders the channels in another way"),
}


def available() -> dict[str, tuple[str, ...]]:
    """Return the data sets that each model has shipped weights for: model name → data set slugs."""
    from invlib import data  # late: data brings image readers that building a network does not need

    try:
        folder = data.resource("weights")
    except DataError:
        return {}
    shipped: dict[str, tuple[str, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        card = _read_card(file.with_suffix(".json"))
        model = str(card.get("model"))
        # The file's name is model-slug; both may have a dash in them, so the card tells where to cut.
        shipped[model] = (*shipped.get(model, ()), file.stem.removeprefix(f"{model}-"))
    return shipped


def model_card(name: str, dataset: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the model card of trained weights.

    It has ``model``, ``dataset``, ``num_classes``, ``in_channels``, ``activation``, ``batch_norm``,
    ``normalization`` (``mean`` and ``std``), ``accuracy`` and how the weights were trained.

    Args:
        name: Name of the model, as in ``build``.
        dataset: Slug of a data set, for example ``"fashion-mnist"``, or path of a weights file.
            The card of ``"imagenet"`` for efficientnet_lite0 can be read without the package.

    Raises:
        UnknownNameError: There are no such weights; the message lists those there are.
        DataError: The card is missing or corrupt.

    Taught in: chapter 3
    """
    if name in efficientnet.MODELS and not is_file(dataset):
        return efficientnet.card(name, str(dataset))
    return _read_card(locate(name, dataset).with_suffix(".json"))


def is_file(weights: str | os.PathLike[str]) -> bool:
    """Return whether this is the path of a file, and not the slug of a data set."""
    return isinstance(weights, os.PathLike) or str(weights).endswith((".safetensors", *_TORCH))


def locate(name: str, weights: str | os.PathLike[str]) -> Path:
    """Return the path of a weights file: a shipped one by the slug of its data set, or the path given.

    Raises:
        UnknownNameError: There are no shipped weights of that name; the message lists those there are.
        DataError: The path does not exist.
    """
    from invlib import data

    if is_file(weights):
        path = Path(weights)
        regular(path, "weights file")
        if not path.is_file():
            raise DataError(f"weights file {str(path)!r} does not exist")
        return path
    try:
        return data.resource(f"weights/{name}-{weights}.safetensors")
    except DataError as error:
        shipped = available()
        own = ", ".join(shipped.get(name, ())) or "none"
        others = "; ".join(f"{model} ({', '.join(slugs)})" for model, slugs in shipped.items()) or "no model"
        raise UnknownNameError(
            f"no trained weights {weights!r} for {name!r}, which has: {own}. Weights come with: {others}. "
            f"Train others with: python -m invlib train --model {name} --dataset NAME, "
            f"or give the path of a .safetensors or .pth file"
        ) from error


def card_settings(name: str, path: Path, asked: dict[str, Any], own_activation: str | None) -> dict[str, Any]:
    """Return how the network of a weights file is built: what was asked for, completed from its card.

    Args:
        name: Name of the model.
        path: The weights file. Without a card beside it, the given settings are all there are.
        asked: Settings that the caller gave.
        own_activation: The activation that the family uses where none is named.

    Raises:
        ConfigError: The card is another model's, or contradicts what was asked for (all faults at once).
        DataError: The card is corrupt.
    """
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        return asked
    card = _read_card(card_path)
    if card.get("model", name) != name:
        raise ConfigError(f"{path.name} holds weights of {card['model']!r}; expected weights of {name!r}")
    said = {key: card[key] for key in SETTINGS if key in card}
    if said.get("activation", "") is None:
        said["activation"] = own_activation
    faults = [
        f"{key} is {asked[key]!r}, but the weights have {said[key]!r}"
        for key in asked
        if key in said and said[key] != asked[key]
    ]
    if faults:
        raise ConfigError(f"{path.name} does not fit what was asked for: {'; '.join(faults)}")
    return {key: value for key, value in {**said, **asked}.items() if value is not None}


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` or torch file by name; ``DataError`` where it cannot be read.

    Of a torch file nothing but tensors and plain containers is read (``weights_only=True``).
    """
    regular(path, "weights file")
    try:
        if path.suffix in _TORCH:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path)
    except BROKEN as error:
        # torch's own message advises to read the file unsafely
        reason = error if isinstance(error, SafetensorError) else type(error).__name__
        raise DataError(f"weights file {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise DataError(f"weights file {str(path)!r} has {type(tensors).__name__}; expected a state dict")
    return tensors


def from_2020(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names of this zoo; one that does not come from the 2020 code as it is.

    Args:
        model: the network that it is for.
        tensors: by name, in the order of that code, which is the zoo's: all of a family's, each a weight
            where that is a weight, and so on. Shapes are not looked at.

    Raises:
        DataError: that code's network computes something else from these tensors.
    """
    own, family = list(model.state_dict()), type(model).__name__
    tails = [[name.rpartition(".")[2] for name in names] for names in (own, tensors)]
    if set(tensors) <= set(own) or family not in _NAMES_OF_2020 | _OTHER_IN_2020:
        return dict(tensors)
    pattern, reason = _OTHER_IN_2020.get(family, ("$", ""))
    if any(re.match(pattern, name) for name in tensors):
        raise DataError(
            f"these tensors are of the 2020 code's {family}, and cannot be used: {reason}; train it anew"
        )
    pattern = _NAMES_OF_2020.get(family, "$")
    if tails[0] != tails[1] or not all(re.match(pattern, name) for name in tensors):
        return dict(tensors)
    return dict(zip(own, tensors.values(), strict=True))


def fit(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Put tensors into a network, once their names, shapes and numbers were checked to fit.

    Args:
        model: The network that is changed.
        tensors: One for every parameter and buffer; batch norm's counts of batches may be missing.
        source: What the tensors are, for the message.

    Raises:
        DataError: They do not fit; the message lists every fault.
    """
    tensors, state = from_2020(model, tensors), model.state_dict()
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    faults = [f"{name} is missing" for name in state if name not in tensors and name not in counts]
    for name, tensor in tensors.items():
        if name not in state:
            faults.append(f"{name} is not in the model")
        elif tensor.shape != state[name].shape:
            faults.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(state[name].shape)}")
        elif tensor.is_floating_point() != state[name].is_floating_point() or tensor.is_complex():
            faults.append(f"{name} is of type {tensor.dtype}, expected {state[name].dtype}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} has numbers that are not finite")
    if faults:
        raise DataError(f"{source} do not fit the model: {'; '.join(faults)}")
    model.load_state_dict(tensors, strict=False)


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"model card {str(path)!r} cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise DataError(f"model card {str(path)!r} is a {type(card).__name__}; expected an object")
    try:
        if "normalization" in card:
            Normalization.from_card(card).box()
        if not isinstance(card.get("accuracy"), int | float | None):
            raise ValueError(f"accuracy is {card['accuracy']!r}")
        if not isinstance(card.get("activation"), str | None):
            raise ValueError(f"activation is {card['activation']!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"model card {str(path)!r} is corrupt: {error}") from error
    return card
