"""The step captured as a CUDA graph, which replaces hundreds of kernel launches by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invlib.search.problem import Factor, Measure

_WARM_UP = 3  # runs before the capture, in which libraries choose their algorithms and take their memory


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A captured step, the memory that it reads and the memory that it writes."""

    graph: torch.cuda.CUDAGraph
    values: list[Tensor]
    prior_factor: Tensor
    results: tuple[Tensor, Tensor, list[Tensor]]


class GraphedStep:
    """A step that is captured when its restarts or its sharpness are new.

    Where torch cannot capture it, because the model waits for the device, say, every later step runs
    uncaptured.

    Args:
        step: what is captured.

    Attributes:
        fallback: why steps are not captured; empty where they are.
    """

    def __init__(self, step: Measure) -> None:
        self.step, self.fallback = step, ""
        self._captured: dict[object, Captured] = {}

    def __call__(
        self,
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Evaluate, arguments as for `Measure`."""
        if not slopes:
            return self.step(values, rows, sharpness, prior_factor, slopes=False)
        key = (tuple(rows), sharpness)
        if key not in self._captured and not self.fallback:
            # One graph at a time: each holds the memory of a whole step.
            self._captured.clear()
            try:
                self._captured[key] = capture(self.step, values, rows, sharpness)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.fallback = str(error).splitlines()[0]
        if self.fallback:
            return self.step(values, rows, sharpness, prior_factor)
        now = self._captured[key]
        for inside, value in zip(now.values, values, strict=True):
            inside.copy_(value)
        now.prior_factor.fill_(prior_factor)
        now.graph.replay()
        cost, objective, parts = now.results
        # Copies: the next replay writes to the same memory.
        return cost.clone(), objective.clone(), [part.clone() for part in parts]


def capture(step: Measure, values: list[Tensor], rows: list[int], sharpness: float | None) -> Captured:
    """Capture a step on copies of the values."""
    inside, factor = [v.detach().clone() for v in values], values[0].new_ones(())
    device = values[0].device
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            step(inside, rows, sharpness, factor)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inside, rows, sharpness, factor)
    return Captured(graph=graph, values=inside, prior_factor=factor, results=results)
