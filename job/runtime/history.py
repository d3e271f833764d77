"""The rows of one attempt's history: one per step, and one per evaluation."""

import json
from collections.abc import Callable
from typing import Any, Protocol


class Report(Protocol):
    def read(self) -> dict[str, Any]: ...


class History:
    """Keeps the rows of this attempt. A step's numbers are read one step late, so that the device always has work queued.

    Args: on_row: called with each row of a step once it has been read.
    """

    def __init__(self, on_row: Callable[[dict[str, Any]], None]) -> None:
        self._on_row = on_row
        self._lines: list[str] = []
        self._unread: tuple[Report, dict[str, float]] | None = None

    def add(self, report: Report, **timing: float) -> None:
        """Takes the report of a step that has been queued, and reads the one before."""
        self.flush()
        self._unread = (report, timing)

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.flush()
        self._lines.append(json.dumps({"kind": "evaluation", "step": step, **metrics}) + "\n")

    def flush(self) -> None:
        """Reads what is unread; waits for the device."""
        if self._unread is not None:
            (report, timing), self._unread = self._unread, None
            row = {"kind": "step", **report.read(), **{name: round(value, 6) for name, value in timing.items()}}
            self._lines.append(json.dumps(row) + "\n")
            self._on_row(row)

    def to_bytes(self) -> bytes:
        """All rows up to now, as JSON lines."""
        self.flush()
        return "".join(self._lines).encode()
