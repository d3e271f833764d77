"""Where the wall time of a run went, across all its attempts, and what kills have cost.

Every second belongs to one state. The sums travel in the commits. Between commits a beacon in the run says how far an attempt came,
so after a `kill -9` its time is known to one beacon. Steps done since the last commit are done again: that is `recompute`. No sum
ever falls, whatever was lost.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

STATES = ("productive", "data_wait", "checkpoint_stall", "evaluate", "startup", "staging", "restore", "recompute")


class Ledger:
    """The clock of one attempt, which adds to the sums of those before. The training thread alone changes its state.

    Args: clock: seconds, always growing. already: seconds that had passed when the ledger was made.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, already: float = 0.0) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(STATES, 0.0) | {"startup": already}
        self._state, self._since = "startup", clock()
        self.restarts = 0
        self.preemptions = 0
        """Attempts that ended because they were asked to."""
        self.lost_steps = 0
        """Steps that were done and have to be done again."""
        self.skipped_samples = self.nonfinite_steps = 0
        """Of all steps, those that were lost included."""
        self.recompute_until = 0
        """The last step that an earlier attempt is known to have done."""

    def enter(self, state: str) -> None:
        """From now on time belongs to this state."""
        now = self._clock()
        self._seconds[self._state] += now - self._since
        self._state, self._since = state, now

    @contextlib.contextmanager
    def within(self, state: str) -> Iterator[None]:
        """Time inside belongs to this state, afterwards to the one before."""
        before = self._state
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """State -> seconds up to now, in all attempts."""
        running, state = self._clock() - self._since, self._state
        return {name: value + (running if name == state else 0.0) for name, value in self._seconds.items()}

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time in which steps were done that counted."""
        return self.seconds["productive"] / max(self.total_seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "restarts": self.restarts,
            "preemptions": self.preemptions,
            "lost_steps": self.lost_steps,
            "skipped_samples": self.skipped_samples,
            "nonfinite_steps": self.nonfinite_steps,
            "recompute_until": self.recompute_until,
        }

    def go_on(
        self, committed: Mapping[str, Any], *, step: int, beacon: Mapping[str, Any] | None, restarts: int, preempted: bool
    ) -> None:
        """Adds what earlier attempts have used.

        Args:
            committed: the ledger in the commit that this attempt goes on from; empty, if it has none.
            step: of that commit.
            beacon: the newest one of an earlier attempt: its "step" and "ledger", which holds all that was before it.
            preempted: whether the attempt before was asked to stop.
        """
        last = beacon["ledger"] if beacon else {}
        for state in STATES:
            self._seconds[state] += max(float(found.get("seconds", {}).get(state, 0.0)) for found in (committed, last))
        self.restarts = restarts
        reached = int(beacon["step"]) if beacon else step

        def before(name: str) -> int:
            return max(int(found.get(name, 0)) for found in (committed, last))

        self.preemptions = before("preemptions") + preempted
        self.lost_steps = before("lost_steps") + max(0, reached - step)
        self.skipped_samples += before("skipped_samples")
        self.nonfinite_steps += before("nonfinite_steps")
        self.recompute_until = max(before("recompute_until"), reached)


def process_age_seconds() -> float:
    """How long this process has run; 0 where that can't be told. Imports take seconds before any clock of ours starts."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        started_ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return max(0.0, uptime - started_ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0
