"""The rows of one attempt's history: one per step, and one per evaluation."""

import json
import time
from collections.abc import Callable
from typing import Any, Protocol


class Report(Protocol):
    def read(self) -> dict[str, Any]: ...


class History:
    """Keeps the rows of this attempt. A step's numbers are read one step late, so that a GPU always has work queued.

    A row's "seconds" is the time from one `add` to the next. On a GPU, where steps are queued, that is what one step takes, but for
    the first after a pause, which is only queued, and the last before one, for which that pause waits.

    Args: on_row: called with each row of a step once it has been read.
    """

    def __init__(self, on_row: Callable[[dict[str, Any]], None]) -> None:
        self._on_row = on_row
        self._lines: list[str] = []
        self._unread: tuple[Report, dict[str, float]] | None = None
        self.last_row: dict[str, Any] | None = None
        """Of the last step that was read."""
        self._clock = time.monotonic()

    def add(self, report: Report, *, data_wait_seconds: float) -> None:
        """Takes the report of a step that has been queued, and reads the one before."""
        self._read()
        now = time.monotonic()
        timing = {"data_wait_seconds": round(data_wait_seconds, 6), "seconds": now - self._clock}
        self._unread, self._clock = (report, timing), now

    def restart_clock(self) -> None:
        """What came since the last row (an evaluation, a save) belongs to no step."""
        self._clock = time.monotonic()

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.flush()
        self._lines.append(json.dumps({"kind": "evaluation", "step": step, **metrics}) + "\n")

    def flush(self) -> None:
        """Reads what is unread; waits for the device, and that time is the last step's."""
        self._read(wait_counts=True)

    def _read(self, *, wait_counts: bool = False) -> None:
        if self._unread is None:
            return
        (report, timing), self._unread = self._unread, None
        row = {"kind": "step", **report.read(), **timing}
        if wait_counts:
            now = time.monotonic()
            row["seconds"] += now - self._clock
            self._clock = now
        row["seconds"] = round(row["seconds"], 6)
        self._lines.append(json.dumps(row) + "\n")
        self.last_row = row
        self._on_row(row)

    def to_bytes(self) -> bytes:
        """All rows up to now, as JSON lines."""
        self.flush()
        return "".join(self._lines).encode()
