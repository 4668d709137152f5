"""In which order a client may have taken its images, where nobody told the server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from invlib.federated import FedAvg

_ALL = 120  # so many orders of an epoch are all tried; of more, exchanges of two images

Order = tuple[int, ...]


def likely_orders(
    score: Callable[[FedAvg], float], protocol: FedAvg, num_images: int
) -> tuple[FedAvg, float]:
    """Return the client whose orders, one for each epoch, give the lowest score, and that score.

    One epoch after another is changed while the score falls. Within a minibatch the order does not matter.

    Args:
        score: of a client, on some images.
        protocol: a client of several minibatches an epoch.
        num_images: how many images it has.
    """
    orders = list(protocol.orders or [tuple(range(num_images))] * protocol.passes(num_images))
    best, least = protocol, score(protocol)
    improved = True
    while improved:
        improved = False
        for epoch in range(len(orders)):
            for other in _others(orders[epoch], protocol.batch_size or num_images):
                changed = (*orders[:epoch], other, *orders[epoch + 1 :])
                candidate = replace(protocol, orders=changed)
                if (value := score(candidate)) < least:
                    best, least, improved = candidate, value, True
            orders = list(best.orders or orders)
    return best, least


def _others(order: Order, size: int) -> Iterator[Order]:
    """Yield other orders of an epoch: all that differ, if they are few, else each exchange of two images."""
    few = list(itertools.islice(_partitions(tuple(sorted(order)), size), _ALL + 1))
    if len(few) <= _ALL:
        yield from few
        return
    for a, b in itertools.combinations(range(len(order)), 2):
        if a // size != b // size:
            changed = list(order)
            changed[a], changed[b] = order[b], order[a]
            yield tuple(changed)


def _partitions(images: Order, size: int) -> Iterator[Order]:
    if not images:
        yield ()
        return
    for first in itertools.combinations(images, min(size, len(images))):
        rest = tuple(k for k in images if k not in first)
        for others in _partitions(rest, size):
            yield (*first, *others)
