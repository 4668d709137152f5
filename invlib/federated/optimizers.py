"""The settings of a client that trains with an actual optimiser and data loader of torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from invlib.errors import ConfigError, DoubtWarning

_KINDS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
_KNOWN = {
    "sgd": ("lr", "momentum", "dampening", "nesterov", "weight_decay"),
    "adam": ("lr", "betas", "eps", "weight_decay"),
}
# How it computes, not what; and what schedulers write.
_HOW = {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "initial_lr", "swa_lr"}


def settings_of(
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any] | None,
    scheduler: Any,
    per_epoch: bool,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of `invlib.FedAvg`; arguments and errors as for `invlib.FedAvg.from_optimizer`."""
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        raise ConfigError(
            f"optimizer is {type(optimizer).__name__}; expected a torch.optim.SGD, Adam or AdamW"
        )
    group = _common(optimizer)
    if group.pop("decoupled_weight_decay", False):
        kind = "adamw"
    names = _KNOWN["sgd" if kind == "sgd" else "adam"]
    if unknown := [name for name, value in group.items() if name not in names and value]:
        raise ConfigError(
            f"{type(optimizer).__name__} has {unknown[0]}={group[unknown[0]]!r}, which FedAvg does not have; "
            f"expected {', '.join(names)} alone"
        )
    if optimizer.state:
        warnings.warn(
            f"the {type(optimizer).__name__} has taken steps: its client begins with what they left, the "
            "simulated one with nothing",
            DoubtWarning,
            stacklevel=3,
        )
    settings = {name: group[name] for name in names} | {"optimizer": kind} | _batches(loader)
    settings["lr"] = float(settings["lr"])
    if both := [name for name in given if name in settings]:
        raise ConfigError(
            f"{both[0]} is given as {given[both[0]]!r}; expected it from the optimizer or the loader alone"
        )
    settings |= given
    if scheduler is not None:
        settings["lr"] = _rates(optimizer, scheduler, per_epoch, loader, settings)
    return settings


def _common(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the settings that all groups of parameters share."""
    first, *others = ({k: v for k, v in g.items() if k not in _HOW} for g in optimizer.param_groups)
    for other in others:
        for name, value in first.items():
            if other.get(name) != value:
                raise ConfigError(
                    f"groups of parameters have {name}={value!r} and {name}={other.get(name)!r}; expected "
                    "the same settings for all parameters"
                )
    return first


def _batches(loader: DataLoader[Any] | None) -> dict[str, Any]:
    if loader is None:
        return {}
    sampler = type(loader.sampler)
    plain = sampler is SequentialSampler or (
        isinstance(loader.sampler, RandomSampler)
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not plain or loader.batch_size is None or not len(loader):
        raise ConfigError(
            f"the loader draws by {sampler.__name__} with batch_size={loader.batch_size}; expected one that "
            "has batches, of all images in order or shuffled without replacement"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    return {
        "batch_size": loader.batch_size if loader.batch_size < size else None,
        "drop_last": loader.drop_last,
        "shuffle": sampler is RandomSampler,
    }


def _rates(
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    per_epoch: bool,
    loader: DataLoader[Any] | None,
    settings: Mapping[str, Any],
) -> tuple[float, ...]:
    """Return the rate of each local step, by running a copy of the scheduler."""
    steps, epochs = settings.get("local_steps"), settings.get("epochs")
    if loader is None and (per_epoch or steps is None):
        raise ConfigError(f"the loader is None with epochs={epochs}; expected it, to count an epoch's steps")
    each = 1 if loader is None else len(loader)
    count = steps if steps is not None else each * int(epochs or 0)
    memory: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    own, running = copy.deepcopy((optimizer, scheduler), memory)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy takes no steps of the optimiser in between
        for k in range(count):
            rates.append(float(own.param_groups[0]["lr"]))
            if not per_epoch or (k + 1) % each == 0:
                running.step()
    return tuple(rates)
