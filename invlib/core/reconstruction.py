"""What an attack gives back, and the recorder of how it got there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from invlib.settings import Count, checked

Status = Literal["max_steps", "converged", "non_finite", "interrupted", "closed_form"]


@dataclass(frozen=True, kw_only=True)
class History:
    """How the cost fell: one row for each recorded step.

    Args:
        steps: the step of each row.
        cost: ``(rows, restarts)``: objective and priors, as minimised.
        objective: ``(rows, restarts)``: the objective alone.
    """

    steps: list[int] = field(default_factory=list)
    cost: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    objective: Tensor = field(default_factory=lambda: torch.empty(0, 0))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The images that an attack recovered, and what it can say about them without the truth.

    Args:
        images: ``(N, C, H, W)`` in [0, 1], of the restart with the lowest score; of `invlib.exact_batch` the
            M of the N images that were found.
        labels: int64 ``(N,)``, or probabilities ``(N, classes)`` where the client's are soft: those given,
            inferred or optimised; None where a closed form needs none and the update does not tell them.
        score: what the restarts are chosen by, measured on ``images``; NaN where no restart was ever finite.
        trial_scores: ``(R,)``, one score for each restart.
        trials: ``(R, N, C, H, W)`` in [0, 1], the images of each restart.
        status: why the attack stopped: ``max_steps``, ``converged``, ``interrupted``, ``non_finite``
            (no restart ever had a finite score), or ``closed_form``.
        seconds: wall-clock time.
        objective: what ``score`` measures, such as ``"cosine"``.
        evaluations: how often the network's gradient was computed, over all restarts.
        history: how the cost fell.
        engine: what ran the steps: ``"eager"``, ``"batched"``, ``"graphed"`` or ``"forward"``; empty for
            attacks without steps.
        engine_reason: why that was chosen, in a clause.
        chunks: how many restarts ran together, chunk by chunk.
        note: what the attack has to say about its result, in a sentence; may be empty.
        warnings: what makes the result doubtful, a sentence each: facts that contradict each other, guesses.
        residuals: float64 ``(M,)``, of attacks that check each image by itself without the truth: how far it
            is from explaining its part of the update; 0 is exact, NaN could not be checked.
        certified: bool ``(M,)``: whether the server could prove that this image, with its label, is one of
            the client's.
        features: float64 ``(M, d)``, of attacks that recover what a layer behind convolutions was given; the
            images are then searched, and ``residuals`` are the features'.
        expected_psnr: ``(M,)`` in dB: how near the truth the attack says each image is, without seeing it.
        tokens: of text, int64 ``(N, T)``: the tokens of each sequence, -1 where none is known; ``images`` and
            ``trials`` are then empty.
        text: of text with a vocabulary, the sequences as they read.
    """

    images: Tensor
    labels: Tensor | None
    score: float
    trial_scores: Tensor
    trials: Tensor
    status: Status
    seconds: float
    objective: str = ""
    evaluations: int = 0
    history: History = field(default_factory=History)
    engine: str = ""
    engine_reason: str = ""
    chunks: tuple[int, ...] = ()
    note: str = ""
    warnings: tuple[str, ...] = ()
    residuals: Tensor | None = None
    certified: Tensor | None = None
    features: Tensor | None = None
    expected_psnr: Tensor | None = None
    tokens: Tensor | None = None
    text: tuple[str, ...] = ()

    def __repr__(self) -> str:
        if self.tokens is not None:
            known = int((self.tokens >= 0).sum())
            what = f"tokens {'×'.join(str(n) for n in self.tokens.shape)}, {known} known"
        else:
            what = f"images {'×'.join(str(n) for n in self.images.shape)}"
        if self.certified is not None:
            what += f", {int(self.certified.sum())} of {len(self.certified)} certified"
        measured = f" ({self.objective})" if self.objective else ""
        score = in_digits(self.score)
        return (
            f"Reconstruction({what}, score {score}{measured}, status {self.status!r}, "
            f"{len(self.trial_scores)} restart(s), {self.evaluations} evaluations, {self.seconds:.1f} s)"
        )


def in_digits(score: float) -> str:
    """Return a score in four digits; what rounding brings below zero, such as a cosine over 1, is zero."""
    return f"{0.0 if -1e-6 < score < 0 else score:.4g}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a callback is told after a step.

    Args:
        step: steps done, counted from 1; 0 is the start.
        steps: steps there will be.
        restarts: which restarts are running, counted from 0.
        first: whether they are the first of those that run one group after another.
        images: a function giving the best images so far ``(N, C, H, W)`` in [0, 1] of the best running
            restart; nothing is copied from the device until it is called.
        cost: a function giving the lowest cost so far.
    """

    step: int
    steps: int
    restarts: tuple[int, ...]
    images: Callable[[], Tensor]
    cost: Callable[[], float]
    first: bool = True


Callback = Callable[[Progress], bool | None]


class Frames:
    """A callback that records the best images so far, to watch a reconstruction emerge.

    Args:
        every: record each so many steps, and the start and the end.

    Attributes:
        steps: the step of each frame.
        images: a list of ``(N, C, H, W)`` in [0, 1], on the CPU.

    Raises:
        ConfigError: every is not positive.

    Example:
        >>> frames = Frames(every=100)
        >>> frames.steps
        []

    Taught in: chapter 2
    """

    def __init__(self, every: int = 50) -> None:
        self.every: int = checked("Frames every", every, Count)
        self.steps: list[int] = []
        self.images: list[Tensor] = []

    def __call__(self, progress: Progress) -> None:
        """Record a frame where one is due."""
        # Restarts that do not fit together run one group after another; the first group is what is shown.
        if progress.first and (progress.step % self.every == 0 or progress.step == progress.steps):
            self.steps.append(progress.step)
            self.images.append(progress.images().cpu())
