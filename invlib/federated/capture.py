"""Bring an update that was captured anywhere into invlib: lists, arrays, state dicts and files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from invlib.core.convert import as_tensor
from invlib.core.files import atomic_write
from invlib.core.network import trainable_parameters, unwrapped
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Loss, Observation
from invlib.errors import DataError, DoubtWarning, InvlibError, ObservationError
from invlib.federated.protocols import FedAvg, FedSGD

FORMAT = "invlib-observation-1"

Sent = Literal["all", "nonzero", "given"] | Mapping[str, Any] | None


def from_gradients(
    model: nn.Module,
    gradients: Iterable[Any],
    *,
    num_images: int,
    image_shape: tuple[int, ...],
    normalization: Normalization | None = None,
    protocol: ClientStep | None = None,
    labels: Any = None,
    buffers: Mapping[str, Any] | None = None,
    training_mode: bool = False,
    loss: Loss | None = None,
    sent: Sent = None,
    vocabulary: Sequence[str] | None = None,
) -> Observation:
    """Make an observation of a list of gradients in the order of ``model.parameters()``.

    Args:
        model: the model that the client received.
        gradients: one tensor or NumPy array for each trainable parameter, as `torch.autograd.grad` gives
            them, or for each parameter, or for each entry of the model's state dict; None for a parameter
            that the loss does not reach.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)``; ``(T,)`` of token sequences.
        normalization: how the client encodes images in [0, 1]; a pair of tuples, mean and std, will do. Text
            needs none.
        protocol: the client's step; None is `invlib.FedSGD`.
        labels: where they are known: classes, or whatever the loss takes.
        buffers: the client's batch-norm statistics, where it sent them.
        training_mode: whether the client ran the model in training mode.
        loss: the client's loss, where it is known.
        sent: which numbers were sent, see `from_arrays`.
        vocabulary: of text, the word of each token.

    Raises:
        ObservationError: the list is too short or too long, or the observation does not fit the model.

    Taught in: chapter 1
    """
    model = unwrapped(model)
    if isinstance(gradients, (Mapping, Tensor, str)) or not isinstance(gradients, Iterable):
        raise ObservationError(
            f"gradients is a {type(gradients).__name__}; expected a list of arrays "
            "(from_arrays takes a mapping)"
        )
    return from_arrays(
        model,
        _named(model, list(gradients), "gradients"),
        num_images=num_images,
        image_shape=image_shape,
        normalization=normalization,
        protocol=protocol,
        labels=labels,
        buffers=buffers,
        training_mode=training_mode,
        loss=loss,
        sent=sent,
        vocabulary=vocabulary,
    )


def from_arrays(
    model: nn.Module,
    arrays: Mapping[str, Any],
    *,
    num_images: int,
    image_shape: tuple[int, ...],
    normalization: Normalization | None = None,
    protocol: ClientStep | None = None,
    labels: Any = None,
    buffers: Mapping[str, Any] | None = None,
    training_mode: bool = False,
    loss: Loss | None = None,
    sent: Sent = None,
    vocabulary: Sequence[str] | None = None,
) -> Observation:
    """Make an observation of a mapping from parameter names to arrays (NumPy or torch).

    Names may begin with what wrappers put there, ``module.``, ``_module.`` or ``_orig_mod.``, and differences
    of the model's buffers may be among them. None, for a parameter that the loss does not reach, is zeros.

    Args:
        model: the model that the client received.
        arrays: parameter name → gradient or weight difference.
        num_images: as for `from_gradients`, like all that follow.
        image_shape: ``(C, H, W)``.
        normalization: of images in [0, 1].
        protocol: the client's step.
        labels: where they are known.
        buffers: batch-norm statistics.
        training_mode: of the client.
        loss: of the client.
        sent: which numbers were sent. None: all of them, but where an update is sparse as only compression
            leaves it (zeros, and no small numbers), its zeros count as not sent, with a warning. ``"all"``:
            all of them. ``"nonzero"``: those that are not zero. ``"given"``: all of the parameters that are
            there, nothing of those that are missing or None. A mapping from names to bool arrays says it in
            detail.
        vocabulary: of text.

    Raises:
        ObservationError: the observation does not fit the model.
    """
    model = unwrapped(model)
    if not isinstance(arrays, Mapping):
        raise ObservationError(
            f"arrays is a {type(arrays).__name__}; expected a mapping from names "
            "(from_gradients takes a list)"
        )
    notes = list[str]()
    named = _without_prefix(model, arrays, notes)
    own, tensors = dict(model.named_buffers()), trainable_parameters(model)
    moved = {n: as_tensor(f"update[{n!r}]", v) for n, v in named.items() if n in own and v is not None}
    update, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in named.items():
        if name in own or (name in _frozen(model) and name not in tensors):
            continue
        if value is not None:
            update[name] = as_tensor(f"update[{name!r}]", value).clone()
        elif name in tensors:
            update[name] = torch.zeros_like(tensors[name])
            masks |= {name: torch.zeros_like(update[name]).bool()} if sent == "given" else {}
    if not any(value is not None for value in named.values()):
        raise ObservationError("the update has no numbers at all; expected one tensor for each parameter")
    if sent == "given":
        missing = {name: torch.zeros_like(p) for name, p in tensors.items() if name not in update}
        masks |= {name: zeros.bool() for name, zeros in missing.items()}
        update |= missing
    elif isinstance(sent, Mapping):
        masks = {name: as_tensor(f"sent[{name!r}]", mask).bool() for name, mask in sent.items()}
        for name, mask in masks.items():
            expected = tuple(tensors[name].shape) if name in tensors else "no such parameter"
            if tuple(mask.shape) != expected:
                raise ObservationError(
                    f"sent[{name!r}] has shape {tuple(mask.shape)}; expected {expected}, as the model"
                )
        missing = {name: torch.zeros_like(tensors[name]) for name in masks if name not in update}
        update |= missing
    elif sent == "nonzero":
        masks = {name: value != 0 for name, value in update.items()}
    elif sent is None:
        masks = _compressed(update, notes)
    elif sent != "all":
        raise ObservationError(
            f"sent is {sent!r}; expected None, 'all', 'nonzero', 'given' or a mapping from names to masks"
        )
    # An unsent number must not count anywhere, whatever stands in its place.
    update = {
        n: v.masked_fill(~masks[n], 0) if n in masks and masks[n].shape == v.shape else v
        for n, v in update.items()
    }
    observation = Observation(
        update={name: update[name] for name in (*tensors, *update) if name in update},
        protocol=protocol or FedSGD(),
        num_images=num_images,
        image_shape=image_shape,
        normalization=normalization,  # type: ignore[arg-type] # text may have none
        labels=labels,
        buffers=buffers or {n: own[n] + d.to(own[n].device) for n, d in moved.items()},
        training_mode=training_mode,
        sent={name: mask for name, mask in masks.items() if not mask.all()},
        loss=loss,
        notes=tuple(notes),
        vocabulary=vocabulary,  # type: ignore[arg-type] # becomes a tuple
    )
    observation.validate(model, text=None)
    for note in notes:
        warnings.warn(note, DoubtWarning, stacklevel=2)
    return observation


def from_state_dicts(
    model: nn.Module,
    before: Mapping[str, Any] | Sequence[Any],
    after: Mapping[str, Any] | Sequence[Any],
    *,
    protocol: ClientStep,
    num_images: int,
    image_shape: tuple[int, ...],
    normalization: Normalization | None = None,
    labels: Any = None,
    training_mode: bool = False,
    loss: Loss | None = None,
    sent: Sent = None,
    vocabulary: Sequence[str] | None = None,
) -> Observation:
    """Make an observation of a client's state dict before and after its local training.

    What is no parameter in ``after`` (batch-norm statistics) becomes the observation's buffers.

    Args:
        model: the model, with the weights of ``before``.
        before: the state dict that the client received, or a list of its arrays in that order, as Flower's.
        after: the state dict that it sent back, or such a list.
        protocol: how it trained.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)``; ``(T,)`` of token sequences.
        normalization: how the client encodes images in [0, 1]; text needs none.
        labels: where they are known: classes, or whatever the loss takes.
        training_mode: whether the client ran the model in training mode.
        loss: the client's loss, where it is known.
        sent: which numbers were sent, see `from_arrays`.
        vocabulary: of text, the word of each token.

    Raises:
        ObservationError: the two differ in names or shapes, hold the same weights, or the model does not hold
            those of ``before``; the statistics of batch norm moved in evaluation mode; the protocol sends
            gradients; or the observation does not fit the model.

    Taught in: chapter 4
    """
    model, notes = unwrapped(model), list[str]()
    if isinstance(protocol, FedSGD):
        raise ObservationError(
            "protocol is FedSGD, which sends gradients; expected a step that sends weight differences, "
            "such as FedAvg(lr=..., local_steps=1)"
        )
    first, last = (
        _without_prefix(model, _named(model, values, name, exactly=True), notes)
        for name, values in (("before", before), ("after", after))
    )
    if first.keys() != last.keys():
        differing = sorted(first.keys() ^ last.keys())
        raise ObservationError(f"the state dicts differ in {differing[:5]}; expected the same names in both")
    old, new = (
        {name: as_tensor(f"{what}[{name!r}]", value) for name, value in values.items()}
        for what, values in (("before", first), ("after", last))
    )
    for name in old:
        if old[name].shape != new[name].shape:
            raise ObservationError(
                f"after[{name!r}] has shape {tuple(new[name].shape)}; "
                f"expected {tuple(old[name].shape)}, as before"
            )
    names = trainable_parameters(model)
    here = {name: p for name, p in names.items() if name in old and p.shape == old[name].shape}
    if off := [name for name, p in here.items() if not _same(p, old[name])]:
        raise ObservationError(
            f"the model's {off[0]!r} and {len(off) - 1} more differ from before; expected the model that the "
            "client received, with the weights of before (is it trained already, or are the two swapped?)"
        )
    update = {name: new[name].to(p) - old[name].to(p) for name, p in here.items()}
    if not any(difference.any() for difference in update.values()):
        raise ObservationError(
            "before and after hold the same weights; expected those of before training (a state_dict() "
            "shares its memory with the model: copy.deepcopy it before training)"
        )
    buffers = {
        name: value.clone() for name, value in new.items() if name not in dict(model.named_parameters())
    }
    statistics = [n for n in buffers if n.endswith((".running_mean", ".running_var"))]
    still = [n for n in statistics if _same(new[n], old[n])]
    if not training_mode and (moved := [n for n in statistics if n not in still]):
        raise ObservationError(
            f"the statistics {moved[0]!r} moved, so that the client ran the model in training mode; expected "
            "training_mode=True"
        )
    if training_mode and statistics and len(still) == len(statistics):
        notes.append(
            "training_mode is True, but no batch-norm statistics moved: did the client run in evaluation "
            "mode?"
        )
    observation = from_arrays(
        model,
        update,
        num_images=num_images,
        image_shape=image_shape,
        normalization=normalization,
        protocol=protocol,
        labels=labels,
        buffers=buffers,
        training_mode=training_mode,
        loss=loss,
        sent=sent,
        vocabulary=vocabulary,
    )
    for note in notes:
        warnings.warn(note, DoubtWarning, stacklevel=2)
    return replace(observation, notes=(*dict.fromkeys(notes), *observation.notes))


def _same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors agree up to the precision in which the coarser of them was sent."""
    coarse = min(one.dtype, other.dtype, key=lambda d: d.itemsize) if one.is_floating_point() else one.dtype
    return torch.equal(one.cpu().to(coarse), other.cpu().to(coarse))


