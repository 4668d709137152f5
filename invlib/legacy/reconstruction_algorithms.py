"""The reconstructors of 2020, as thin wrappers around `invlib.GradientMatching`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from invlib.attacks import labels as label_inference
from invlib.attacks.published import preset as adapted
from invlib.core.network import in_mode, trainable_parameters
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Observation
from invlib.errors import ConfigError
from invlib.federated import FedAvg, FedSGD
from invlib.federated.capture import from_gradients
from invlib.legacy.config import DEFAULT_CONFIG, Config, attack, checked
from invlib.legacy.costs import reconstruction_costs as reconstruction_costs
from invlib.legacy.metrics import InceptionScore
from invlib.optim.priors import total_variation
from invlib.search.engines.selection import scores
from invlib.search.hooks import Bar, Hook, Told
from invlib.search.problem import Problem
from invlib.search.run import SearchResult, run
from invlib.search.settings import SearchSettings
from invlib.search.state import RestartState, Search

# The restarts' values, their scores, whether each ran, and why the last stopped.
Runs = tuple[list[Tensor], list[float], Tensor, str]


class GradientReconstructor:
    """Recover images from a gradient, as the 2020 code does.

    Where a single image has no label, it is inferred (attribute ``iDLG``) rather than optimised.

    Args:
        model: what the client received; it is not changed.
        mean_std: mean and standard deviation of the images, numbers or tensors ``(C, 1, 1)``.
        config: see `attack`. Its ``scoring_choice`` says what is given back: the restart of lowest cost
            (``"loss"``), total variation (``"tv"``) or `InceptionScore` (``"inception"``); or the mean or
            median of all (``"pixelmean"``, ``"pixelmedian"``).
        num_images: how many images the client used.

    ConfigError where the config or mean_std does not fit; the message names the choices.

    Source: Geiping et al. 2020, arXiv 2003.14053.
    """

    def __init__(
        self,
        model: nn.Module,
        mean_std: tuple[Any, Any] = (0.0, 1.0),
        config: Config = DEFAULT_CONFIG,
        num_images: int = 1,
    ) -> None:
        self.model, self.mean_std, self.num_images = model, mean_std, num_images
        self.config = checked(config)
        self.iDLG = True
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss()
        self._normalization = _normalization(mean_std)
        self._inception = InceptionScore() if self.config["scoring_choice"] == "inception" else None

    def reconstruct(
        self,
        input_data: Sequence[Tensor],
        labels: Tensor | None,
        img_shape: tuple[int, ...] = (3, 32, 32),
        dryrun: bool = False,
        eval: bool = True,
        tol: float | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
        verbose: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Recover the images; Ctrl-C ends the run and gives back the best restart so far.

        Args:
            input_data: the update, one tensor for each parameter.
            labels: int64 ``(N,)``. None infers that of one image, or optimises a soft one that all share.
            img_shape: ``(C, H, W)``.
            dryrun: take one step of one restart.
            eval: run the model in evaluation mode; else in the mode that it is in.
            tol: run restarts one after another, and no more once a score is this low.
            generator: draws the starting points; None is torch's default generator.
            progress: show a progress bar.
            verbose: print the lines of 2020: every 500 iterations the lowest cost, at last the choice's.
            settings: any other setting of `invlib.GradientMatching`, such as ``keep="best"`` or ``chunk``.

        Returns:
            Normalised images ``(N, C, H, W)``, and a dict with ``opt`` (their score, NaN where none is
            finite), ``trial_scores`` (of the restarts that ran) and ``status`` (see `invlib.Reconstruction`).

        ObservationError where update or labels do not fit the model, ConfigError where a setting is unknown.
        """
        generator, began = torch.default_generator if generator is None else generator, time.monotonic()
        observation = from_gradients(
            self.model,
            input_data,
            num_images=self.num_images,
            image_shape=img_shape,
            normalization=self._normalization,
            protocol=self._client(),
            labels=labels,
            training_mode=not eval and self.model.training,
            buffers=dict(self.model.named_buffers()),
        )
        if labels is None and self.num_images == 1 and self.iDLG:
            observation = replace(observation, labels=self._infer(observation))
        how = replace(
            adapted(attack(self.config, generator=generator), settings),
            labels="auto" if observation.labels is not None else "optimize_shared",
            loss=self.loss_fn,
        )
        problem = how.problem(self.model, observation)
        starts = how.starts(problem, observation, generator)
        with in_mode(self.model, training=observation.training_mode):
            hooks: list[Hook] = [Bar(show=progress), *([_Lines()] if verbose else [])]
            hooks += [Told(lambda at: at.step == 1)] if dryrun else []
            together = replace(how, restarts=1 if dryrun or tol is not None else how.restarts).search
            runs = self._run(problem, starts, together, hooks, -math.inf if tol is None else tol)
            images, stats = self._choose(problem, runs)
        if dryrun and stats["status"] == "interrupted":
            stats["status"] = "max_steps"
        if verbose:
            choice = self.config["scoring_choice"]
            combined = f"Computing a combined result via {choice}"
            print(combined if "pixel" in choice else "Choosing optimal result", "...")
            print(f"Optimal result score: {stats['opt']:2.4f}\nTotal time: {time.monotonic() - began}.")
        return images, stats

    def _client(self) -> ClientStep:
        return FedSGD()

    def _infer(self, observation: Observation) -> Tensor:
        return label_inference.infer(self.model, observation).labels

    def _score(self, problem: Problem, inputs: Tensor, logits: Tensor | None) -> float:
        if self.config["scoring_choice"] == "tv":
            return float(total_variation(inputs))
        if self._inception is not None:
            return float(self._inception.to(inputs)(inputs))
        return float(scores(problem, inputs[None], None if logits is None else logits[None]))

    def _run(
        self, problem: Problem, starts: list[Tensor], search: SearchSettings, hooks: list[Hook], tol: float
    ) -> Runs:
        """Run so many restarts at a time as the search has, and no more after a low score or a stop."""
        parts, scores = list[SearchResult](), list[float]()
        for first in range(0, len(starts[0]), search.restarts):
            rows = slice(first, first + search.restarts)
            parts += run(problem, [start[rows] for start in starts], search, hooks)
            images, *logits = parts[-1].values
            for r, image in enumerate(images):
                scores.append(self._score(problem, image, logits[0][r] if logits else None))
            if parts[-1].status == "interrupted" or scores[-1] <= tol:
                break
        values = [torch.cat(ends) for ends in zip(*[p.values for p in parts], strict=True)]
        return values, scores, torch.cat([p.ran for p in parts]), parts[-1].status

    def _choose(self, problem: Problem, runs: Runs) -> tuple[Tensor, dict[str, Any]]:
        [images, *_], measured, ran, status = runs
        scores = torch.where(ran, torch.tensor(measured), torch.nan)
        usable = torch.isfinite(scores)
        stats: dict[str, Any] = {"trial_scores": scores.tolist()}
        stats["status"] = status if usable.any() or status == "interrupted" else "non_finite"
        if "pixel" in self.config["scoring_choice"] and usable.any():
            images = images[usable.to(images.device)]
            mean = self.config["scoring_choice"] == "pixelmean"
            middle = images.mean(0) if mean else images.median(0).values
            known = problem.labels
            if known is None:
                with torch.no_grad():
                    known = self.model(middle).softmax(-1)
            stats["opt"] = float(problem.objective(problem.update(middle, known), problem.target))
            return middle, stats
        best = int(torch.where(usable, scores, torch.inf).argmin())
        stats["opt"] = float(scores[best])
        return images[best].clone(), stats


