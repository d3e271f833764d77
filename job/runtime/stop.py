"""Signals: a handler that only sets a flag, installed before any heavy import.

SIGTERM (Kubernetes, Slurm, docker stop), SIGUSR1 (Slurm's --signal) and SIGINT (Ctrl-C) all ask for the same: save, then
leave with exit code 75. Every phase looks at the flag.
"""

import os
import signal
import sys
from types import FrameType

from job.errors import INTERRUPTED_TWICE, Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Whether the job has been asked to stop, and by what."""

    def __init__(self) -> None:
        self.name = ""
        """The first signal's name, such as SIGTERM; empty while none came. A plain attribute, not threading.Event: its lock
        would block the handler for ever when a second signal interrupts the first one's."""

    @property
    def requested(self) -> bool:
        return self.name != ""

    def install(self) -> None:
        """Takes over the signals. Call it once, from the main thread, before torch is imported."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # our launcher starts ranks with them blocked

    def ignore(self) -> None:
        """The exit code is decided. Python gives signals their default action back while it ends, which takes torch a while,
        and another SIGTERM would turn a 75 into a 143."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def check(self, doing: str) -> None:
        """Raises: Stopped, if a signal came while there was nothing to save yet."""
        if self.requested:
            raise Stopped(f"{self.name} arrived while {doing}; nothing was lost. Run the same command to go on.")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT" and sys.stdin is not None and sys.stdin.isatty():
            os._exit(INTERRUPTED_TWICE)
        self.name = self.name or signal.Signals(number).name
