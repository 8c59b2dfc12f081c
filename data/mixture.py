"""Several sources as one, evenly spread in proportion to their weights; the same for lists and streams."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from data.records import Record

T = TypeVar("T")


def turns(weights: Sequence[float], seed: int) -> Iterator[int]:
    """Which source comes next, without end; it depends on nothing else.

    Turn k of a source with weight w has a random place in [k/w, (k+1)/w): one turn per 1/w of the way. With S sources,
    any stretch of n turns holds n * p of a source with the share p of the weights, give or take 2 + 2 p (S - 2).

    Raises:
        ValueError: a weight that is not positive.
    """
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights of a mixture must be positive, got {list(weights)}")
    rngs = [random.Random(f"{seed}/{number}") for number in range(len(weights))]
    places = [
        (rng.random() / weight, number, 0) for number, (rng, weight) in enumerate(zip(rngs, weights, strict=True))
    ]
    heapq.heapify(places)
    while places:
        _, number, k = places[0]
        yield number
        heapq.heapreplace(places, ((k + 1 + rngs[number].random()) / weights[number], number, k + 1))


def blend(sources: Sequence[Iterable[T]], weights: Sequence[float], seed: int) -> Iterator[T]:
    """Sources blended by `turns`, lazily, until the turn comes to one that is used up. Each keeps its order.

    With the sizes as weights, everything is used.

    Raises:
        ValueError: no source, not one weight for each, or a weight that is not positive.
    """
    if not sources or len(sources) != len(weights):
        raise ValueError(
            f"a mixture needs at least one source and a weight for each; got {len(sources)}, {list(weights)}"
        )
    order = turns(weights, seed)
    iterators = [iter(source) for source in sources]
    return _in_turn(order, iterators)


def _in_turn(order: Iterator[int], iterators: Sequence[Iterator[T]]) -> Iterator[T]:
    for number in order:
        try:
            item = next(iterators[number])
        except StopIteration:
            return
        yield item


def mixture(sources: Sequence[tuple[Sequence[Record], float]], seed: int) -> list[Record]:
    """`blend` of lists with their weights.

    Raises:
        ValueError: no source, an empty one, a weight that is not positive, or an id that two records share.
    """
    if not sources or any(not records for records, _ in sources):
        raise ValueError("a mixture needs at least one source, and at least one record in each")
    mixed = list(blend([records for records, _ in sources], [weight for _, weight in sources], seed))
    check_unique(mixed)
    return mixed


def mixture_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares (their sum is 1) in proportion to size ** (1 / temperature).

    Temperature 1 keeps the proportions of the sizes; the higher it is, the more alike the shares.

    Raises:
        ValueError: no size, one below 1, a temperature that is not positive, or so low that a share vanishes.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a mixture needs at least one record in each source, got sizes {list(sizes)}")
    if not temperature > 0:
        raise ValueError(f"the temperature of a mixture must be positive, got {temperature}")
    powers = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    if min(powers) == 0.0:
        raise ValueError(f"temperature {temperature} leaves nothing of a source with {min(sizes)} records; raise it")
    return [power / sum(powers) for power in powers]


def check_unique(records: Iterable[Record]) -> None:
    """Refuse ids that two records share.

    Raises:
        ValueError: names the first one.
    """
    seen: dict[str, Record] = {}
    for record in records:
        first = seen.setdefault(record.id, record)
        if first is not record:
            places = f" ({record.place} and {first.place})" if record.place and first.place else ""
            raise ValueError(
                f"two records have the id {record.id!r}{places}; give the sources different seeds, splits or ids"
            )
