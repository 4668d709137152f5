"""Gradient matching for large networks: the image's gradient without a double backward pass."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jvp

from invlib.attacks.base import Settings
from invlib.attacks.doubts import doubted, doubts_of
from invlib.attacks.matching import GradientMatching, hooks_of, reconstruction
from invlib.core.network import forward, in_mode, trainable_parameters
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import ConfigError
from invlib.federated import FedSGD
from invlib.optim import objectives, priors
from invlib.optim.objectives import Objective
from invlib.optim.optimizers import Adam, project_
from invlib.search.engines import Engine
from invlib.search.problem import Factor, Measure, Problem
from invlib.search.run import run
from invlib.settings import Count, Positive


@dataclass(frozen=True, kw_only=True, repr=False)
class ForwardMatching(Settings):
    r"""The cosine attack with signed Adam, block by block, its image gradient taken forward over reverse.

    The cosine is taken within each block of the network, and :math:`D` is the mean over the blocks of one
    minus cosine: taken over all tensors at once, it is dominated by the few with the largest gradients, and
    hardly depends on the early ones, which hold where things are. With :math:`g(x) = \nabla_\theta \ell(x)`
    and :math:`v = \partial D / \partial g`,

    .. math:: \nabla_x D\big(g(x), g^\ast\big) = \frac{\partial}{\partial t}
              \nabla_x \ell_{\theta + t v}(x) \Big|_{t = 0}

    so one forward-mode derivative of the plain input gradient takes the place of the backward pass through a
    backward pass, which is slow for the grouped convolutions of mobile networks. One FedSGD step.

    Args:
        steps: how many steps, one evaluation each.
        restarts: how many starting points; the first is a grey image, the others are noise.
        lr: step size at the start, in normalised units; it falls along a quarter of a cosine.
        tv: weights of total variation at the first and at the last step; geometric in between. Where they
            differ, each restart keeps its last iterate instead of the one with the lowest cost.

    Raises:
        ConfigError: a setting is out of range.

    Source: the attack is that of Geiping et al. 2020, arXiv 2003.14053, but for the blocks; the derivative is
    that of Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    steps: Count = 1000
    restarts: Count = 1
    lr: Positive = 0.1
    tv: tuple[Positive, Positive] = (1.0, 1.0)

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation, with arguments as for `invlib.GradientMatching`.

        Raises:
            ObservationError: the observation does not fit the model.
            ConfigError: it is not of a FedSGD step in evaluation mode.
        """
        began = time.perf_counter()
        model = observation.validate(model)
        if type(observation.protocol) is not FedSGD or observation.training_mode:
            mode = "training" if observation.training_mode else "evaluation"
            kind = type(observation.protocol).__name__
            raise ConfigError(f"the client ran {kind} in {mode} mode; expected FedSGD in evaluation mode")
        matching = GradientMatching(
            objective=cosine_by_block(trainable_parameters(model)),
            priors=((self.tv[0], priors.total_variation),),
            optimizer=Adam(lr=self.lr, signed=True),
            steps=self.steps,
            restarts=self.restarts,
            chunk=1,
        )
        problem = matching.problem(model, observation)
        [starts] = matching.starts(problem, observation, generator or torch.Generator().manual_seed(0))
        starts[0] = 0
        project_(starts, problem.variables[0])
        settings = replace(matching.search, decay=_QuarterCosine(), fading=self.tv[1] / self.tv[0])
        engine = Engine(
            chosen="forward",
            chosen_for="one forward derivative costs less than a second backward pass",
            measure=forward_step(model, problem),
        )
        with in_mode(model, training=False):
            [result] = run(problem, [starts], settings, hooks_of(callback, progress), engine=engine)
            found = reconstruction(problem, result, observation, "cosine by block", began)
        return doubted(found, doubts_of(model, observation))


class _QuarterCosine:
    """The step size falls to zero along a quarter of a cosine."""

    def factor(self, step: int, steps: int) -> float:
        return math.cos(step / steps * math.pi / 2)


def forward_step(model: nn.Module, problem: Problem) -> Measure:
    """Return a step that takes the gradient of each guess forward over reverse, one guess after another.

    Args:
        model: the model that the client received.
        problem: what is minimised: the update is one gradient of the cross-entropy, and pixels are optimised.
    """
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return F.cross_entropy(forward(model, params, buffers, inputs), problem.targets(inputs, None))

    def penalty(inputs: Tensor) -> Tensor:
        return torch.stack([weight * prior(inputs) for weight, prior in problem.priors]).sum()

    def one(inputs: Tensor, prior_factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
        candidate = [g.requires_grad_() for g in grad(loss)(problem.params, inputs).values()]
        with torch.enable_grad():
            objective = problem.objective(candidate, problem.target)
            along = dict(zip(problem.params, torch.autograd.grad(objective, candidate), strict=True))
        slope = jvp(lambda params: grad(loss, argnums=1)(params, inputs), (problem.params,), (along,))[1]
        penalty_slope, value = grad_and_value(penalty)(inputs)
        objective = objective.detach()
        return objective + prior_factor * value, objective, slope + prior_factor * penalty_slope

    def measure(
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        costs, distances, parts = zip(*[one(inputs, prior_factor) for inputs in values[0]], strict=True)
        return torch.stack(costs), torch.stack(distances), [torch.stack(parts)] if slopes else []

    return measure


def cosine_by_block(names: Iterable[str]) -> Objective:
    """Return an objective: the mean, over the blocks of a network, of one minus cosine within the block.

    Args:
        names: of the parameters, in the order of the update.
    """
    blocks = [block(name) for name in names]
    rows = [[k for k, own in enumerate(blocks) if own == one] for one in dict.fromkeys(blocks)]

    def cosine(
        candidate: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float] | None = None
    ) -> Tensor:
        each = [objectives.cosine([candidate[k] for k in own], [target[k] for k in own]) for own in rows]
        return torch.stack(each).mean()

    return cosine


def block(name: str) -> str:
    """Return the block of a network that a parameter belongs to: its name up to the numbers, else its module.

    >>> [block(name) for name in ("_blocks.3._bn0.bias", "layer1.0.conv1.weight", "conv1.weight")]
    ['_blocks.3', 'layer1.0', 'conv1']
    """
    numbered = re.match(r"[^.]+(\.\d+)+", name)
    return numbered.group() if numbered else name.rpartition(".")[0]
