"""Words for settings, models and tensors that are the same in every process and differ where they differ."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invlib.errors import ConfigError

AddedLater = Mapping[str, Mapping[str, Any]]


def describe(value: Any, *, added_later: AddedLater | None = None, code: bool = False) -> Any:
    """Return a setting as JSON can hold it, in words that are the same in every process.

    Dataclasses are told by their fields, tensors and networks by a hash of their numbers, functions by their
    name and by what they enclose.

    Args:
        value: a setting, or anything made of settings.
        added_later: class name → field → default: such a field is left out where it has this value, so that
            descriptions from before it was added stay the same.
        code: tell functions, and what a class computes when it is called, by their bytecode too, which other
            versions of Python change.

    Raises:
        ConfigError: a value could not be told from another one, such as a lambda or an object that prints
            its address.

    Example:
        >>> from functools import partial
        >>> describe(partial(round, ndigits=2))
        {'': 'round', 'ndigits': 2}
    """
    again = functools.partial(describe, added_later=added_later, code=code)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return f"tensor {tuple(value.shape)} {digest(value)}"
    if isinstance(value, nn.Module):
        numbers = again(dict(value.named_parameters()) | dict(value.named_buffers()))
        forward = {"code": _methods({type(m) for m in value.modules()}, "forward")} if code else {}
        return {"": type(value).__qualname__, "layers": repr(value), "numbers": numbers, **forward}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        defaults = (added_later or {}).get(kind, {})
        named = {f.name: getattr(value, f.name) for f in fields(value)}
        called = {"code": _methods({type(value)}, "__call__")} if code else {}
        kept = {k: again(v) for k, v in named.items() if not (k in defaults and v == defaults[k])}
        return {"": kind, **kept, **called}
    if isinstance(value, Mapping):
        return {str(key): again(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [again(entry) for entry in value]
    if isinstance(value, functools.partial):
        given = {str(k): again(v) for k, v in enumerate(value.args)} | again(value.keywords)
        return {"": again(value.func), **given}
    if hasattr(value, "__qualname__"):
        return _function(value, again, code)
    words = repr(value)
    if re.search(r" at 0x[0-9a-f]+", words) and not isinstance(value, Enum):
        raise ConfigError(
            f"{words} prints its address, by which no other process knows it; expected a named function, a "
            "functools.partial, a dataclass or an object with a __repr__ of its own as a setting"
        )
    return words


def _function(value: Any, again: Any, code: bool) -> Any:
    name = str(value.__qualname__)
    if "<lambda>" in name:
        raise ConfigError(
            f"{name} has no name to tell it from another one; expected a named function as a setting"
        )
    told: dict[str, Any] = {}
    if inspect.ismethod(value):
        told["self"] = again(value.__self__)
        value = value.__func__
    if inspect.isfunction(value):
        told |= again(inspect.getclosurevars(value).nonlocals)
        if value.__defaults__ or value.__kwdefaults__:
            defaults = (value.__defaults__, value.__kwdefaults__)
            told |= {"defaults": again(defaults)} if code else {}
        if code:
            told["code"] = _bytecode(value.__code__)
    return {"": name, **told} if told else name


def _methods(types: set[type], name: str) -> list[str]:
    """Return the bytecode of a method of some classes, those written in Python, in an order of its own."""
    methods = [getattr(cls, name, None) for cls in types]
    return sorted({_bytecode(method.__code__) for method in methods if inspect.isfunction(method)})


def _bytecode(code: Any) -> str:
    inner = [
        _bytecode(c) if inspect.iscode(c) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return hashlib.sha256(repr((code.co_code, inner, code.co_names)).encode()).hexdigest()[:16]


def digest(tensor: Tensor | np.ndarray) -> str:
    """Return a hash of a tensor's numbers and their type, the same on every device."""
    tensor = torch.as_tensor(tensor).detach().cpu()
    tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).contiguous()
    numbers = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} ".encode() + numbers).hexdigest()[:16]


def differences(was: Any, now: Any) -> list[str]:
    """Return the paths at which two descriptions differ, with what stands there where that is short.

    Example:
        >>> differences({"steps": 3, "init": "randn"}, {"steps": 5, "init": "randn"})
        ['steps=3, now 5']
    """
    return list(_differences(was, now, ""))


def _differences(was: Any, now: Any, path: str) -> Iterator[str]:
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict) and was.get("") == now.get(""):
        for key in {**was, **now}:
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    else:
        short = max(len(repr(was)), len(repr(now))) <= 60
        yield f"{path}={was!r}, now {now!r}" if short else path
