"""A filter for NVIDIA FLARE that records what a client sends, in files on the client's own machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from invlib.errors import ConfigError, DependencyError, ObservationError
from invlib.federated.protocols import FedAvg
from invlib.federated.record import Watch
from invlib.integrations.saving import OnError, Saving, log, named

try:
    from nvflare.apis.dxo_filter import DXOFilter
except ModuleNotFoundError:  # said when a filter is made
    DXOFilter = object

_RECEIVED = "invlib_received"  # in FLARE's context: the weights of the task, on the client alone


class RecordUpdates(DXOFilter):
    """Save the observation of each training round in a file; what is filtered passes as it is.

    Add it twice to the client, both for the task ``train``: as a filter of the task's data, where it keeps
    the weights that come in, and as the last filter of the task's result, where it sees what really leaves.

    Args:
        build_model: makes the client's network, with whatever weights: a function, or where it is,
            ``"package.module:function"``.
        out: the folder on the client's machine.
        protocol: the settings of `invlib.FedAvg`, how the client trains; without ``epochs`` and
            ``local_steps`` the number of steps is that which the result says.
        facts: as for `invlib.record_client`: ``num_images``, ``image_shape``, ``normalization``,
            ``training_mode``, ``loss``, ``vocabulary``.
        every: of how many rounds one is recorded; the first always is.
        on_error: ``"log"`` lets the round go on where the recording fails; ``"raise"`` ends it.

    Raises:
        ConfigError: a setting is unknown or out of range, or there is no such function.
        DataError: the folder cannot be written.
        DependencyError: FLARE is not installed.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module] | str,
        out: str,
        protocol: Mapping[str, Any],
        facts: Mapping[str, Any],
        every: int = 1,
        on_error: OnError = "log",
    ) -> None:
        if DXOFilter is object:
            raise DependencyError(
                "nvflare is not installed, of which this is a filter; `pip install nvflare` brings it"
            )
        kinds = ["WEIGHTS", "WEIGHT_DIFF"]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        # FLARE reads them off again when it writes the configuration of a job.
        self.build_model, self.out, self.protocol, self.facts = build_model, out, dict(protocol), dict(facts)
        self.every, self.on_error = every, on_error
        if "protocol" in facts:
            raise ConfigError("protocol is given in facts; expected it beside them")
        FedAvg(**{"local_steps": 1, **protocol} if "epochs" not in protocol else protocol)
        self._saving = Saving(
            build_model=_function(build_model) if isinstance(build_model, str) else build_model,
            out=out,  # type: ignore[arg-type] # becomes a path
            every=every,
            on_error=on_error,
            facts={"training_mode": True, **facts},
        )

    def process_dxo(self, dxo: Any, shareable: Any, fl_ctx: Any) -> None:
        """Keep the weights that come in, and save what goes out; None says that nothing is changed."""
        number = dxo.get_meta_prop("current_round", shareable.get_header("current_round", None))
        comes_in = self.get_prop("__chain_type") == "task_data"
        with self._saving.guarded(f"round {number}"):
            if comes_in:
                fl_ctx.set_prop(_RECEIVED, (number, _copied(dxo.data)), private=True, sticky=True)
                return
            kept, arrays = fl_ctx.get_prop(_RECEIVED) or (None, None)
            if arrays is None:
                raise ObservationError(
                    "no weights came in through RecordUpdates; expected it among the task's data filters too"
                )
            number = kept if number is None else number
            # FLARE counts rounds from 0
            if number is None or not self._saving.due(int(number) + 1):
                return
            notes = list[str]()
            watch = Watch(self._saving.received(arrays, notes))
            sent = _copied(dxo.data)
            if dxo.data_kind == "WEIGHT_DIFF":
                before = named(watch.received, arrays)
                sent = {n: before[n] + d for n, d in named(watch.received, sent).items() if n in before}
            steps = dxo.get_meta_prop("NUM_STEPS_CURRENT_ROUND", None)
            protocol = dict(self.protocol)
            if not {"epochs", "local_steps"} & {*protocol}:
                if steps is None:
                    raise ObservationError(
                        "the result says no steps; expected epochs or local_steps in protocol"
                    )
                protocol["local_steps"] = int(steps)
            site = re.sub(r"[^\w-]", "_", str(fl_ctx.get_identity_name()))
            name = f"round-{int(number):04d}-{site}"
            path = self._saving.save(
                watch, sent, name, num_images=None, notes=notes, protocol=FedAvg(**protocol)
            )
            log.info("invlib: round %s is recorded in %s", number, path)


def _copied(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if hasattr(value, "copy") else value for name, value in arrays.items()}


def _function(place: str) -> Callable[[], nn.Module]:
    """Return the function at ``package.module:function``."""
    module, _, name = place.partition(":")
    try:
        found: Callable[[], nn.Module] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"build_model is {place!r}: {error}; expected 'package.module:function' that can be imported"
        ) from error
    return found
