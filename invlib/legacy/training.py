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

from invlib.errors import ConfigError

Loader = Iterable[tuple[Tensor, Tensor]]
Stats = dict[str, list[float]]
_CPU = {"device": torch.device("cpu"), "dtype": torch.float}
# In 2020 a file of this package.
training_routine = sys.modules[__name__]


@dataclass(kw_only=True)
class Strategy:
    """How a network is trained; fields may be changed (``defs.epochs = 10``), and ``dropout`` does nothing.

    The rate ``lr`` drops tenfold after 3/8, 5/8 and 7/8 of the ``epochs``, and with ``warmup`` first grows
    tenfold over ten of them; every ``validate``-th is followed by a validation.
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
    """Return the recipe ``"conservative"`` or ``"adam"``, with what is given in its place.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipes: dict[str, type[Strategy]] = {"conservative": ConservativeStrategy, "adam": AdamStrategy}
    if strategy not in recipes:
        raise ConfigError(f"strategy is {strategy!r}; expected one of {', '.join(map(repr, recipes))}")
    given: dict[str, Any] = {"lr": lr, "epochs": epochs, "dryrun": dryrun}
    return recipes[strategy](**{key: value for key, value in given.items() if value is not None})


def train(
    model: nn.Module,
    loss_fn: Any,
    trainloader: Loader,
    validloader: Loader,
    defs: Strategy,
    setup: Mapping[str, Any] = _CPU,
    *,
    verbose: bool = False,
) -> Stats:
    """Train a network in place, leave it in evaluation mode, and return losses and accuracies of each epoch.

    Args:
        model: on the device of ``setup``.
        loss_fn: as `construct_dataloaders` returns it.
        trainloader: batches of normalised images ``(N, C, H, W)`` and labels ``(N,)``.
        validloader: likewise.
        defs: a recipe. An epoch whose loss is not finite is the last, with a warning.
        setup: ``device`` and ``dtype``.
        verbose: print a line after each validation.

    Raises:
        ConfigError: the optimizer of the recipe is unknown.
    """
    stats: Stats = defaultdict(list)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        "AdamW": torch.optim.AdamW,
    }
    if defs.optimizer not in kinds:
        raise ConfigError(f"optimizer is {defs.optimizer!r}; expected one of {', '.join(map(repr, kinds))}")
    optimizer = kinds[defs.optimizer](model.parameters(), lr=defs.lr, weight_decay=defs.weight_decay)
    for epoch in range(defs.epochs):
        warm, done = (1 + 0.9 * min(epoch, 10), epoch - 10) if defs.warmup else (1.0, epoch)
        drops = sum(done >= defs.epochs // part for part in (2.667, 1.6, 1.142))
        for group in optimizer.param_groups:
            group["lr"] = defs.lr * warm * 0.1 ** (drops if defs.scheduler == "linear" else 0)
        validate(model.train(), loss_fn, trainloader, defs, setup, stats, "train", optimizer)
        finite = math.isfinite(stats["train_losses"][-1])
        last = defs.dryrun or not finite or epoch == defs.epochs - 1
        if last or epoch % defs.validate == 0:
            validate(model.eval(), loss_fn, validloader, defs, setup, stats)
            line = f"Epoch: {epoch}| lr: {optimizer.param_groups[0]['lr']:.4f} | "
            line += ", ".join(f"{key} {values[-1]:6.4f}" for key, values in stats.items())
            print(f"{line} |\n" if verbose else "", end="")
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
    stats: Stats,
    kind: str = "valid",
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Append the mean loss and accuracy of a loader to ``stats["valid_losses"]`` and ``["valid_Accuracy"]``.

    With an ``optimizer`` it takes a step for each batch.
    """
    (name, _), losses, metrics = loss_fn.metric(), list[float](), list[float]()
    with torch.set_grad_enabled(optimizer is not None):
        for inputs, targets in dataloader:
            labels = targets.to(setup["device"])
            outputs = model(inputs.to(**setup))
            loss = loss_fn(outputs, labels)[0]
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(float(loss))
            metrics.append(float(loss_fn.metric(outputs, labels)[0]))
            if defs.dryrun:
                break
    for key, values in ((f"{kind}_losses", losses), (f"{kind}_{name}", metrics)):
        stats[key] = [*stats.get(key, []), sum(values) / len(values)]
