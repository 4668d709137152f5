"""What the kernels ask of their arguments, checked before any implementation runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invlib.errors import ConfigError


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to add up in: float64 where any tensor is float64, float32 for everything narrower."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_lists(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float] | None
) -> tuple[float, ...]:
    """Check two gradient lists against each other and return one weight per tensor.

    Raises:
        ConfigError: if the lists are empty or of different length, if two tensors differ in shape or device,
            hold no numbers or no floating-point ones, or if there is not one weight per tensor.
    """
    if len(candidate) != len(target):
        raise ConfigError(
            f"candidate has {len(candidate)} tensors, target has {len(target)}; expected as many"
        )
    if not candidate:
        raise ConfigError("candidate and target are empty; expected at least one tensor each")
    for index, (ours, theirs) in enumerate(zip(candidate, target, strict=True)):
        if ours.shape != theirs.shape:
            raise ConfigError(
                f"tensor {index}: candidate has shape {tuple(ours.shape)}, target has shape "
                f"{tuple(theirs.shape)}; expected equal shapes"
            )
        if ours.device != theirs.device:
            raise ConfigError(
                f"tensor {index}: candidate is on {ours.device}, target is on {theirs.device}; "
                "expected one device"
            )
        if ours.numel() == 0:
            raise ConfigError(f"tensor {index}: shape {tuple(ours.shape)} has zero size; expected numbers")
        if not (ours.is_floating_point() and theirs.is_floating_point()):
            raise ConfigError(
                f"tensor {index}: candidate is {ours.dtype}, target is {theirs.dtype}; "
                "expected floating-point tensors"
            )
    if weights is None:
        return (1.0,) * len(candidate)
    if len(weights) != len(candidate):
        raise ConfigError(
            f"weights has {len(weights)} numbers for {len(candidate)} tensors; expected one each"
        )
    return tuple(float(weight) for weight in weights)


def check_images(images: Tensor, reduction: str) -> None:
    """Check the arguments of total variation.

    Raises:
        ConfigError: if images are not a floating-point ``(N, C, H, W)`` tensor with numbers in it, or the
            reduction is unknown.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ConfigError(f"images has shape {tuple(images.shape)}; expected (N, C, H, W), none of them zero")
    if not images.is_floating_point():
        raise ConfigError(f"images is {images.dtype}; expected a floating-point dtype")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction={reduction!r} is unknown; choose 'mean' or 'sum'")


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """The settings of one Adam step, as `invlib.kernels.adam_step_` explains them."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    signed: bool
    low: Tensor | None
    high: Tensor | None

    def check(self, x: Tensor, **state: Tensor) -> None:
        """Check the settings and the tensors of the step.

        Raises:
            ConfigError: if a tensor does not fit x in shape, device or kind, a bound does not broadcast
                against x, the step is below 1 or a beta is outside [0, 1).
        """
        if not x.is_floating_point():
            raise ConfigError(f"x is {x.dtype}; expected a floating-point dtype")
        for name, tensor in state.items():
            if tensor.shape != x.shape or tensor.device != x.device or not tensor.is_floating_point():
                raise ConfigError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                    f"expected {tuple(x.shape)}, floating-point, on {x.device} like x"
                )
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is None:
                continue
            padded = (1,) * (x.ndim - bound.ndim) + tuple(bound.shape)
            fits = len(padded) == x.ndim and all(b in (1, n) for b, n in zip(padded, x.shape, strict=True))
            if not fits or bound.device != x.device:
                raise ConfigError(
                    f"{name} is {tuple(bound.shape)} on {bound.device}; "
                    f"expected a shape that broadcasts against {tuple(x.shape)}, on {x.device} like x"
                )
        if self.step < 1:
            raise ConfigError(f"step={self.step}; expected 1 for the first step")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}; expected two numbers in [0, 1)")
