"""Bring an update that was captured anywhere into invlib: lists, arrays, state dicts and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from invlib.core.files import atomic_write
from invlib.core.network import trainable_parameters
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Observation
from invlib.errors import DataError, InvlibError, ObservationError
from invlib.federated.protocols import FedAvg, FedSGD

FORMAT = "invlib-observation-1"
_MOST = 1_000_000  # images, pixels a side, local steps: more is a broken header, which would take hours


def from_gradients(
    model: nn.Module,
    gradients: Iterable[Tensor],
    *,
    num_images: int,
    image_shape: tuple[int, int, int],
    normalization: Normalization,
    protocol: ClientStep | None = None,
    labels: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    training_mode: bool = False,
) -> Observation:
    """Make an observation of a list of gradients in the order of ``model.parameters()``.

    Args:
        model: the model that the client received.
        gradients: one tensor for each trainable parameter, as `torch.autograd.grad` gives them.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)``.
        normalization: how the client encodes images in [0, 1].
        protocol: the client's step; None is `invlib.FedSGD`.
        labels: int64 ``(N,)`` where they are known.
        buffers: the client's batch-norm statistics, where it sent them.
        training_mode: whether the client ran the model in training mode.

    Raises:
        ObservationError: the list is too short or too long, or the observation does not fit the model.

    Taught in: chapter 1
    """
    names = list(trainable_parameters(model))
    tensors = list(gradients)
    if len(tensors) != len(names):
        raise ObservationError(
            f"gradients has {len(tensors)} tensors; expected {len(names)}, one for each trainable parameter "
            f"in the order {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        )
    return from_arrays(
        model,
        dict(zip(names, tensors, strict=True)),
        num_images=num_images,
        image_shape=image_shape,
        normalization=normalization,
        protocol=protocol,
        labels=labels,
        buffers=buffers,
        training_mode=training_mode,
    )


def from_arrays(
    model: nn.Module,
    arrays: Mapping[str, Any],
    *,
    num_images: int,
    image_shape: tuple[int, int, int],
    normalization: Normalization,
    protocol: ClientStep | None = None,
    labels: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    training_mode: bool = False,
) -> Observation:
    """Make an observation of a mapping from parameter names to arrays (NumPy or torch).

    Arguments and errors as for `from_gradients`.
    """
    observation = Observation(
        update={name: torch.as_tensor(value).detach().clone() for name, value in arrays.items()},
        protocol=protocol or FedSGD(),
        num_images=num_images,
        image_shape=(image_shape[0], image_shape[1], image_shape[2]),
        normalization=normalization,
        labels=labels,
        buffers=dict(buffers or {}),
        training_mode=training_mode,
    )
    observation.validate(model)
    return observation


def from_state_dicts(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    protocol: FedAvg,
    num_images: int,
    image_shape: tuple[int, int, int],
    normalization: Normalization,
    labels: Tensor | None = None,
    training_mode: bool = False,
) -> Observation:
    """Make an observation of a client's state dict before and after its local training.

    What is no parameter in ``after`` (batch-norm statistics) becomes the observation's buffers. The
    attack starts from ``model``, which has to hold the weights of ``before``.

    Args:
        model: the model, with the weights of ``before``.
        before: the state dict that the client received.
        after: the state dict that it sent back.
        protocol: how it trained.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)``.
        normalization: how the client encodes images in [0, 1].
        labels: int64 ``(N,)`` where they are known.
        training_mode: whether the client ran the model in training mode.

    Raises:
        ObservationError: the two differ in names, or the observation does not fit the model.

    Taught in: chapter 4
    """
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise ObservationError(f"the state dicts differ in {differing[:5]}; expected the same names in both")
    names = trainable_parameters(model)
    return from_arrays(
        model,
        {name: after[name] - before[name] for name in names if name in after},
        num_images=num_images,
        image_shape=image_shape,
        normalization=normalization,
        protocol=protocol,
        labels=labels,
        buffers={name: value for name, value in after.items() if name not in names},
        training_mode=training_mode,
    )


def save_observation(observation: Observation, path: str | Path) -> None:
    """Save an observation as one safetensors file with a JSON header; no code is stored in it.

    Args:
        observation: what the server saw; its protocol is `invlib.FedSGD` or `invlib.FedAvg`.
        path: where to; written beside and then renamed; only its owner can read it.

    Raises:
        ObservationError: the protocol is another one.
        DataError: the file cannot be written.

    Taught in: chapter 4
    """
    protocol = observation.protocol
    # A subclass with a rule of its own would come back without it.
    kind = next((k for k in (FedSGD, FedAvg) if type(protocol).__call__ is k.__call__), None)
    if kind is None:
        raise ObservationError(f"protocol is {type(protocol).__name__}; expected FedSGD or FedAvg to save it")
    header = {
        "format": FORMAT,
        "protocol": kind.__name__,
        "protocol_settings": {f.name: getattr(protocol, f.name) for f in fields(kind)},
        "num_images": observation.num_images,
        "image_shape": observation.image_shape,
        "normalization": asdict(observation.normalization),
        "training_mode": observation.training_mode,
        "order": list(observation.update),
    }
    tensors = {f"update/{name}": value.contiguous() for name, value in observation.update.items()}
    tensors |= {f"buffers/{name}": value.contiguous() for name, value in observation.buffers.items()}
    if observation.labels is not None:
        tensors["labels"] = observation.labels
    # a tensor under two names is kept twice: the file format knows no shared memory
    shared: set[int] = set()
    for name, value in tensors.items():
        tensors[name] = value.clone() if value.data_ptr() in shared else value
        shared.add(value.data_ptr())
    metadata = {"invlib": json.dumps(header)}
    atomic_write(
        Path(path), lambda beside: safetensors.torch.save_file(tensors, beside, metadata), private=True
    )


def load_observation(path: str | Path) -> Observation:
    """Load what `save_observation` wrote.

    Raises:
        DataError: the file is missing, corrupt, or holds something else.

    Taught in: chapter 4
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no observation at {path}; expected a file that save_observation wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("invlib", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, RecursionError, OSError, MemoryError) as error:
        raise DataError(f"{path} is corrupt or no observation: {error}") from error
    found = header.get("format") if isinstance(header, dict) else header
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r:.60}; expected {FORMAT!r}")
    try:
        return _observation(header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, InvlibError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} holds no whole observation: {reason}") from error


