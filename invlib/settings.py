"""What a setting may be: one check of the types and ranges of all settings, and the words of its errors."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type, checker_lookup_functions

from invlib.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
_MOST = sys.float_info.max


@dataclass(frozen=True)
class Rule:
    """What an annotated value has to be: in words, and as a test of any value."""

    words: str
    holds: Callable[[Any], bool]


def real(words: str, holds: Callable[[float], bool] = lambda x: True) -> Rule:
    """Return the rule of a finite number, which may be a whole one; True and False are none."""

    def fits(x: Any) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= _MOST and holds(x)

    return Rule(words, fits)


def whole(words: str, holds: Callable[[int], bool]) -> Rule:
    """Return the rule of a whole number of 64 bits at most."""
    return real(words, lambda n: isinstance(n, int) and n.bit_length() <= 64 and holds(n))


def taking(words: str, count: int) -> Rule:
    """Return the rule of a function, or a network, that takes so many arguments by position."""

    def holds(function: Any) -> bool:
        with suppress(ValueError):  # some of torch's do not say what they take
            inspect.signature(getattr(function, "forward", function)).bind(*range(count))
        return callable(function)

    return Rule(words, holds)


Count = Annotated[int, whole("a whole number of at least 1", lambda n: n >= 1)]
FromZero = Annotated[int, whole("a whole number of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, whole("a whole number of 64 bits", lambda n: -(2**63) <= n < 2**64)]
Finite = Annotated[float, real("a finite number")]
Positive = Annotated[float, real("a positive number", lambda x: x > 0)]
NotNegative = Annotated[float, real("a number from 0 on", lambda x: x >= 0)]
Part = Annotated[float, real("a number in [0, 1]", lambda x: 0 <= x <= 1)]
Below1 = Annotated[float, real("a number in [0, 1)", lambda x: 0 <= x < 1)]
Factor = Annotated[float, real("a number in (0, 1]", lambda x: 0 < x <= 1)]


class Checked:
    """A frozen dataclass whose fields are checked against their annotations when it is made.

    A class that adds what relates two fields calls ``super().__post_init__()`` first.
    """

    def __post_init__(self) -> None:
        assert is_dataclass(self)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in _each(type(self), given):
            object.__setattr__(self, name, value)


def checks(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose arguments are checked against their annotations when it is called."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says what is missing or too much
        given.arguments |= dict(_each(function, given.arguments))
        return function(*given.args, **given.kwargs)

    return call


def checked(name: str, value: Any, kind: Any) -> Any:
    """Return a setting: as it is, or as a number of Python for one of NumPy and a tuple for a list.

    Args:
        name: what it is called in an error.
        value: what was given.
        kind: a type, or a type annotated with a `Rule`, such as `Count`.

    Raises:
        ConfigError: it is of another type, or out of range.

    Example:
        >>> checked("size", np.int64(32), Count)
        32
    """
    value = _plain(value)
    try:
        if not (wrong := _class_in(value)):
            check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            return value
    except TypeCheckError:
        pass
    wanted = f"an instance, {wrong.__name__}(), not the class {wrong.__name__}" if wrong else expected(kind)
    raise ConfigError(f"{name} is {shown(value)}; expected {wanted}")


def shown(value: object) -> str:
    """Return a value as an error shows it: tensors and arrays by their shape, and nothing at length."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    words = " ".join(str(getattr(value, "__name__", "") or repr(value)).split())
    return words if len(words) <= 120 else words[:117] + "..."


def expected(kind: Any) -> str:
    """Return what a type allows, in words.

    Example:
        >>> expected(Count | None), expected(Literal["mean", "sum"])
        ('a whole number of at least 1 or None', "'mean' or 'sum'")
    """
    parts, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        return next((rule.words for rule in parts if isinstance(rule, Rule)), expected(parts[0]))
    if origin in (Union, UnionType, Literal):
        *most, last = map(repr if origin is Literal else expected, parts)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        each = f", each {expected(parts[0])}" if ... in parts else " of " + " and ".join(map(expected, parts))
        return "a tuple" + each
    if origin is collections.abc.Callable:
        return "a function" if parts[0] is ... else f"a function of {len(parts[0])} argument(s)"
    return {NoneType: "None", bool: "True or False", str: "a string"}.get(kind) or str(kind.__name__)


def _each(thing: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of what a class or a function was given, checked where it says a type."""
    hints = _hints(thing)
    for name in given:
        if name in hints:
            yield name, checked(f"{thing.__name__} {name}", given[name], hints[name])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_plain, value)) if type(value) in (list, tuple) else value


def _class_in(value: object) -> type | None:
    if isinstance(value, tuple):
        return next(filter(None, map(_class_in, value)), None)
    return value if isinstance(value, type) else None


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    """Return the types of arguments or fields; of a class that names unknown types, those of its bases."""
    try:
        return get_type_hints(thing, include_extras=True)
    except NameError:
        return {name: hint for base in thing.__bases__[::-1] for name, hint in _hints(base).items()}


def _rule_checker(_: Any, __: Any, extras: tuple[Any, ...]) -> Any:
    """Tell typeguard how a type with a `Rule` is checked; it asks for every annotated type."""
    rules = [extra for extra in extras if isinstance(extra, Rule)]

    def check(value: Any, *_: Any) -> None:
        with suppress(TypeError):  # what cannot be compared or called
            if all(rule.holds(value) for rule in rules):
                return
        raise TypeCheckError("")

    return check if rules else None


checker_lookup_functions.insert(0, _rule_checker)
