"""The whole step of an attack, traced as one function of plain tensor operations, and compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from invlib.errors import DeviceError

if TYPE_CHECKING:
    from invlib._engines import Measure


def compiled(step: Measure, *, joined: bool) -> Measure:
    """Return a step that is traced and compiled when it is first called with so many restarts.

    Of ``joined`` problems, which restarts they are matters too, for each has its own target.

    Torch keeps what it compiled on the disk, so that the next run with the same network starts faster.
    """
    ready: dict[tuple[int, ...], Any] = {}

    def evaluate(
        values: list[Tensor], rows: list[int], sharpness: float | None, fade: float | Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        assert sharpness is None  # what `choose` made sure of, as of a fading that is one
        key = tuple(rows) if joined else (len(rows),)
        if key not in ready:
            # Two differentiations are more than the compiler can look through: it gets the operations that
            # they come down to.
            traced = make_fx(lambda now: step(now, rows, None, 1.0))([v.clone() for v in values])
            ready[key] = torch.compile(traced, fullgraph=True)
        try:
            cost, objective, slopes = ready[key](values)
        except torch._inductor.exc.InductorError as error:
            raise DeviceError(
                f"engine='compiled' cannot compile here ({str(error).splitlines()[0]}); use engine='auto'"
            ) from error
        return cost, objective, list(slopes)

    return evaluate