def _named(model: nn.Module, values: Any, what: str, *, exactly: bool = False) -> Mapping[str, Any]:
    """Name the entries of a list by its length: state dict, all parameters, or the trainable ones."""
    if isinstance(values, Mapping):
        return values
    if isinstance(values, (str, Tensor)) or not isinstance(values, Iterable):
        raise ObservationError(
            f"{what} is a {type(values).__name__}; expected a state dict or a list of arrays"
        )
    entries = list(values)
    names = [list(model.state_dict())]
    if not exactly:
        every = [name for name, _ in model.named_parameters()]
        names = [list(trainable_parameters(model)), every, *names]
    for some in names:
        if len(some) == len(entries):
            return dict(zip(some, entries, strict=True))
    raise ObservationError(
        f"{what} has {len(entries)} tensors; expected {len(names[0])}, one for each "
        f"{'entry of the state dict' if exactly else 'trainable parameter'} in the order "
        f"{', '.join(names[0][:3])}{', …' if len(names[0]) > 3 else ''}"
    )


_PREFIX = re.compile(r"^(module|_module|_orig_mod)\.|(?<=\.)_orig_mod\.")


def _without_prefix(model: nn.Module, named: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Take off the prefixes of wrappers, where the model has the names without them; a note says so."""
    own = model.state_dict().keys()
    plain = {str(name): value for name, value in named.items()}
    while not any(name in own for name in plain) and any(map(_PREFIX.search, plain)):
        prefix = next(filter(None, map(_PREFIX.search, plain))).group()
        plain = {_PREFIX.sub("", name): value for name, value in plain.items()}
        notes.append(f"names of the update begin with {prefix!r}, which the model's do not: taken off")
    return plain


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


_SPARSE, _NUMBERS = 0.5, 200  # a share of zeros, and a number of others, from which on sparseness is judged


def _compressed(update: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return what was sent of an update that has the largest numbers alone, of all or of each tensor.

    The numbers of a gradient reach down to zero: of two hundred some are smaller than a twentieth of their
    median. Where more than half are zero and none of the others is that small, the small ones were left out.
    """
    numbers = [value.flatten().abs().float() for value in update.values()]
    large = [part for part in numbers if int((part > 0).sum()) >= _NUMBERS and not part.all()]
    if not (_cut(torch.cat(numbers)) or (large and all(map(_cut, large)))):
        return {}
    share = sum(int((part == 0).sum()) for part in numbers) / sum(map(len, numbers))
    notes.append(
        f"{share:.0%} of the update are zeros and none of the other numbers is small, as where only "
        "the largest were sent: zeros are taken as not sent (sent='all' if they are what was computed)"
    )
    return {name: value != 0 for name, value in update.items()}


def _cut(numbers: Tensor) -> bool:
    kept = numbers[numbers > 0]
    few = len(kept) < _NUMBERS or len(kept) > _SPARSE * len(numbers)
    return not few and bool(kept.min() >= 0.05 * kept.median())


def save_observation(observation: Observation, path: str | Path) -> None:
    """Save an observation as one safetensors file with a JSON header; no code is stored in it.

    Args:
        observation: what the server saw; its protocol is `invlib.FedSGD` or `invlib.FedAvg`.
        path: where to; written beside and then renamed; only its owner can read it.

    Raises:
        ObservationError: the protocol is another one.
        DataError: the file cannot be written.

    Taught in: chapter 4
    """
    protocol = observation.protocol
    # A subclass with a rule of its own would come back without it.
    kind = next((k for k in (FedSGD, FedAvg) if type(protocol).__call__ is k.__call__), None)
    if kind is None:
        raise ObservationError(f"protocol is {type(protocol).__name__}; expected FedSGD or FedAvg to save it")
    header = {
        "format": FORMAT,
        "protocol": kind.__name__,
        "protocol_settings": {f.name: getattr(protocol, f.name) for f in fields(kind)},
        "num_images": observation.num_images,
        "image_shape": observation.image_shape,
        "normalization": asdict(observation.normalization),
        "training_mode": observation.training_mode,
        "order": list(observation.update),
        "loss": _loss_name(observation.loss),
        "notes": observation.notes,
        "vocabulary": observation.vocabulary,
    }
    tensors = {f"update/{name}": value.contiguous() for name, value in observation.update.items()}
    tensors |= {f"buffers/{name}": value.contiguous() for name, value in observation.buffers.items()}
    tensors |= {f"sent/{name}": mask.contiguous() for name, mask in observation.sent.items()}
    if observation.labels is not None:
        tensors["labels"] = observation.labels
    # a tensor under two names is kept twice: the file format knows no shared memory
    shared: set[int] = set()
    for name, value in tensors.items():
        tensors[name] = value.clone() if value.data_ptr() in shared else value
        shared.add(value.data_ptr())
    metadata = {"invlib": json.dumps(header)}
    atomic_write(
        Path(path), lambda beside: safetensors.torch.save_file(tensors, beside, metadata), private=True
    )


def _loss_name(loss: Loss | None) -> str | None:
    name = getattr(loss, "__name__", "")
    if loss is None or getattr(F, name, None) is loss:
        return name or None
    warnings.warn(
        f"the loss {name or loss!r} is not saved: it is no function of torch.nn.functional; tell the attack",
        DoubtWarning,
        stacklevel=3,
    )
    return None


def load_observation(path: str | Path) -> Observation:
    """Load what `save_observation` wrote.

    Raises:
        DataError: the file is missing, corrupt, or holds something else.

    Taught in: chapter 4
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no observation at {path}; expected a file that save_observation wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("invlib", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, RecursionError, OSError, MemoryError) as error:
        raise DataError(f"{path} is corrupt or no observation: {error}") from error
    found = header.get("format") if isinstance(header, dict) else header
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r:.60}; expected {FORMAT!r}")
    try:
        return _observation(header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, InvlibError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} holds no whole observation: {reason}") from error


def _observation(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Observation:
    """Build an observation of the header and the tensors of a file; what is wrong raises."""
    kind = {"FedSGD": FedSGD, "FedAvg": FedAvg}[header["protocol"]]
    update = {name: tensors[f"update/{name}"] for name in header["order"]}
    if len(update) != sum(name.startswith("update/") for name in tensors):
        raise ValueError(f"'order' names {len(update)} tensors of the update, which has others too")
    if wrong := [name for name, value in update.items() if not value.is_floating_point()]:
        raise ValueError(f"update/{wrong[0]} is of {update[wrong[0]].dtype}; expected floating-point numbers")
    loss = header.get("loss")
    if loss is not None and not (str(loss).isidentifier() and callable(getattr(F, str(loss), None))):
        raise ValueError(f"loss is {loss!r}; expected the name of a function of torch.nn.functional")
    return Observation(
        update=update,
        protocol=kind(**header["protocol_settings"]),
        num_images=header["num_images"],
        image_shape=header["image_shape"],
        normalization=Normalization.from_card(header),
        labels=tensors.get("labels"),
        buffers={n.removeprefix("buffers/"): t for n, t in tensors.items() if n.startswith("buffers/")},
        training_mode=header["training_mode"],
        sent={n.removeprefix("sent/"): t for n, t in tensors.items() if n.startswith("sent/")},
        loss=None if loss is None else getattr(F, loss),
        notes=tuple(str(note) for note in header.get("notes", ())),
        vocabulary=header.get("vocabulary"),
    )
