"""The order of samples and their random numbers are pure functions of (seed, position)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.order import batches_from, derived_key, hash64, permute, rows_at, steps_in, uniforms


@given(row_count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_epoch_has_each_row_once(row_count: int, key: int) -> None:
    assert sorted(permute(np.arange(row_count), row_count=row_count, key=key)) == list(range(row_count))


def test_golden_values_never_change() -> None:
    assert hash64(np.array([0, 1], dtype=np.uint64), 0).tolist() == [16294208416658607535, 10451216379200822465]
    assert derived_key(1, 2, 3) == 7041752555471512236
    assert rows_at(np.arange(12), row_count=10, seed=7).tolist() == [8, 6, 3, 1, 2, 0, 5, 4, 7, 9, 8, 9]
    assert rows_at(np.array([10**12, 10**12 + 1]), row_count=9_999_991, seed=0).tolist() == [7361365, 1472294]
    assert uniforms(np.array([0, 5]), 2, seed=3, stream=1).tolist() == [
        [0.24647434906233, 0.17798893181490483],
        [0.11495518217554324, 0.6300362946070321],
    ]


def test_batches_continue_where_a_run_stopped() -> None:
    whole = [
        rows_at(next_batch, row_count=97, seed=1)
        for next_batch, _ in zip(batches_from(0, global_batch_size=16), range(20), strict=False)
    ]
    resumed = next(batches_from(13, global_batch_size=16))
    assert rows_at(resumed, row_count=97, seed=1).tolist() == whole[13].tolist()


def test_shares_of_ranks_join_to_the_same_batch() -> None:
    positions = next(batches_from(5, global_batch_size=64))
    together = rows_at(positions, row_count=1000, seed=2)
    for world_size in (2, 3, 4):
        bounds = [rank * 64 // world_size for rank in range(world_size + 1)]
        shares = [rows_at(positions[a:b], row_count=1000, seed=2) for a, b in itertools.pairwise(bounds)]
        assert np.concatenate(shares).tolist() == together.tolist()


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {tuple(rows_at(np.arange(e * 50, e * 50 + 50), row_count=50, seed=s)) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_each_row_is_equally_likely_at_each_place() -> None:
    rows, draws = 6, 6000
    counts = np.zeros((rows, rows))
    for seed in range(draws):
        counts[np.arange(rows), rows_at(np.arange(rows), row_count=rows, seed=seed)] += 1
    expected = draws / rows
    assert ((counts - expected) ** 2 / expected).sum() < 52.6  # chi-square, 25 degrees of freedom, p = 0.001


def test_numbers_of_a_sample_do_not_depend_on_its_neighbours() -> None:
    together = uniforms(np.arange(100), 5, seed=1, stream=0)
    assert uniforms(np.array([42]), 5, seed=1, stream=0)[0].tolist() == together[42].tolist()
    assert not np.allclose(together, uniforms(np.arange(100), 5, seed=1, stream=1))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = uniforms(np.arange(50_000), 3, seed=9, stream=4)
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.006
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.02
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "limit", "steps"),
    [(1, 100, 10, 0, 10), (1, 101, 10, 0, 11), (0.5, 100, 10, 0, 5), (3, 10, 64, 7, 7)],
)
def test_steps(epochs: float, rows: int, batch: int, limit: int, steps: int) -> None:
    assert steps_in(epochs=epochs, row_count=rows, global_batch_size=batch, max_steps=limit) == steps
