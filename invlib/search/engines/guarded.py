"""All restarts at once, or one after another where the network cannot be mapped over them."""

from __future__ import annotations

import torch
from torch import Tensor

from invlib.errors import ConfigError, InvlibError
from invlib.search.problem import Factor, Measure


class Guarded:
    """A step of all restarts together, whose first call shows whether the network can be mapped over them.

    Some cannot: recurrent layers, an ``if`` or ``.item()`` on a tensor, buffers that are written. From that
    call on they are evaluated one after another. A step that fails in that way too is not to blame on the
    mapping, and its own error comes through.

    Args:
        together: evaluates all restarts at once.
        alone: evaluates them one after another.
        insist: raise instead.

    Attributes:
        refused: why they are evaluated one after another; empty where they are not.
    """

    def __init__(self, together: Measure, alone: Measure, *, insist: bool = False) -> None:
        self.together, self.alone, self.insist = together, alone, insist
        self.refused, self._proven = "", False

    def __call__(
        self,
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Evaluate, arguments as for `Measure`.

        Raises:
            ConfigError: the network cannot be mapped, and that was insisted on.
        """
        if self._proven or self.refused:
            measure = self.alone if self.refused else self.together
            return measure(values, rows, sharpness, prior_factor, slopes=slopes)
        device = values[0].device
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        try:
            found = self.together(values, rows, sharpness, prior_factor, slopes=slopes)
        except (torch.OutOfMemoryError, InvlibError):
            raise
        except Exception as error:
            torch.set_rng_state(drawn[0])
            if drawn[1] is not None:
                torch.cuda.set_rng_state(drawn[1], device)
            found = self.alone(values, rows, sharpness, prior_factor, slopes=slopes)
            self.refuse(error)
            return found
        self._proven = len(rows) > 1
        return found

    def refuse(self, error: Exception) -> None:
        """Evaluate restarts one after another from now on, because of an error.

        Raises:
            ConfigError: all at once was insisted on.
        """
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.insist:
            raise ConfigError(
                f"engine='batched' cannot evaluate restarts of this network together ({why}); expected "
                "engine='auto' or 'eager', which take one after another"
            ) from error
        self.refused = why
