"""The whole step of an attack, traced as one function of plain tensor operations, and compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from invlib.errors import DeviceError

if TYPE_CHECKING:
    from invlib._trials import Problem
    from invlib.engines import Measure


def compiled(problem: Problem, step: Measure) -> Measure:
    """Return a step that is traced and compiled when it is first called with so many restarts.

    Torch keeps what it compiled on the disk, so that the next run with the same network starts faster.
    """
    ready: dict[int, Any] = {}

    def evaluate(
        values: list[Tensor], sharpness: float | None, fade: float | Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        assert sharpness is None  # what `choose` made sure of, as of a fading that is one
        restarts = values[0].shape[0]
        if restarts not in ready:
            # Two differentiations are more than the compiler can look through: it gets the operations that
            # they come down to.
            traced = make_fx(lambda now: step(now, None, 1.0))([v.clone() for v in values])
            ready[restarts] = torch.compile(traced, fullgraph=True)
        try:
            cost, objective, slopes = ready[restarts](values)
        except torch._inductor.exc.InductorError as error:
            raise DeviceError(
                f"engine='compiled' cannot compile here ({str(error).splitlines()[0]}); use engine='auto'"
            ) from error
        return cost, objective, list(slopes)

    return evaluate
