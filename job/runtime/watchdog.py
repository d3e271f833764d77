"""Notices that a job has stopped getting on, shows where it hangs, and ends it: a scheduler can only restart what has ended."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from job.errors import TrainingError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class Watchdog:
    """Ends the process when nobody has called `beat` for a while. Close it.

    A phase that takes long must beat in between: when bytes arrive, batches are encoded, steps are done.

    Args:
        limit_seconds: of silence; 0: no limit.
        on_hang: called with what is wrong just before the end, with a few seconds to tell others.
    """

    def __init__(self, *, limit_seconds: float, on_hang: Callable[[str], None] = lambda _reason: None) -> None:
        self.limit_seconds = limit_seconds
        self.on_hang = on_hang
        self.phase = "starting"
        self.at = time.time()
        """Of the last beat, in seconds since 1970."""
        self._beat = time.monotonic()
        self._closed = threading.Event()
        if limit_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def age_seconds(self) -> float:
        """Since the last beat."""
        return time.monotonic() - self._beat

    @property
    def is_alive(self) -> bool:
        return not self.limit_seconds or self.age_seconds <= self.limit_seconds

    def beat(self, phase: str = "") -> None:
        """The job gets on. Args: phase: what it does now; empty: the same as before."""
        self.phase = phase or self.phase
        self._beat, self.at = time.monotonic(), time.time()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(POLL_SECONDS, self.limit_seconds / 4)):
            if self.is_alive:
                continue
            reason = (
                f"Nothing has moved for {self.age_seconds:.0f} seconds while {self.phase} (--hang-timeout). What every thread was "
                "doing stands above. Start the job again: it goes on from the last checkpoint."
            )
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            helper = threading.Thread(target=self.on_hang, args=(reason,), daemon=True)
            helper.start()
            helper.join(5.0)
            sys.stderr.write(f"clipjob: {reason}\n")
            sys.stderr.flush()
            os._exit(TrainingError.exit_code)
