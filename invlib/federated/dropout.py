"""What dropout draws during a client's local steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from invlib.autodiff.gradients import LossOf

_DROPPING = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)


class Masks:
    """What dropout draws in the steps of one call of a client, also when a step's graph is made anew.

    Args:
        model: the network; its modes stay as they are.
        how: ``"drawn"`` changes nothing; ``"expected"`` turns dropout off; a seed begins what is drawn.
    """

    def __init__(self, model: nn.Module, how: str | int) -> None:
        self.model, self.how = model, how
        self.states: list[Tensor] = []  # of the generators, after the step before: CPU first

    def of(self, loss_of: LossOf) -> LossOf:
        """Return the loss of the next step."""
        if self.how == "drawn":
            return loss_of
        before = self.states

        def told(params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            if isinstance(self.how, str):
                return self._expected(loss_of, params, inputs, labels)
            with torch.random.fork_rng():
                if before:
                    _restore(before)
                else:
                    torch.manual_seed(self.how)
                loss = loss_of(params, inputs, labels)
                self.states = [torch.get_rng_state(), *_of_devices()]
            return loss

        return told

    def _expected(
        self, loss_of: LossOf, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor
    ) -> Tensor:
        dropping = [m for m in self.model.modules() if isinstance(m, _DROPPING) and m.training]
        try:
            for m in dropping:
                m.training = False
            return loss_of(params, inputs, labels)
        finally:
            for m in dropping:
                m.training = True


def _of_devices() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
