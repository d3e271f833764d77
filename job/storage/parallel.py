"""Work that fails now and then: tried again a bounded number of times, several pieces at once, given up as a whole."""

import contextlib
import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from job.storage.explain import is_transient, shown

THREADS = 8
TRIES = 6
LONGEST_PAUSE_SECONDS = 8.0
GIVE_UP_SECONDS = 120.0
"""No third or later try begins after this: what takes so long is silent or too slow, not unlucky."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 2.0
"""With the other threads of work that has failed; one that waits for a silent server is left behind."""

T = TypeVar("T")

log = logging.getLogger(__name__)
_END: Any = object()


def retried(attempt: Callable[[], T], *, check: Callable[[], None] = lambda: None) -> T:
    """What attempt returns, in at most TRIES tries with growing pauses of random length between them.

    Args: check: what it raises ends the tries at once.
    Raises: what the last try raised, or the first that no other try could mend.
    """
    began = time.monotonic()
    for tried in itertools.count(1):
        check()
        try:
            return attempt()
        except Exception as error:
            check()  # botocore hides what was raised inside of a body that it sends
            late = tried > 1 and time.monotonic() - began > GIVE_UP_SECONDS
            if not is_transient(error) or tried == TRIES or late:
                raise
            log.info("storage is asked again", extra={"tried": tried, "reason": shown(str(error))[:300]})
        waking = time.monotonic() + random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.5 * 2**tried))
        while (left := waking - time.monotonic()) > 0:
            time.sleep(min(POLL_SECONDS, left))
            check()
    raise AssertionError("the loop returns or raises")


class _GivenUp(Exception):
    """Ends the workers of a transfer that has failed elsewhere."""


def in_parallel(work: Callable[[T, Callable[[], None]], None], items: Sequence[T], *, check: Callable[[], None]) -> None:
    """Calls work(item, given_up) for each item, on THREADS threads. The first failure ends it all and is raised.

    The threads are daemons: a signal must not wait for one that waits for a silent server.

    Args: check: called on this thread, and within given_up on all; what it raises ends it all.
    """
    todo = iter(items)  # a list's iterator gives each item to one thread
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    failed = threading.Event()

    def given_up() -> None:
        check()
        if failed.is_set():
            raise _GivenUp

    def run() -> None:
        outcome: BaseException | None = None
        try:
            while not failed.is_set() and (item := next(todo, _END)) is not _END:
                work(item, given_up)
        except BaseException as error:  # noqa: BLE001  raised by the thread that waits
            outcome = error
        ended.put(outcome)  # first: what others raise because of it must come later
        if outcome is not None:
            failed.set()

    threads = [threading.Thread(target=run, daemon=True, name="transfer") for _ in range(min(THREADS, len(items)))]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            check()
            with contextlib.suppress(queue.Empty):
                outcome = ended.get(timeout=POLL_SECONDS)
                running -= 1
                if outcome is not None:
                    raise outcome
    finally:
        failed.set()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
