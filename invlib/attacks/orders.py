"""In which order a client may have taken its images, where nobody told the server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from invlib.federated import FedAvg

_ALL = 120  # so many orders, of all epochs or of one, are all tried; of more, exchanges of two images

Order = tuple[int, ...]


def likely_orders(
    score: Callable[[FedAvg], float], protocol: FedAvg, num_images: int
) -> tuple[FedAvg, float]:
    """Return the client whose orders, one for each epoch, give the lowest score, and that score.

    All are tried where they are few. Of more, one epoch after another is changed while the score falls, which
    may end in orders that are not the client's. Within a minibatch the order does not matter.

    Args:
        score: of a client, on some images.
        protocol: a client of several minibatches an epoch.
        num_images: how many images it has.
    """
    size, passes = protocol.batch_size or num_images, protocol.passes(num_images)
    orders = list(protocol.orders or [tuple(range(num_images))] * passes)
    best, least = protocol, score(protocol)
    each = list(itertools.islice(_partitions(tuple(range(num_images)), size), _ALL + 1))
    improved = len(each) ** passes > _ALL
    if not improved:
        clients = [replace(protocol, orders=some) for some in itertools.product(each, repeat=passes)]
        scores = [score(client) for client in clients]
        if min(scores) < least:
            best, least = clients[scores.index(min(scores))], min(scores)
    while improved:
        improved = False
        for epoch in range(len(orders)):
            for other in _others(orders[epoch], size, each):
                changed = (*orders[:epoch], other, *orders[epoch + 1 :])
                candidate = replace(protocol, orders=changed)
                if (value := score(candidate)) < least:
                    best, least, improved = candidate, value, True
            orders = list(best.orders or orders)
    return best, least


def _others(order: Order, size: int, few: list[Order]) -> Iterator[Order]:
    """Yield other orders of an epoch: all that differ, if they are few, else each exchange of two images."""
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
