"""A mod for Flower's ``ClientApp`` that records, and checks, what a client sends, on its own machine."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from invlib.core.observation import Observation
from invlib.errors import ConfigError, DoubtWarning, InvlibError
from invlib.federated.capture import load_observation
from invlib.federated.record import Watch
from invlib.integrations.saving import OnError, Saving, log

# Mods of Flower that measure what is sent and leave it as it is.
_HARMLESS = {"arrays_size_mod", "message_size_mod"}
_NOT_SENT = "the client does not send its update"  # all that the server is told of it
Data = Callable[[Any], tuple[Any, Any]]
OnLeak = Literal["log", "raise", "withhold"]


def record_updates(
    build_model: Callable[[], nn.Module],
    *,
    out: Any,
    every: int = 1,
    on_error: OnError = "log",
    data: Data | None = None,
    on_leak: OnLeak = "log",
    **facts: Any,
) -> UpdateRecorder:
    """Make a mod that saves the observation of each training round in a file; the reply passes as it is.

    With ``data`` it also asks `invlib.presend` which of the client's images the recorded update would give
    away. What was found stands in the client's log, and nowhere else.

    It goes first into ``ClientApp(mods=[...])``: mods that stand before it change the reply after it was
    recorded, of which it warns. Nothing that it finds is put into a message. The optimiser, its rates and
    steps, the batches and the mode are seen while the client trains, as by `invlib.record_client`; the number
    of images is the reply's ``num-examples``.

    Args:
        build_model: makes the client's network, with whatever weights; those of the message are loaded.
        out: the folder on the client's machine; files are named by round and node, and one beside each holds
            the weights that came in.
        every: of how many rounds one is recorded; the first always is.
        on_error: ``"log"`` lets the round go on where the recording fails; ``"raise"`` ends it.
        data: takes Flower's context and returns the images ``(N, C, H, W)`` in [0, 1] and the labels that the
            client trains on in this round.
        on_leak: what is done unless the check says ``"send"``, and where it fails: ``"log"`` sends all the
            same; ``"raise"`` ends the round with an error that says nothing else; ``"withhold"`` sends the
            weights that came in back, an update of zero. The reply's metrics leave as they are, and the
            server sees that an update is missing.
        **facts: as for `invlib.record_client`, what a message does not say: ``normalization``, and where they
            are not seen ``num_images``, ``image_shape``, ``protocol``, ``training_mode``, ``loss``,
            ``vocabulary``, ``clip_norm``, ``proximal``, ``dropout``, ``shuffle``, ``orders``.

    Raises:
        ConfigError: a setting is unknown or out of range.
        DataError: the folder cannot be written.
    """
    saving = Saving(build_model=build_model, out=out, every=every, on_error=on_error, facts=facts)
    if data is not None and not callable(data):
        raise ConfigError(f"data is {data!r:.80}; expected a function of the context, or None")
    if on_leak not in ("log", "raise", "withhold"):
        raise ConfigError(f"on_leak is {on_leak!r}; expected 'log', 'raise' or 'withhold'")
    if on_leak != "log" and (data is None or every != 1):
        raise ConfigError(
            f"on_leak is {on_leak!r} with data={data!r:.40} and every={every}; expected data and every=1, or "
            "rounds are not checked"
        )
    return UpdateRecorder(saving, data, on_leak)


@dataclass(frozen=True)
class UpdateRecorder:
    """The mod that `record_updates` makes: ``(message, context, call_next) -> reply``."""

    saving: Saving
    data: Data | None = None
    on_leak: OnLeak = "log"

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        """Let the client train and save what it sends; unless it is withheld, it is handed on as it came."""
        if str(message.metadata.message_type).partition(".")[0] != "train":
            return call_next(message, context)
        number, watch, notes = _round(message), None, list[str]()
        if not self.saving.due(number):
            return call_next(message, context)
        what, action = f"round {number}", "send" if self.data is None else "unchecked"
        arrived = {n: a for record in message.content.array_records.values() for n, a in record.items()}
        with self.saving.guarded(what):
            notes += _doubts_of_place(self, call_next)
            watch = Watch(self.saving.received(_arrays(message), notes))
        with watch or nullcontext():
            reply = call_next(message, context)
        if reply.has_error():
            log.info("invlib: %s was not recorded: the client replied with an error", what)
            return reply
        if watch is not None:
            path = None
            with self.saving.guarded(what):
                name = f"round-{number:04d}-node-{getattr(context, 'node_id', 0)}"
                path = self.saving.save(watch, _arrays(reply), name, num_images=_examples(reply), notes=notes)
                log.info("invlib: %s is recorded in %s", what, path)
            if self.data is not None and path is not None:
                with self.saving.guarded(f"the check of {what}"):
                    seen = replace(load_observation(path), loss=self.saving.facts.get("loss"))
                    action = _checked(watch.received, seen, self.data(context), what)
        if action == "send" or self.on_leak == "log":
            return reply
        log.warning("invlib: the update of %s is not sent", what)
        if self.on_leak == "raise":
            raise InvlibError(_NOT_SENT)
        for record in reply.content.array_records.values():
            for name in list(record):
                if name in arrived:
                    record[name] = arrived[name]
                else:
                    del record[name]
        return reply


def _checked(model: nn.Module, seen: Observation, data: tuple[Any, Any], what: str) -> str:
    """Return what `invlib.presend` advises, and log why."""
    from invlib.auditing import presend  # brings the whole audit

    found = presend(model, *data, update=seen)
    level = logging.INFO if found.action == "send" else logging.WARNING
    log.log(level, "invlib: check of %s before sending: %s", what, found)
    return found.action


def _arrays(message: Any) -> dict[str, Any]:
    """Return the arrays of a message by name, as they are now."""
    return {
        n: a.numpy().copy() for record in message.content.array_records.values() for n, a in record.items()
    }


def _examples(reply: Any) -> int | None:
    records = reply.content.metric_records.values()
    return next((int(r["num-examples"]) for r in records if "num-examples" in r), None)


def _round(message: Any) -> int:
    """Return the number of the round: of the strategy's settings, or else of the group of messages."""
    for record in message.content.config_records.values():
        if "server-round" in record:
            return int(record["server-round"])
    group = str(getattr(message.metadata, "group_id", ""))
    return int(group) if group.isdigit() else 1