class FedAvgReconstructor(GradientReconstructor):
    """Recover images from what a client sends after some local steps, as the 2020 code does.

    The local steps are as for `loss_steps`, all else as for `GradientReconstructor`.
    """

    def __init__(
        self,
        model: nn.Module,
        mean_std: tuple[Any, Any] = (0.0, 1.0),
        local_steps: int = 2,
        local_lr: float = 1e-4,
        config: Config = DEFAULT_CONFIG,
        num_images: int = 1,
        use_updates: bool = True,
        batch_size: int = 0,
    ) -> None:
        super().__init__(model, mean_std, config, num_images)
        self.local_steps, self.local_lr = local_steps, local_lr
        self.use_updates, self.batch_size = use_updates, batch_size
        self._client()

    def _client(self) -> ClientStep:
        training = local_training(self.local_steps, self.local_lr, self.batch_size)
        return training if self.use_updates else _NewWeights(**vars(training))

    def _infer(self, observation: Observation) -> Tensor:
        if not self.use_updates:
            before = trainable_parameters(self.model)
            update = {name: new - before[name] for name, new in observation.update.items()}
            training = local_training(self.local_steps, self.local_lr, self.batch_size)
            observation = replace(observation, update=update, protocol=training)
        return super()._infer(observation)


class _NewWeights(FedAvg):
    """A client that sends its new weights instead of their difference to the old ones."""

    def __call__(self, model: nn.Module, *args: Any, **settings: Any) -> dict[str, Tensor]:
        before = settings.get("params") or trainable_parameters(model)
        update = super().__call__(model, *args, **settings)
        return {name: before[name] + value for name, value in update.items()}


class _Lines(Hook):
    """The lines that the 2020 code printed on its way."""

    def step(self, search: Search, state: RestartState) -> bool:
        """Print the iteration, counted from 0, and the lowest cost."""
        if state.step == search.settings.steps or state.step % 500 == 1:
            print(f"It: {state.step - 1}. Rec. loss: {float(state.costs[-1].min()):2.4f}.")
        return False


def _normalization(mean_std: tuple[Any, Any]) -> Normalization:
    channels = []
    for name, value in zip(("mean", "std"), mean_std, strict=True):
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if numbers.ndim >= 3 and numbers.numel() != numbers.shape[-3]:
            shape = tuple(numbers.shape)
            raise ConfigError(f"mean_std: {name} has shape {shape}; expected a number, (C,) or (C, 1, 1)")
        channels.append(numbers.flatten())
    mean, std = torch.broadcast_tensors(*channels)
    return Normalization(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


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

    Args:
        model: what the client received, in training or evaluation mode; it is not changed.
        inputs: normalised images ``(N, C, H, W)``.
        labels: int64 ``(N,)`` or probabilities ``(N, classes)``.
        loss_fn: the client's loss.
        lr: its learning rate.
        local_steps: how many steps.
        use_updates: return the weight differences, after minus before; else the new weights.
        batch_size: images in a step, taken in order and around again; 0 takes all.

    Returns:
        One tensor for each trainable parameter, differentiable with respect to ``inputs``.

    Source: McMahan et al. 2017, arXiv 1602.05629; Geiping et al. 2020, arXiv 2003.14053, section 6.
    """
    client: ClientStep = local_training(local_steps, lr, batch_size)
    params = trainable_parameters(model)
    with in_mode(model, training=model.training):
        update = client(model, inputs, labels, params=params, loss=lambda *of: loss_fn(*of).sum())
    return [value if use_updates else params[name] + value for name, value in update.items()]
