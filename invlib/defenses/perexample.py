"""The clip of each image's gradient, which bounds what one image can change in an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode, gradient
from invlib.core.network import trainable_parameters
from invlib.core.observation import Loss
from invlib.errors import ConfigError
from invlib.federated import rules
from invlib.federated.protocols import loss_by_parameters
from invlib.settings import Checked, Positive


@dataclass(frozen=True)
class PerExample(Checked):
    r"""One client sends the mean of its images' gradients, each of them shortened to a norm at most.

    .. math:: g = \frac1N \sum_n g_n \min\left(1, \frac{C}{\|g_n\|}\right), \quad
        g_n = \nabla_\theta L(f_\theta(x_n), y_n)

    The norm is that of all parameters together. Called like `invlib.FedSGD`, which it equals where no
    gradient is longer than C, and differentiable like it, through the clip. It hides nothing by itself: of
    one image the direction stays, of a batch the images count differently. With noise it is DP-SGD, whose
    noise multiplier z is that of the sum of the gradients:
    ``Defended(PerExample(C), [GaussianNoise(z * C / N)])``.

    Args:
        clip: :math:`C`; as in `torch.nn.utils.clip_grad_norm_` and Opacus, 1e-6 is added to each norm.

    Raises:
        ConfigError: ``clip`` is not positive; when it is called, the network has batch norm that takes its
            statistics from the batch, whose images have no gradients of their own.

    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1. For training, use Opacus or another library
    made for it; this is for the audit.
    """

    clip: Positive

    @property
    def stackable(self) -> bool:
        """Whether the client treats every restart of a stack by itself; a subclass has to say so anew."""
        return type(self) is PerExample

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        on_step: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the mean of the clipped gradients by parameter name."""
        images_apart(model, self)
        params = dict(trainable_parameters(model) if params is None else params)
        if on_step is not None:
            on_step(params, inputs)
        loss_of = loss_by_parameters(model, buffers, loss)
        count, fixed = len(inputs), all(p.is_leaf for p in params.values())
        if mode.kind in ("mapped", "stacked"):  # a restart of N images is N restarts of one image
            apart = {
                name: p.unsqueeze(1).expand(-1, count, *p.shape[1:]).flatten(0, 1)
                for name, p in params.items()
            }
            images, targets = (t.transpose(0, 1).flatten(0, 1)[None] for t in (inputs, labels))
            slopes = gradient(loss_of, apart, images, targets, mode, fixed=fixed)
        else:
            each = [
                gradient(loss_of, params, inputs[n : n + 1], labels[n : n + 1], mode) for n in range(count)
            ]
            slopes = {name: torch.stack([one[name] for one in each]) for name in params}
        clipped = rules.clipped(slopes, self.clip, stacked=True)
        if mode.kind in ("mapped", "stacked"):
            return {name: g.unflatten(0, (-1, count)).mean(1) for name, g in clipped.items()}
        return {name: g.mean(0) for name, g in clipped.items()}

    def mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        """Return the update itself: a mean of gradients, in which long ones count less."""
        return update


def images_apart(model: nn.Module, client: object) -> None:
    """Raise `ConfigError` where batch norm makes of a client's images more than each by itself."""
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ConfigError(
                f"{client} is given a network whose batch norm {name!r} takes its statistics from the "
                "batch; expected evaluation mode, or a normalisation of each image by itself (group norm)"
            )
