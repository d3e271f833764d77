"""When something is due."""

import time

from job.fields import Interval

LONGEST_RISK_SECONDS = 600.0
"""`auto` never leaves more than ten minutes of work without a checkpoint."""
SHORTEST_AUTO_SECONDS = 60.0
STALL_SHARE = 0.005
UPLOAD_SHARE = 0.10


def due_at_step(interval: Interval, step: int, *, steps_per_epoch: float) -> bool:
    """Whether an interval in steps or epochs ends at this step: the same answer on each attempt."""
    if interval.kind not in ("steps", "epochs", "auto") or step == 0:
        return False
    every = interval.value if interval.kind == "steps" else (interval.value or 1.0) * steps_per_epoch
    return int(step / every) > int((step - 1) / every)


class CheckpointClock:
    """Decides when to save, from what saving has cost so far."""

    def __init__(self, interval: Interval, *, steps_per_epoch: float) -> None:
        self._interval = interval
        self._steps_per_epoch = steps_per_epoch
        self._last = time.monotonic()
        self._wait_seconds = SHORTEST_AUTO_SECONDS
        self._overdue = False

    def due(self, step: int) -> bool:
        """Whether to save at this step. Once due, it stays so until something was saved."""
        if self._interval.kind in ("steps", "epochs"):
            self._overdue |= due_at_step(self._interval, step, steps_per_epoch=self._steps_per_epoch)
            return self._overdue
        wait = {"seconds": self._interval.value, "auto": self._wait_seconds}.get(self._interval.kind)
        return wait is not None and time.monotonic() - self._last >= wait

    def saved(self, *, stall_seconds: float, upload_seconds: float) -> None:
        """A save has begun now; the last finished one stalled training and kept the uplink busy for so long."""
        self._last, self._overdue = time.monotonic(), False
        wanted = max(stall_seconds / STALL_SHARE, upload_seconds / UPLOAD_SHARE, SHORTEST_AUTO_SECONDS)
        self._wait_seconds = min(wanted, LONGEST_RISK_SECONDS)
