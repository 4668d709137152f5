"""The training of 2020: its recipes, and epochs over a loader."""

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invlib.legacy.costs import named

Loader = Iterable[tuple[Tensor, Tensor]]
_CPU = {"device": torch.device("cpu"), "dtype": torch.float}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "AdamW": torch.optim.AdamW,
}
# In 2020 a file of this package.
training_routine = sys.modules[__name__]


@dataclass(kw_only=True)
class Strategy:
    """How a network is trained; fields may be changed (``defs.epochs = 10``), and ``dropout`` does nothing.

    ``lr`` drops tenfold after 3/8, 5/8, 7/8 of the epochs; with ``warmup`` it first grows tenfold over ten.
    """

    epochs: int = 120
    batch_size: int = 128
    optimizer: str = "SGD"
    lr: float = 0.1
    scheduler: str = "linear"
    weight_decay: float = 5e-4
    validate: int = 10
    warmup: bool = False
    dryrun: bool = False
    dropout: float = 0.0
    augmentations: bool = True


class ConservativeStrategy(Strategy):
    """Stochastic gradient descent with Nesterov momentum 0.9."""


@dataclass(kw_only=True)
class AdamStrategy(Strategy):
    """AdamW with a warm-up."""

    batch_size: int = 32
    optimizer: str = "AdamW"
    lr: float = 1e-4
    warmup: bool = True


def training_strategy(
    strategy: str, lr: float | None = None, epochs: int | None = None, dryrun: bool = False
) -> Strategy:
    """Return the recipe ``"conservative"`` or ``"adam"``, changed by what is given; else ConfigError."""
    recipes = {"conservative": ConservativeStrategy, "adam": AdamStrategy}
    given: dict[str, Any] = {"lr": lr, "epochs": epochs, "dryrun": dryrun}
    return recipes[named("strategy", strategy, recipes)](
        **{key: value for key, value in given.items() if value is not None}
    )


def train(
    model: nn.Module,
    loss_fn: Any,
    trainloader: Loader,
    validloader: Loader,
    defs: Strategy,
    setup: Mapping[str, Any] = _CPU,
    *,
    verbose: bool = False,
) -> dict[str, list[float]]:
    """Train a network in place, leave it in evaluation mode, and return losses and accuracies of each epoch.

    ``loss_fn`` and the loaders are as `construct_dataloaders` returns them, ``setup`` has ``device`` and
    ``dtype``, and ``verbose`` prints a line after each validation. An epoch whose loss is not finite is the
    last, with a warning. ConfigError where the optimizer of ``defs`` is unknown.
    """
    stats: dict[str, list[float]] = defaultdict(list)
    kind = _OPTIMIZERS[named("optimizer", defs.optimizer, _OPTIMIZERS)]
    optimizer = kind(model.parameters(), weight_decay=defs.weight_decay)
    for epoch in range(defs.epochs):
        warm, done = (1 + 0.9 * min(epoch, 10), epoch - 10) if defs.warmup else (1.0, epoch)
        drops = sum(done >= defs.epochs // part for part in (2.667, 1.6, 1.142))
        rate = defs.lr * warm * 0.1 ** (drops if defs.scheduler == "linear" else 0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        validate(model.train(), loss_fn, trainloader, defs, setup, stats, "train", optimizer)
        finite = math.isfinite(stats["train_losses"][-1])
        last = defs.dryrun or not finite or epoch == defs.epochs - 1
        if last or epoch % defs.validate == 0:
            validate(model.eval(), loss_fn, validloader, defs, setup, stats)
            if verbose:
                (name, form), line = loss_fn.metric(), f"Epoch: {epoch}| lr: {rate:.4f} |"
                for short, key in (("Train", "train"), ("Val", "valid")):
                    line += f" {short} loss is {stats[f'{key}_losses'][-1]:6.4f},"
                    line += f" {short} {name}: {stats[f'{key}_{name}'][-1]:{form}} |"
                print(line)
        if not finite:
            warnings.warn(f"the loss of epoch {epoch} is not finite; the training ends here", stacklevel=2)
        if last:
            break
    return stats


def validate(
    model: nn.Module,
    loss_fn: Any,
    dataloader: Loader,
    defs: Strategy,
    setup: Mapping[str, Any],
    stats: dict[str, list[float]],
    kind: str = "valid",
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Append the mean loss and accuracy to ``stats``; with an ``optimizer``, train on the way."""
    losses, metrics = list[float](), list[float]()
    with torch.set_grad_enabled(optimizer is not None):
        for inputs, targets in dataloader:
            outputs, labels = model(inputs.to(**setup)), targets.to(setup["device"])
            loss = loss_fn(outputs, labels)[0]
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
            metrics.append(float(loss_fn.metric(outputs, labels)[0]))
            if defs.dryrun:
                break
    for key, values in ((f"{kind}_losses", losses), (f"{kind}_{loss_fn.metric()[0]}", metrics)):
        stats[key] = [*stats.get(key, []), sum(values) / len(values)]
