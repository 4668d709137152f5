"""The client of the 2020 code: its networks by name, and its local steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from invlib import models
from invlib.core.network import in_mode, trainable_parameters
from invlib.core.observation import ClientStep
from invlib.federated import FedAvg


def construct_model(
    model: str,
    num_classes: int = 10,
    seed: int | None = None,
    num_channels: int = 3,
    modelkey: int | None = None,
) -> tuple[nn.Module, int]:
    """Build an untrained network by name, in training mode like any new module.

    Args:
        model: a name of `invlib.models.names`; ``"ConvNet"`` is ConvNet64.
        num_classes: length of the output.
        seed: makes the initial weights the same every time; None draws one from torch's default generator.
        num_channels: channels of the images.
        modelkey: another name for the seed, which goes before it.

    Returns:
        The network and its seed.

    Raises:
        UnknownNameError: there is no such network.
    """
    key = seed if modelkey is None else modelkey
    if key is None:
        key = int(torch.randint(2**32 - 10, ()))
    name = "ConvNet64" if model == "ConvNet" else model
    network = models.build(name, num_classes=num_classes, in_channels=num_channels, seed=key)
    return network.train(), key


def local_training(local_steps: int, local_lr: float, batch_size: int) -> FedAvg:
    """Return the client of the 2020 code: a last, smaller minibatch is left out, and 0 takes all images."""
    return FedAvg(lr=local_lr, local_steps=local_steps, batch_size=batch_size or None, drop_last=True)


def loss_steps(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    lr: float = 1e-4,
    local_steps: int = 4,
    use_updates: bool = True,
    batch_size: int = 0,
) -> list[Tensor]:
    """Run a client's local steps of plain SGD and return what it sends.

    The whole model runs in training or evaluation mode, as ``model.training`` says, and is not changed.

    Args:
        model: what the client received.
        inputs: normalised images ``(N, C, H, W)``.
        labels: int64 ``(N,)`` or probabilities ``(N, classes)``.
        loss_fn: the client's loss.
        lr: its learning rate.
        local_steps: how many steps.
        use_updates: return the weight differences, after minus before; else the new weights.
        batch_size: images in a step, taken in order and around again; 0 takes all.

    Returns:
        One tensor for each trainable parameter, differentiable with respect to ``inputs``.

    Raises:
        ConfigError: a number is out of range.

    Source: McMahan et al. 2017, arXiv 1602.05629; Geiping et al. 2020, arXiv 2003.14053, section 6.
    """
    client: ClientStep = local_training(local_steps, lr, batch_size)
    params = trainable_parameters(model)
    with in_mode(model, training=model.training):
        update = client(
            model,
            inputs,
            labels,
            params=params,
            loss=lambda logits, targets: loss_fn(logits, targets).sum(),
        )
    return [value if use_updates else params[name] + value for name, value in update.items()]
