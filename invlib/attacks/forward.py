"""Gradient matching for large networks: the image's gradient without a double backward pass."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp

from invlib.attacks.labels import infer
from invlib.core.network import forward, in_mode, trainable_parameters
from invlib.core.observation import Observation
from invlib.core.reconstruction import History, Reconstruction
from invlib.errors import ConfigError
from invlib.federated import FedSGD
from invlib.optim import objectives, priors
from invlib.optim.optimizers import Adam, Variable
from invlib.optim.schedules import geometric


@dataclass(frozen=True, kw_only=True)
class ForwardMatching:
    r"""The cosine attack with signed Adam, block by block, its image gradient taken forward over reverse.

    The cosine is taken within each block of the network, and :math:`D` is the mean over the blocks of one
    minus cosine: taken over all tensors at once, the few with the largest gradients decide, and the early
    ones, which know where things are, are hardly heard. With :math:`g(x) = \nabla_\theta \ell(x)` and
    :math:`v = \partial D / \partial g`,

    .. math:: \nabla_x D\big(g(x), g^\ast\big) = \frac{\partial}{\partial t}
              \nabla_x \ell_{\theta + t v}(x) \Big|_{t = 0}

    so one forward-mode derivative of the plain input gradient takes the place of the backward pass through a
    backward pass, which is slow for the grouped convolutions of mobile networks. One image, one FedSGD step.

    Args:
        steps: how many steps, one evaluation each.
        restarts: how many starting points; the first is a grey image, the others are noise.
        lr: step size at the start, in normalised units; it falls along a quarter of a cosine.
        tv: weights of total variation at the first and at the last step; geometric in between.

    Raises:
        ConfigError: a setting is out of range.

    Source: the attack is that of Geiping et al. 2020, arXiv 2003.14053, but for the blocks; the derivative is
    that of Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    steps: int = 1000
    restarts: int = 1
    lr: float = 0.1
    tv: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ForwardMatching {name} is {getattr(self, name)}; expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"ForwardMatching lr is {self.lr}; expected a positive number")
        if not all(weight > 0 for weight in self.tv):
            raise ConfigError(f"ForwardMatching tv is {self.tv}; expected two positive numbers")

    def __call__(
        self, model: nn.Module, observation: Observation, *, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Attack an observation.

        Raises:
            ObservationError: the observation does not fit the model.
            ConfigError: it is not of a FedSGD step in evaluation mode.
        """
        began = time.perf_counter()
        observation.validate(model)
        if not isinstance(observation.protocol, FedSGD) or observation.training_mode:
            mode = "training" if observation.training_mode else "evaluation"
            kind = type(observation.protocol).__name__
            raise ConfigError(f"the client ran {kind} in {mode} mode; expected FedSGD in evaluation mode")
        labels = observation.labels if observation.labels is not None else infer(model, observation).labels
        assert labels is not None
        problem = _Problem(model, observation, labels)
        generator = generator or torch.Generator().manual_seed(0)
        with in_mode(model, training=False):
            found = [self._trial(problem, trial, generator) for trial in range(self.restarts)]
            scores = torch.tensor([problem.score(inputs) for inputs, _ in found])
        marks = sorted(found[0][1])
        objective = torch.tensor([[trace[mark] for _, trace in found] for mark in marks])
        history = History(steps=marks, cost=objective, objective=objective)
        trials = torch.stack([observation.normalization.decode(x).clamp(0, 1) for x, _ in found])
        finite = torch.isfinite(scores)
        best = int(torch.where(finite, scores, torch.inf).argmin())
        return Reconstruction(
            images=trials[best],
            labels=labels.clone(),
            score=float(scores[best]),
            trial_scores=scores,
            trials=trials,
            status="max_steps" if finite.any() else "non_finite",
            seconds=time.perf_counter() - began,
            evaluations=self.restarts * (self.steps + 1),
            history=history,
        )

    def _trial(
        self, problem: _Problem, trial: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[int, float]]:
        inputs = torch.zeros(problem.shape)
        if trial:
            inputs = torch.randn(problem.shape, generator=generator)
        inputs = inputs.to(problem.low).clamp(problem.low, problem.high)
        image = Variable(name="images", low=problem.low, high=problem.high)
        walker = Adam(lr=self.lr, signed=True)
        state = walker.init([inputs])
        trace: dict[int, float] = {}
        for step in range(self.steps):
            part = step / self.steps
            weight = geometric(*self.tv, part)

            def evaluate(
                values: list[Tensor], step: int = step, weight: float = weight
            ) -> tuple[Tensor, list[Tensor]]:
                objective, slope = problem.slope(values[0])
                if step % 10 == 0:
                    trace[step] = float(objective)
                return objective, [slope + weight * grad(priors.total_variation)(values[0])]

            walker.step([inputs], [image], state, evaluate, math.cos(part * math.pi / 2))
        return inputs, trace


class _Problem:
    """The distance of a guess's gradient to the observed one, and its slope along the pixels."""

    def __init__(self, model: nn.Module, observation: Observation, labels: Tensor) -> None:
        self.model = model
        self.params = trainable_parameters(model)
        some = next(iter(self.params.values()))
        self.buffers = {name: b.detach() for name, b in model.named_buffers()}
        self.target = [observation.update[name].to(some) for name in self.params]
        blocks = [block(name) for name in self.params]
        self.blocks = [[k for k, own in enumerate(blocks) if own == one] for one in dict.fromkeys(blocks)]
        self.labels = labels.to(some.device)
        self.shape = (observation.num_images, *observation.image_shape)
        self.low, self.high = observation.normalization.box(dtype=some.dtype, device=some.device)

    def loss(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return F.cross_entropy(forward(self.model, params, self.buffers, inputs), self.labels)

    def gradient(self, inputs: Tensor) -> list[Tensor]:
        params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        return list(torch.autograd.grad(self.loss(params, inputs), list(params.values())))

    def objective(self, candidate: Sequence[Tensor]) -> Tensor:
        each = [
            objectives.cosine([candidate[k] for k in rows], [self.target[k] for k in rows])
            for rows in self.blocks
        ]
        return torch.stack(each).mean()

    def score(self, inputs: Tensor) -> float:
        return float(self.objective(self.gradient(inputs)))

    def slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        candidate = [g.detach().requires_grad_() for g in self.gradient(inputs)]
        objective = self.objective(candidate)
        along = dict(zip(self.params, torch.autograd.grad(objective, candidate), strict=True))

        def input_gradient(params: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = grad(lambda x: self.loss(params, x))(inputs)
            return found

        slope: Tensor = jvp(input_gradient, (self.params,), (along,))[1]
        return objective.detach(), slope


def block(name: str) -> str:
    """Return the block of a network that a parameter belongs to: its name up to the numbers, else its module.

    >>> [block(name) for name in ("_blocks.3._bn0.bias", "layer1.0.conv1.weight", "conv1.weight")]
    ['_blocks.3', 'layer1.0', 'conv1']
    """
    numbered = re.match(r"[^.]+(\.\d+)+", name)
    return numbered.group() if numbered else name.rpartition(".")[0]
