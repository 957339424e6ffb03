"""Epochs and steps: each example as often as its weight says, each step a function of its index."""

import pickle
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import mix665k
from stf_jax.data.planner import Planner


def planner(sizes: list[tuple[int, int]], **options: Any) -> Planner:
    lengths, images = np.array(sizes, np.int32).reshape(-1, 2).T
    arguments: dict[str, Any] = {
        "lengths": lengths,
        "images": images,
        "pools": [np.arange(len(sizes))],
        "draws": [len(sizes)],
        "row_length": 64,
        "row_images": 3,
        "batch_size": 4,
        "packing": "packed",
        "seed": 1,
    }
    return Planner(**arguments | options)


def seen(plan: Planner, epoch: int, hosts: int = 1) -> list[int]:
    """All examples of an epoch, as that many hosts would come to them."""
    first = sum(plan.steps(before) for before in range(epoch))
    local = plan.batch_size // hosts
    examples: list[int] = []
    for host in range(hosts):
        for step in range(first, first + plan.steps(epoch)):
            for row in range(host * local, (host + 1) * local):
                examples += plan.row(step, row).tolist()
    return examples


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), min_size=1, max_size=80),
    packing=st.sampled_from(["packed", "grouped", "single"]),
    seed=st.integers(-1, 2**70),
    hosts=st.sampled_from([1, 2, 4]),
)
def test_an_epoch_has_every_example_once(
    sizes: list[tuple[int, int]], packing: str, seed: int, hosts: int
) -> None:
    plan = planner(sizes, packing=packing, seed=seed)
    for epoch in (0, 2):
        assert sorted(seen(plan, epoch, hosts)) == list(range(len(sizes)))
        rows = plan.rows(epoch)
        for row in range(len(rows)):
            assert plan.lengths[rows[row]].sum() <= 64
            assert plan.images[rows[row]].sum() <= 3
            assert packing == "packed" or len(rows[row]) == 1
        assert -(-len(rows) // 4) == plan.steps(epoch)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 3.5), min_size=3, max_size=3),
    epochs=st.integers(1, 6),
)
def test_no_example_comes_again_before_all_have_come(
    counts: list[int], weights: list[float], epochs: int
) -> None:
    starts = np.concatenate([[0], np.cumsum(counts)])
    pools = [np.arange(starts[n], starts[n + 1]) for n in range(len(counts))]
    draws = [max(1, round(w * n)) for w, n in zip(weights, counts, strict=False)]
    plan = planner([(1, 0)] * int(starts[-1]), pools=pools, draws=draws)
    examples = np.concatenate([plan.examples(epoch) for epoch in range(epochs)])
    times = np.bincount(examples, minlength=starts[-1])
    for pool, drawn in zip(pools, draws, strict=True):
        assert times[pool].sum() == drawn * epochs
        assert times[pool].max() - times[pool].min() <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = [(10 + n % 20, n % 2) for n in range(200)]
    orders = [seen(planner(sizes, seed=seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert seen(planner(sizes, seed=2), 1) == orders[3]
    # From any step, and after a journey to a worker.
    plan = planner(sizes)
    late = plan.steps(0) + plan.steps(1) + 1
    there = pickle.loads(pickle.dumps(planner(sizes)))
    np.testing.assert_array_equal(there.row(late, 2), plan.row(late, 2))
    assert plan.locate(late) == (2, 1)


def test_the_batches_are_not_sorted_by_length() -> None:
    lengths, images = mix665k.lengths(20_000)
    plan = planner(
        list(zip(lengths.tolist(), images.tolist(), strict=True)),
        row_length=2048,
        row_images=8,
        batch_size=32,
    )
    rows = plan.rows(0)
    longest = np.array([lengths[rows[row]].max() for row in range(len(rows) // 32 * 32)])
    means = longest.reshape(-1, 32).mean(axis=1)
    # Means of 32 independent rows scatter by the rows' deviation over sqrt(32).
    assert means.std() < 1.5 * longest.std() / np.sqrt(32)
    halves = np.array_split(means, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.1 * longest.std()


@pytest.mark.parametrize("packing", ["packed", "grouped"])
def test_665_000_examples_take_seconds(packing: str) -> None:
    lengths, images = mix665k.lengths()
    plan = planner(
        [],
        lengths=lengths,
        images=images,
        pools=[np.arange(len(lengths))],
        draws=[len(lengths)],
        row_length=2048,
        row_images=8,
        batch_size=128,
        packing=packing,
    )
    start = time.process_time()
    rows = plan.rows(0)
    assert time.process_time() - start < 20  # 2 s on an idle machine
    np.testing.assert_array_equal(np.sort(rows.examples), np.arange(len(lengths)))
    if packing == "packed":
        assert plan.fill >= 0.97
