"""Softplus in the place of ReLU while an attack optimises its guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from invlib.settings import Checked, Positive


@dataclass(frozen=True, kw_only=True)
class Smoothing(Checked):
    r"""The sharpness of the softplus in the place of ReLU during an attack, from first step to last.

    The gradient of a ReLU network depends on which units are active only through a step function, whose slope
    is zero: the gradient of the objective does not say that moving the image would activate a unit. While the
    image is optimised, each :math:`\max(0, x)` of the *candidate* (and each clip, as in ReLU6, likewise) is
    therefore

    .. math:: \tfrac1\beta \log(1 + e^{\beta x}), \qquad
              \beta_k = \beta_0\,(\beta_1 / \beta_0)^{k / (K - 1)},

    which sharpens until it is almost the network that the client has. The observed update, and every score
    that is reported, are those of the network with its ReLUs.

    Args:
        start: :math:`\beta_0`, in units of one over an activation.
        end: :math:`\beta_1`.

    Raises:
        ConfigError: a sharpness is not positive.

    Source: this project's; compare graduated optimisation, Blake and Zisserman 1987, "Visual Reconstruction".

    Taught in: chapter 3
    """

    start: Positive = 4.0
    end: Positive = 30.0

    def sharpness(self, step: int, steps: int) -> float:
        """Return the sharpness at a step, counted from 0, of a run of so many steps."""
        part = min(step / max(steps - 1, 1), 1.0)
        return float(self.start * (self.end / self.start) ** part)


# Replaced as functions, not as modules, so that a network that calls torch.relu by itself is smoothed too
# and none is changed.
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_RELU6 = {F.relu6}
_CLIP = {F.hardtanh, F.hardtanh_}  # what nn.ReLU6 calls
_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_}


class _Rounded(TorchFunctionMode):
    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _RELU | _RELU6 | _CLIP:
            return func(*args, **kwargs)
        x, *settings = args if args else (kwargs.pop("input"),)
        ends = 2 if func in _CLIP else 0  # what comes before the flag of in-place forms
        in_place = func in _IN_PLACE or kwargs.pop("inplace", settings[ends:] == [True])
        given = x.clone() if in_place else x  # softplus keeps what it is given for its backward pass
        if func in _RELU:
            output = F.softplus(given, beta=self.sharpness)
        elif func in _RELU6:
            output = self.clipped(given, 0.0, 6.0)
        else:
            output = self.clipped(given, *settings[:ends], **kwargs)
        return x.copy_(output) if in_place else output

    def clipped(self, x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
        above = F.softplus(x - min_val, beta=self.sharpness) - F.softplus(x - max_val, beta=self.sharpness)
        return above + min_val


@contextmanager
def rounded(sharpness: float | None) -> Iterator[None]:
    """Within this context every ReLU is a softplus of that sharpness; with None nothing changes.

    Taught in: chapter 3
    """
    if sharpness is None:
        yield
    else:
        with _Rounded(sharpness):
            yield
