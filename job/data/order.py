"""Which row is sample i, and which random numbers belong to it: pure functions of (seed, position), nothing else.

Neither depends on the number of devices, threads or restarts, so a run can go on at any sample at no cost. The arithmetic
is ours, on 64-bit integers, because shuffles in libraries may change between versions; tests hold golden values.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_ROUNDS = 8
_CHUNK = 1 << 16  # stays in the cache: twice as fast as whole columns over 10 million rows


def hash64(value: U64, key: int) -> U64:
    """Bits that look random, one 64-bit word per input word. Source: the finaliser of SplitMix64 (Steele et al., 2014)."""
    word = value + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def derived_key(*parts: int) -> int:
    """One 64-bit key from several numbers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = int(hash64(np.array([part % 2**64], dtype=np.uint64), key)[0])
    return key


def rows_at(positions: NDArray[Any], *, row_count: int, seed: int) -> NDArray[np.int64]:
    """The rows of samples at these positions of the run.

    Sample i is row permutation(seed, i // n)[i % n] of n rows, so each epoch has each row once, in an order of its own.
    The permutation is never stored: it is computed at the positions asked for.

    Args:
        positions: sample numbers since the start of the run, any shape (k,), increasing.
        row_count: n, the training rows.
    """
    positions = np.asarray(positions, dtype=np.int64)
    rows = np.empty(len(positions), dtype=np.int64)
    epochs = positions // row_count
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(positions[here] % row_count, row_count=row_count, key=derived_key(seed, 1, int(epoch)))
    return rows


def permute(indices: NDArray[Any], *, row_count: int, key: int) -> NDArray[np.int64]:
    """A bijection of 0 … row_count-1 onto itself, evaluated at indices.

    A Feistel network on pairs of digits in base ceil(sqrt(n)), walked on while it lands outside of 0 … n-1.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), the generalised Feistel and cycle walking.
    """
    base = np.uint64(int(np.ceil(np.sqrt(row_count))))
    out = np.empty(len(indices), dtype=np.int64)
    for start in range(0, len(indices), _CHUNK):
        word = indices[start : start + _CHUNK].astype(np.uint64)
        word = _feistel(word, base=base, key=key)
        outside = np.flatnonzero(word >= row_count)
        while len(outside):
            word[outside] = _feistel(word[outside], base=base, key=key)
            outside = outside[word[outside] >= row_count]
        out[start : start + _CHUNK] = word
    return out


def _feistel(word: U64, *, base: np.uint64, key: int) -> U64:
    left, right = word // base, word % base
    for turn in range(_ROUNDS):
        # The upper 32 bits of the hash, scaled to 0 … base-1 by a multiplication: a division would cost three times as much.
        step = ((hash64(right, key + turn) >> np.uint64(32)) * base) >> np.uint64(32)
        total = left + step
        left, right = right, np.where(total >= base, total - base, total)
    return left * base + right


def uniforms(positions: NDArray[Any], count: int, *, seed: int, stream: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) that belong to samples.

    Args:
        positions: (k,) sample numbers.
        count: how many numbers each sample gets.
        stream: what they are for; two streams of a seed are independent.
    Returns: (k, count).
    """
    counters = np.asarray(positions).astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count).astype(np.uint64)
    words = hash64(hash64(counters, derived_key(seed, 2, stream)), stream)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def steps_in(*, epochs: float, row_count: int, global_batch_size: int, max_steps: int) -> int:
    """All steps of a run: max_steps where it is given, else enough full batches for the epochs."""
    return max_steps or int(-(-epochs * row_count // global_batch_size))


def batches_from(step: int, *, global_batch_size: int) -> Iterator[NDArray[np.int64]]:
    """The sample numbers of global batch step, step + 1, … for ever; each (global_batch_size,)."""
    while True:
        yield np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
        step += 1