def _observation(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Observation:
    """Build an observation of the header and the tensors of a file; what is wrong raises."""
    kind = {"FedSGD": FedSGD, "FedAvg": FedAvg}[header["protocol"]]
    count, shape, mode = header["num_images"], header["image_shape"], header["training_mode"]
    if type(count) is not int or not 1 <= count <= _MOST:
        raise ValueError(f"num_images is {count!r}; expected a whole number from 1 to {_MOST:,}")
    sides = shape if isinstance(shape, list) and len(shape) == 3 else [0]
    if not all(type(side) is int and 0 < side < _MOST for side in sides):
        raise ValueError(f"image_shape is {shape!r}; expected three positive whole numbers")
    if type(mode) is not bool:
        raise ValueError(f"training_mode is {mode!r}; expected true or false")
    settings = header["protocol_settings"]
    for name, value in settings.items():
        if isinstance(value, int | float) and not value < _MOST:
            raise ValueError(f"{kind.__name__} {name} is {value!r}; expected less than {_MOST:,}")
    normalization = Normalization.from_card(header)
    if not all(map(math.isfinite, (*normalization.mean, *normalization.std))):
        raise ValueError(f"{normalization} has numbers that are not finite")
    if len(normalization.mean) not in (1, shape[0]):
        raise ValueError(f"{normalization} has another number of channels than image_shape {shape}")
    update = {name: tensors[f"update/{name}"] for name in header["order"]}
    if len(update) != sum(name.startswith("update/") for name in tensors):
        raise ValueError(f"'order' names {len(update)} tensors of the update, which has others too")
    labels = tensors.get("labels")
    if labels is not None and (labels.dtype != torch.int64 or tuple(labels.shape) != (count,)):
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({count},)")
    return Observation(
        update=update,
        protocol=kind(**settings),
        num_images=count,
        image_shape=(shape[0], shape[1], shape[2]),
        normalization=normalization,
        labels=labels,
        buffers={n.removeprefix("buffers/"): t for n, t in tensors.items() if n.startswith("buffers/")},
        training_mode=mode,
    )
