"""The writing half of `clipjob pack`: images are loaded in threads and committed in order by one."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
from tqdm import tqdm

from job.data.pack_images import BAD_IMAGE_ERRORS
from job.errors import DataError, Stopped

BadImages = tuple[tuple[str, str], ...]
"""(key, reason) of each."""

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 1.0
"""A killed pack loses at most this much. Every commit is synced to the disk."""

SPARE_MAP_BYTES = 16 << 20
_PAGE_BYTES = 4096

Loaded = tuple[int, bytes]
"""Size of the source file, and what to store."""


def fill(
    folder: Path,
    keys: list[str],
    load: Callable[[str], Loaded],
    *,
    threads: int,
    max_bad_samples: float,
    stopping: Callable[[], bool],
) -> tuple[int, BadImages, int]:
    """Brings the LMDB in folder up to exactly these keys, less those whose image is bad; all of it on the disk.

    Returns: number of images added, bad images, source bytes of the added ones.
    Raises: DataError, too many bad images; Stopped; lmdb.Error, disk full.
    """
    bad: list[tuple[str, str]] = []
    batch: list[tuple[bytes, bytes]] = []
    source_bytes, batch_bytes, began = 0, 0, time.monotonic()
    environment: Any = lmdb.open(str(folder), map_size=SPARE_MAP_BYTES, lock=False, readahead=False)
    try:
        present = _drop_others(environment, set(keys))
        todo = [key for key in keys if key not in present]
        with (
            tqdm(total=len(keys), initial=len(present), desc="pack", unit="image", file=sys.stderr, disable=None) as bar,
            contextlib.closing(_in_order(load, todo, threads=threads)) as results,
        ):
            for done, (key, loaded) in enumerate(results, 1):
                bar.update()
                if isinstance(loaded, BaseException):
                    bad.append((key, str(loaded) or type(loaded).__name__))
                    _check_share(bad, len(keys), max_bad_samples)
                else:
                    source_bytes += loaded[0]
                    batch_bytes += len(loaded[1])
                    batch.append((key.encode(), loaded[1]))
                if batch_bytes >= COMMIT_BYTES or time.monotonic() - began >= COMMIT_SECONDS:
                    _commit(environment, batch)
                    batch, batch_bytes, began = [], 0, time.monotonic()
                    if stopping():
                        packed = len(present) + done - len(bad)
                        raise Stopped(
                            f"Stopped by a signal with {packed} of {len(keys)} images packed. Run the same command to go on."
                        )
            _commit(environment, batch)
        if len(bad) == len(keys):
            _check_share(bad, len(keys), 0)
        return len(todo) - len(bad), tuple(bad), source_bytes
    finally:
        environment.close()


def _drop_others(environment: Any, keys: set[str]) -> set[str]:
    """The keys that are packed already; those that the listing no longer has are deleted."""
    with environment.begin() as transaction:
        present = {key.decode() for key in transaction.cursor().iternext(values=False)}
    if others := present - keys:
        _make_room(environment, 2 * _PAGE_BYTES * len(others))
        with environment.begin(write=True) as transaction:
            for key in others:
                transaction.delete(key.encode())
    return present & keys


def _in_order(load: Callable[[str], Loaded], keys: list[str], *, threads: int) -> Generator[tuple[str, Loaded | BaseException]]:
    """What load returns or raises for each key. Few results wait at a time, so a slow disk can't fill the memory."""

    def attempt(key: str) -> Loaded | BaseException:
        try:
            return load(key)
        except BAD_IMAGE_ERRORS as error:
            return error

    waiting: deque[tuple[str, Future[Loaded | BaseException]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for key in keys:
            waiting.append((key, pool.submit(attempt, key)))
            if len(waiting) >= 4 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _commit(environment: Any, batch: list[tuple[bytes, bytes]]) -> None:
    pages = sum(2 + len(value) // _PAGE_BYTES for _, value in batch)
    _make_room(environment, pages * _PAGE_BYTES)
    written = False
    while not written:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in batch:
                    transaction.put(key, value)
            written = True
        except lmdb.MapFullError:
            _make_room(environment, environment.info()["map_size"])


def _make_room(environment: Any, needed_bytes: int) -> None:
    """Grows the map by what is needed and an eighth: the finished file keeps its map size, and readers reserve it."""
    info = environment.info()
    used_bytes = (info["last_pgno"] + 1) * environment.stat()["psize"]
    if used_bytes + needed_bytes + SPARE_MAP_BYTES // 2 > info["map_size"]:
        environment.set_mapsize((used_bytes + needed_bytes) * 9 // 8 + SPARE_MAP_BYTES)


def _check_share(bad: list[tuple[str, str]], total: int, allowed: float) -> None:
    if len(bad) <= allowed * total:
        return
    named = "; ".join(f"{key!r}: {why}" for key, why in bad[:5])
    raise DataError(
        f"{len(bad)} of the images tried can't be read or decoded ({total} in all), and --max-bad-samples allows a share of "
        f"{allowed:g}: {named}{'; …' if len(bad) > 5 else ''}. Replace or remove such files (of a CSV's images, --folder says "
        "where they lie), or raise --max-bad-samples to see them all; what is packed already is kept for the next attempt."
    )
