"""The rows of one attempt's history: one per step, and one per evaluation."""

import json
import time
from collections.abc import Callable
from typing import Any, Protocol


class Report(Protocol):
    def read(self) -> dict[str, Any]: ...


class History:
    """Keeps the rows of this attempt. A step's numbers are read one step late, so that a GPU always has work queued.

    A row's "seconds" is the time since the row before was read: on a GPU, where steps are queued, what one step takes.

    Args: on_row: called with each row of a step once it has been read.
    """

    def __init__(self, on_row: Callable[[dict[str, Any]], None]) -> None:
        self._on_row = on_row
        self._lines: list[str] = []
        self._unread: tuple[Report, float] | None = None
        self.last_row: dict[str, Any] | None = None
        """Of the last step that was read."""
        self._clock = time.monotonic()

    def add(self, report: Report, *, data_wait_seconds: float) -> None:
        """Takes the report of a step that has been queued, and reads the one before."""
        self.flush()
        self._unread = (report, data_wait_seconds)

    def restart_clock(self) -> None:
        """What came since the last row (an evaluation, a save) belongs to no step."""
        self._clock = time.monotonic()

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.flush()
        self._lines.append(json.dumps({"kind": "evaluation", "step": step, **metrics}) + "\n")

    def flush(self) -> None:
        """Reads what is unread; waits for the device."""
        if self._unread is not None:
            (report, data_wait), self._unread = self._unread, None
            row = {"kind": "step", **report.read(), "data_wait_seconds": round(data_wait, 6)}
            row["seconds"] = round(time.monotonic() - self._clock, 6)
            self._clock = time.monotonic()
            self._lines.append(json.dumps(row) + "\n")
            self.last_row = row
            self._on_row(row)

    def to_bytes(self) -> bytes:
        """All rows up to now, as JSON lines."""
        self.flush()
        return "".join(self._lines).encode()
