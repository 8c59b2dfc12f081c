"""Blending by weight: proportions in every stretch, laziness, temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import blend, mixture, mixture_weights, turns
from data.records import Record


def make(size: int, prefix: str = "r") -> list[Record]:
    return [Record(f"{prefix}/{n}", ({"role": "user", "content": f"{n}+0="},), str(n)) for n in range(size)]


def test_mixture_keeps_proportions_everywhere_and_repeats_nothing() -> None:
    a, b = make(300, "a"), make(1000, "b")
    mixed = mixture([(a, 1.0), (b, 3.0)], seed=0)
    assert len({record.id for record in mixed}) == len(mixed) == pytest.approx(1200, abs=4)  # a ends at 300 of 1200
    for start in range(0, 1100, 40):
        share = sum(record.id.startswith("a/") for record in mixed[start : start + 40])
        assert 8 <= share <= 12, start  # 10 of 40, give or take two
    assert [r.id for r in mixed if r.id.startswith("a/")] == [r.id for r in a]
    assert mixed == mixture([(a, 1.0), (b, 3.0)], seed=0)
    assert mixed != mixture([(a, 1.0), (b, 3.0)], seed=1)
    assert mixture([(a, 5.0)], seed=0) == a


weights_lists = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=6)


@given(weights_lists, st.integers(0, 2**32), st.integers(0, 300), st.integers(1, 200))
@settings(deadline=None)
def test_any_stretch_holds_the_shares(weights: list[float], seed: int, start: int, length: int) -> None:
    held = Counter(islice(turns(weights, seed), start, start + length))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        bound = 2 + 2 * share * max(0, len(weights) - 2)
        assert abs(held[number] - length * share) < bound + 1e-6


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 1000))
@settings(deadline=None)
def test_sizes_as_weights_use_everything(sizes: list[int], seed: int) -> None:
    sources = [[(number, k) for k in range(size)] for number, size in enumerate(sizes)]
    mixed = list(blend(sources, [float(size) for size in sizes], seed))
    assert sorted(mixed) == sorted(chain.from_iterable(sources))


def test_blend_is_lazy_and_the_same_for_lists_and_streams() -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[str]:
        for n in count():
            drawn.append(n)
            yield f"a{n}"

    stream = blend([numbers(), (f"b{n}" for n in count())], [2.0, 1.0], seed=5)
    assert drawn == []
    first = list(islice(stream, 30))
    assert len(drawn) == sum(item.startswith("a") for item in first)
    lists = [[f"a{n}" for n in range(500)], [f"b{n}" for n in range(500)]]
    assert list(islice(blend(lists, [2.0, 1.0], seed=5), 30)) == first


def test_blend_ends_when_the_turn_comes_to_a_source_that_is_used_up() -> None:
    order = list(islice(turns([1.0, 1.0], 3), 50))
    third = [place for place, number in enumerate(order) if number == 0][2]  # source 0 has two items only
    assert len(list(blend([["x", "y"], count()], [1.0, 1.0], seed=3))) == third


def test_a_source_keeps_its_places_when_others_change() -> None:
    """Each source draws from its own random numbers: this is what lets a stream know its order without the records."""
    with_two = [n for n in islice(turns([1.0, 1.0], 7), 400) if n == 0]
    pairs = list(islice(turns([1.0, 1.0, 1e-9], 7), 400))
    assert [n for n in pairs if n < 2][:390] == list(islice(turns([1.0, 1.0], 7), 390))
    assert len(with_two) == pytest.approx(200, abs=2)


def test_equal_weights_do_not_alternate_like_clockwork() -> None:
    order = list(islice(turns([1.0, 1.0], 0), 200))
    assert any(before == after for before, after in pairwise(order))


def test_mixture_errors() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        mixture([(make(2), 1.0), ([], 1.0)], seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        mixture([(make(2), 0.0)], seed=0)
    with pytest.raises(ValueError, match="two records have the id 'r/"):
        mixture([(make(9), 1.0), (make(9), 1.0)], seed=0)
    with pytest.raises(ValueError, match="a weight for each"):
        blend([[1], [2]], [1.0], seed=0)


def test_temperature() -> None:
    assert mixture_weights([100, 1, 25], 2) == pytest.approx([10 / 16, 1 / 16, 5 / 16])  # square roots
    assert mixture_weights([300, 100], 1) == pytest.approx([0.75, 0.25])
    assert mixture_weights([300, 100, 7], 1e9) == pytest.approx([1 / 3] * 3)
    assert mixture_weights([16, 4], 0.5) == pytest.approx([256 / 272, 16 / 272])
    assert mixture_weights([10**15, 10**15], 0.01) == [0.5, 0.5]  # no overflow
    with pytest.raises(ValueError, match="temperature of a mixture must be positive, got 0"):
        mixture_weights([1, 2], 0)
    with pytest.raises(ValueError, match="at least one record"):
        mixture_weights([1, 0], 1)
    with pytest.raises(ValueError, match="leaves nothing of a source with 1 records"):
        mixture_weights([1, 1000], 0.001)
