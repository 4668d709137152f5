"""Turn the weights that a client received and those that it sends into files on its own machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from invlib.core.convert import as_tensor
from invlib.core.files import atomic_write, check_writable
from invlib.core.normalization import as_normalization
from invlib.errors import ConfigError, ObservationError
from invlib.federated.capture import save_observation
from invlib.federated.protocols import FedAvg
from invlib.federated.record import UNSEEN, Watch

log = logging.getLogger("invlib")
OnError = Literal["log", "raise"]
FACTS = ("num_images", "image_shape", "normalization", "protocol", "training_mode", "loss", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where observations go, and the facts that no message holds.

    Args:
        build_model: makes the network, with whatever weights.
        out: the folder, made where it is missing; its files can be read by their owner alone.
        every: of how many rounds one is recorded; the first always is.
        on_error: what a failure of the recording does: a line in the log, or an error.
        facts: as for `invlib.record_client`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        DataError: the folder cannot be written.
    """

    build_model: Callable[[], nn.Module]
    out: Path
    every: int
    on_error: OnError
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not callable(self.build_model) or isinstance(self.build_model, nn.Module):
            raise ConfigError(
                f"build_model is {self.build_model!r:.80}; expected a function that makes the model"
            )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"every is {self.every!r}; expected a whole number of at least 1")
        if self.on_error not in ("log", "raise"):
            raise ConfigError(f"on_error is {self.on_error!r}; expected 'log' or 'raise'")
        if unknown := [name for name in self.facts if name not in (*FACTS, *UNSEEN)]:
            raise ConfigError(f"{unknown[0]} is no setting; expected some of {[*FACTS, *UNSEEN]}")
        if self.facts.get("protocol") is not None and (both := [n for n in self.facts if n in UNSEEN]):
            raise ConfigError(f"{both[0]} is given beside a protocol; expected it in the protocol itself")
        if len(self.facts.get("image_shape") or (3, 1, 1)) != 1:
            as_normalization(self.facts.get("normalization"))
        object.__setattr__(self, "out", Path(self.out))
        check_writable(self.out / "observation.safetensors")

    def due(self, number: int) -> bool:
        """Say whether the round of that number, from 1 on, is recorded."""
        return (number - 1) % self.every == 0

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Keep what fails in the recording from what is recorded, unless asked."""
        try:
            yield
        except Exception as error:  # build_model may raise anything
            if self.on_error == "raise":
                raise
            log.warning("invlib: %s was not recorded: %s: %s", what, type(error).__name__, error)

    def received(self, arrays: Mapping[str, Any], notes: list[str]) -> nn.Module:
        """Build the network with the weights that came in; torch's global generator stays as it is.

        Args:
            arrays: name → array, or of names that are numbers, in the order of the state dict.
            notes: what is doubtful is added here.

        Raises:
            ObservationError: the weights do not fit the network.
        """
        with torch.random.fork_rng(devices=[]):
            model = self.build_model()
        if not isinstance(model, nn.Module):
            raise ObservationError(f"build_model gives a {type(model).__name__}; expected a torch.nn.Module")
        own, given = model.state_dict(), named(model, arrays)
        if foreign := [name for name in given if name not in own]:
            raise ObservationError(
                f"the message has {foreign[0]!r} and {len(foreign) - 1} more that the model lacks; expected "
                f"the names of build_model's state dict: {', '.join(list(own)[:3])}, …"
            )
        if lacking := [name for name in own if name not in given]:
            notes.append(
                f"the message lacks {lacking[0]!r} and {len(lacking) - 1} more: the numbers that build_model "
                "gives stand in their place"
            )
        try:
            model.load_state_dict(given, strict=False)
        except RuntimeError as error:
            raise ObservationError(f"the weights do not fit the model of build_model: {error}") from error
        return model

    def save(
        self,
        watch: Watch,
        sent: Mapping[str, Any],
        name: str,
        *,
        num_images: int | None,
        notes: list[str],
        protocol: FedAvg | None = None,
    ) -> Path:
        """Write an observation, and beside it, as ``NAME.received.safetensors``, the weights that came in.

        Args:
            watch: of the training.
            sent: the weights that go out; those that are missing count as not sent.
            name: of the file, without its ending.
            num_images: of the client, where its reply says it.
            notes: what is doubtful.
            protocol: of the client, where it is told for this round alone.
        """
        model, facts = watch.received, dict(self.facts)
        weights = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
        after, masks = dict(named(model, sent)), {}
        for missing in [n for n in weights if n not in after]:
            after[missing] = weights[missing]
            if missing in dict(model.named_parameters()):
                masks[missing] = torch.zeros_like(weights[missing]).bool()
        if masks:
            notes.append(
                f"the reply lacks {next(iter(masks))!r} and {len(masks) - 1} more: they count as not sent"
            )
        settings = {n: facts.pop(n) for n in UNSEEN if n in facts}
        facts = dict.fromkeys(FACTS) | facts
        facts["num_images"] = facts["num_images"] or num_images
        facts["protocol"] = facts["protocol"] or protocol
        seen = watch.observation(after, settings=settings, labels=None, sent=masks or None, **facts)
        self.out.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.out / f"{name}.safetensors"
        save_observation(replace(seen, notes=(*notes, *seen.notes)), path)
        atomic_write(
            path.with_suffix(".received.safetensors"),
            lambda beside: safetensors.torch.save_file(weights, beside),
            private=True,
        )
        return path


def named(model: nn.Module, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of arrays by name; where all names are numbers, by the order of the state dict.

    Raises:
        ObservationError: something is no array, or there are more or fewer of them than names.
    """
    tensors = {str(name): as_tensor(f"arrays[{name!r}]", value).clone() for name, value in arrays.items()}
    own = list(model.state_dict())
    if not tensors or not all(re.fullmatch(r"\d+", name) for name in tensors) or {*tensors} & {*own}:
        return tensors
    if len(tensors) != len(own):
        raise ObservationError(
            f"the message has {len(tensors)} arrays; expected {len(own)}, as the state dict"
        )
    return dict(zip(own, tensors.values(), strict=True))
