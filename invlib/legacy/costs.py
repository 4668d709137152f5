"""The matching cost by its 2020 names: which distance, which tensors, how they are weighed."""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invlib.errors import ConfigError
from invlib.optim import objectives
from invlib.optim.objectives import Layers, Objective, Tensors

# Which and how many tensors each name of `indices` stands for.
SUBSETS: dict[str, dict[str, Any]] = {
    **{"def": {}, "batch": {}, "topk-1": {"which": "largest", "count": 4}},
    **{f"top{n}": {"which": "largest", "count": n} for n in (10, 50)},
    "first": {"which": "first", "count": 4},
    **{f"first{n}": {"which": "first", "count": n} for n in (4, 5, 10, 50)},
    **{f"last{n}": {"which": "last", "count": n} for n in (5, 10, 50)},
}
WEIGHTS = {"equal": "equal", "linear": "linear", "exp": "exponential"}


def local_cosine(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    """Return the sum over tensors of one minus the weighted cosine; the weight is inside, as in 2020."""
    factors = [1.0] * len(target) if weights is None else weights
    cosines = [1 - objectives.cosine([c], [t]) for c, t in zip(candidate, target, strict=True)]
    return torch.stack([1 - w * cosine for w, cosine in zip(factors, cosines, strict=True)]).sum()


DISTANCES: dict[str, Objective] = {"sim": objectives.cosine, "simlocal": local_cosine}
DISTANCES |= {"l2": objectives.l2, "l1": objectives.l1, "max": objectives.maximum}


@dataclass(frozen=True, kw_only=True)
class Listed(Layers):
    """The tensors with these numbers."""

    tensors: tuple[int, ...]

    def choose(self, target: Tensors) -> tuple[list[int], list[float] | None]:
        """Return the indices of the chosen tensors and their weights."""
        if not self.tensors or not all(-len(target) <= i < len(target) for i in self.tensors):
            own, count = list(self.tensors), len(target)
            raise ConfigError(f"indices are {own}; expected numbers of the update's {count} tensors")
        indices, factors = super().choose(target)
        chosen = [indices[i] for i in self.tensors]
        return chosen, None if factors is None else [factors[i] for i in chosen]


def comparison(
    cost_fn: str, indices: str | Iterable[int], weights: str, generator: torch.Generator | None = None
) -> tuple[Objective, Layers]:
    """Return the distance and the choice of tensors that the names stand for; a generator is for "batch"."""
    distance = DISTANCES[named("cost_fn", cost_fn, DISTANCES)]
    weighing = {"weights": WEIGHTS[named("weights", weights, WEIGHTS)]}
    if not isinstance(indices, str):
        return distance, Listed(tensors=numbers(indices), **weighing)  # type: ignore[arg-type]
    layers = Layers(**SUBSETS[named("indices", indices, SUBSETS)], **weighing)  # type: ignore[arg-type]
    if indices != "batch":
        return distance, layers

    def of_eight(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
        rows = torch.randperm(len(target), generator=generator)[:8].tolist()
        factors = None if weights is None else [weights[i] for i in rows]
        return distance([candidate[i] for i in rows], [target[i] for i in rows], factors)

    return of_eight, layers


def numbers(indices: Iterable[int]) -> tuple[int, ...]:
    """Return the numbers that ``indices`` lists, of Python, NumPy or torch."""
    try:
        return tuple(operator.index(i) for i in indices)
    except TypeError as error:
        raise ConfigError(f"indices are {indices!r}; expected a name or whole numbers") from error


def named(key: str, value: object, choices: Collection[str]) -> str:
    """Return the value where it is one of the choices, else raise and name them."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"config {key!r} is {value!r}; expected one of {', '.join(map(repr, choices))}")
    return value


def reconstruction_costs(
    gradients: Sequence[Sequence[Tensor]],
    input_gradient: Sequence[Tensor],
    cost_fn: str = "l2",
    indices: str | Iterable[int] = "def",
    weights: str = "equal",
) -> Tensor:
    r"""Return how far gradients are from the observed one, a scalar: the mean over the gradients given.

    ``"sim"`` is :math:`1 - \cos` of the whole update, ``"simlocal"`` :math:`\sum_i (1 - w_i \cos_i)` over its
    tensors, ``"l2"`` :math:`\sum_i w_i \|c_i - t_i\|^2`, ``"l1"`` and ``"max"`` likewise with the sum and the
    largest of the absolute differences.

    Args:
        gradients: lists of tensors, each in the order of ``model.parameters()``.
        input_gradient: the observed list.
        cost_fn: one of these names.
        indices: ``"def"`` for all tensors; ``"first"`` and ``"first4"``, ``"first5"``, ``"first10"``,
            ``"first50"``; ``"last5"``, ``"last10"``, ``"last50"``; the largest by norm, ``"topk-1"`` (4),
            ``"top10"``, ``"top50"``; ``"batch"``, eight drawn anew by torch's default generator; or numbers.
        weights: ``"equal"``, ``"linear"`` or ``"exp"``; the first tensor counts most.

    ConfigError where a name is unknown, or the lists do not fit each other.

    Source: Geiping et al. 2020, arXiv 2003.14053, equation 4.
    """
    distance, layers = comparison(cost_fn, indices, weights)
    rows, factors = layers.choose(input_gradient)
    target = [input_gradient[i] for i in rows]
    costs = [distance([gradient[i] for i in rows], target, factors) for gradient in gradients]
    return torch.stack(costs).mean()
