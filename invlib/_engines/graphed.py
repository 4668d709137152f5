"""The step of an attack captured as a CUDA graph: hundreds of kernel launches become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from invlib._engines import Measure

_WARM_UP = 3  # runs before the capture, in which libraries choose their algorithms and take their memory


@dataclass(frozen=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    values: list[Tensor]
    fade: Tensor
    found: tuple[Tensor, Tensor, list[Tensor]]


def graphed(step: Measure) -> Measure:
    """Return a step that is captured when its restarts or its sharpness are new.

    Where torch cannot capture it, because the model waits for the device, say, every later step runs
    uncaptured; `Measure.fallback` of the returned function then says why.
    """
    captured: dict[object, _Captured] = {}

    def evaluate(
        values: list[Tensor], rows: list[int], sharpness: float | None, fade: float | Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if evaluate.fallback:  # type: ignore[attr-defined]
            return step(values, rows, sharpness, fade)
        key = (tuple(rows), sharpness)
        if key not in captured:
            # One graph at a time: each holds the memory of a whole step.
            captured.clear()
            try:
                captured[key] = _capture(step, values, rows, sharpness)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                evaluate.fallback = str(error).splitlines()[0]  # type: ignore[attr-defined]
                return step(values, rows, sharpness, fade)
        now = captured[key]
        for inside, value in zip(now.values, values, strict=True):
            inside.copy_(value)
        now.fade.fill_(fade)
        now.graph.replay()
        cost, objective, slopes = now.found
        # Copies: the next replay writes to the same memory.
        return cost.clone(), objective.clone(), [s.clone() for s in slopes]

    evaluate.fallback = ""  # type: ignore[attr-defined]
    return evaluate


def _capture(step: Measure, values: list[Tensor], rows: list[int], sharpness: float | None) -> _Captured:
    inside, fade = [v.detach().clone() for v in values], values[0].new_ones(())
    aside = torch.cuda.Stream(values[0].device)
    aside.wait_stream(torch.cuda.current_stream(values[0].device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            step(inside, rows, sharpness, fade)
    torch.cuda.current_stream(values[0].device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(inside, rows, sharpness, fade)
    return _Captured(graph=graph, values=inside, fade=fade, found=found)