def _doubts_of_place(mod: object, call_next: Any) -> list[str]:
    """Warn of mods that change the reply after it was recorded, or that mask what is recorded."""
    before = [m for m in _outside() if m is not mod and _name(m) not in _HARMLESS]
    masking = [m for m in _inside(call_next) if "secagg" in _name(m).lower()]
    doubts = []
    if before:
        doubts.append(
            f"{', '.join(map(_name, before))} stands before record_updates among the mods: what it does to "
            "the reply is not recorded; record_updates goes first"
        )
    if masking:
        doubts.append(
            f"{', '.join(map(_name, masking))} masks the update before it is recorded: by itself it holds "
            "nothing, and only the sum of all clients' updates is seen; behind it, record_updates records "
            "what this client adds to the sum"
        )
    for doubt in doubts:
        warnings.warn(doubt, DoubtWarning, stacklevel=3)
    return doubts


def _outside() -> Iterator[Any]:
    """Yield the mods that are running: Flower wraps each in a function that knows it as ``_mod``."""
    frame = sys._getframe(1)
    while frame is not None:
        if "_mod" in frame.f_code.co_freevars and "_ffn" in frame.f_code.co_freevars:
            yield frame.f_locals["_mod"]
        frame = frame.f_back  # type: ignore[assignment] # None at the end


def _inside(call_next: Any) -> Iterator[Any]:
    """Yield the mods that `call_next` will run."""
    while (closure := getattr(call_next, "__closure__", None)) is not None:
        held = dict(
            zip(call_next.__code__.co_freevars, (cell.cell_contents for cell in closure), strict=True)
        )
        if "_mod" not in held:
            return
        yield held["_mod"]
        call_next = held.get("_ffn")


def _name(mod: Any) -> str:
    return getattr(mod, "__name__", type(mod).__name__)
