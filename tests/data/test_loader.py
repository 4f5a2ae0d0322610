import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.loader import LoaderState, Order, evaluation_indices, weighted
from dpo.data.schema import Pair

orders = st.builds(
    Order,
    n_pairs=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    n_epochs=st.integers(1, 3),
    n_examples=st.none() | st.integers(1, 100),
    seed=st.integers(0, 5),
)


@given(orders)
@settings(deadline=None)
def test_every_pair_comes_once_an_epoch_and_nothing_is_dropped(order: Order) -> None:
    seen = [index for indices, _ in order.batches() for index in indices]
    whole = order.n_pairs * (order.n_epochs or 1)
    assert len(seen) == order.total_examples == min(whole, order.n_examples or whole)
    for epoch in range(len(seen) // order.n_pairs):
        part = seen[epoch * order.n_pairs : (epoch + 1) * order.n_pairs]
        assert Counter(part) == Counter(range(order.n_pairs))
    assert order.indices() == sorted(set(seen))


@given(orders)
@settings(deadline=None)
def test_total_steps_counts_the_batches(order: Order) -> None:
    assert len(list(order.batches())) == order.total_steps


@given(orders, st.integers(0, 30))
@settings(deadline=None)
def test_a_restored_state_gives_the_same_next_batch(order: Order, after: int) -> None:
    everything = list(order.batches())
    start = after % len(everything)
    state = everything[start - 1][1] if start else LoaderState()
    restored = LoaderState(**json.loads(json.dumps(state.as_json())))
    assert order.steps_from(restored) == len(everything) - start
    assert list(order.batches(restored)) == everything[start:]


def test_the_seed_changes_the_order_and_each_epoch_has_its_own() -> None:
    def order_of(seed: int) -> list[int]:
        order = Order(n_pairs=50, batch_size=50, n_epochs=2, n_examples=None, seed=seed)
        return [index for indices, _ in order.batches() for index in indices]

    first = order_of(0)
    assert first == order_of(0)
    assert first != order_of(1)
    assert first[:50] != first[50:]


def test_evaluation_indices_are_a_seeded_sorted_choice() -> None:
    chosen = evaluation_indices(100, 10, 3)
    assert chosen == sorted(set(chosen)) == evaluation_indices(100, 10, 3)
    assert len(chosen) == 10
    assert chosen != evaluation_indices(100, 10, 4)


@pytest.mark.parametrize("asked", [None, 5, 6])
def test_evaluation_takes_all_where_there_are_not_more(asked: int | None) -> None:
    assert evaluation_indices(5, asked, 0) == [0, 1, 2, 3, 4]


def make_pairs(**counts: int) -> list[Pair]:
    return [
        Pair("p", "c", "r", "c", name, "train", f"{name}{number}")
        for name, count in counts.items()
        for number in range(count)
    ]


def test_weights_are_counts_in_an_epoch() -> None:
    """a: 10 pairs at 2.3 are 2 x 10 + 3; b: 10 at 0.5 are 5; c has no weight: each once."""
    pairs = make_pairs(a=10, b=10, c=4)
    found = Counter(weighted(pairs, {"a": 2.3, "b": 0.5}, seed=0))
    assert sorted(found[index] for index in range(10)) == [2] * 7 + [3] * 3
    assert sorted(found[index] for index in range(10, 20)) == [0] * 5 + [1] * 5
    assert [found[index] for index in range(20, 24)] == [1] * 4
    assert weighted(pairs, {"a": 2.3, "b": 0.5}, seed=1) != sorted(found.elements())
    assert weighted(pairs, {}, seed=3) == list(range(24))
