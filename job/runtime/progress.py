"""What a person or a log sees while a job runs: one live line on a terminal, a canonical line per interval elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from job.fields import Interval

log = logging.getLogger(__name__)

STAGING_LOG_SECONDS = 10.0

DATA_LIMITS = 0.1
"""Share of an interval spent waiting for data above which that is worth a warning."""
LONG_ENOUGH_SECONDS = 1.0
"""Shorter intervals say nothing about the pipeline."""

LIVE_LINE = "step {n}/{total} |{bar:12}| {elapsed} + {remaining}{postfix}"


class StagingProgress:
    """Shows files on their way to scratch: a bar each on a terminal, a log line now and then elsewhere. Close it.

    Called from any thread. Args: also: called with the same. live: whether this rank may show bars.
    """

    def __init__(self, *, also: Callable[[str, int, int], None], live: bool = True) -> None:
        self._also = also
        self._live = live and sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._told = time.monotonic()

    def __call__(self, name: str, done: int, planned: int) -> None:
        """So many bytes of a file are here."""
        self._also(name, done, planned)
        if self._live:
            if name not in self._bars:
                self._bars[name] = tqdm(
                    total=planned,
                    initial=done,
                    desc=name,
                    unit="B",
                    unit_scale=True,
                    dynamic_ncols=True,
                    file=sys.stderr,
                    leave=False,
                )
            self._bars[name].update(done - self._bars[name].n)
        elif time.monotonic() - self._told >= STAGING_LOG_SECONDS and done < planned:
            self._told = time.monotonic()
            log.info("staging goes on", extra={"file": name, "bytes": done, "planned_bytes": planned})

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


class Progress:
    """Shows steps as they are read. Close it: it owns the live line.

    Args:
        seconds_by_state: the ledger's, up to now.
        remedy: what helps when steps wait for data, as a sentence; empty: nothing is known to.
        live: whether this rank may have a live line.
    """

    def __init__(
        self,
        *,
        steps: int,
        done: int,
        every: Interval,
        steps_per_epoch: float,
        seconds_by_state: Callable[[], Mapping[str, float]] = dict,
        remedy: Callable[[], str] = str,
        live: bool = True,
    ) -> None:
        self._every = every
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._recall = ""
        self._saved = "none yet"
        self._last_time = time.monotonic()
        self._last_step = done
        self._samples = 0
        self._waited = 0.0
        self._seconds_by_state, self._remedy = seconds_by_state, remedy
        self._seconds = dict(seconds_by_state())
        self._advised = self._filled = False
        self._bar: Any = None
        if live and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, dynamic_ncols=True, file=sys.stderr, smoothing=0.1, bar_format=LIVE_LINE)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, row: dict[str, Any], *, samples: int) -> None:
        """One row of the history."""
        self._samples += samples
        self._waited += row["data_wait_seconds"]
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {_number(row['loss'])}, accuracy {_number(row['accuracy_image_to_text'])}{self._recall}, "
                f"{samples / max(row['seconds'], 1e-9):.0f} samples/s, saved {self._saved}",
                refresh=False,
            )
            self._bar.update(row["step"] - self._bar.n)
        if self._due(row["step"]):
            self._end_interval(row)

    def _end_interval(self, row: dict[str, Any]) -> None:
        """Where the interval's time went, and what would help if it went into waiting for data."""
        elapsed = max(time.monotonic() - self._last_time, 1e-9)
        before, self._seconds = self._seconds, dict(self._seconds_by_state())
        spent = {state: round((seconds - before[state]) / elapsed, 3) for state, seconds in self._seconds.items()}
        if self._bar is None:
            log.info(
                "step",
                extra={
                    **{name: value for name, value in row.items() if name not in ("kind", "seconds", "data_wait_seconds", "pairs")},
                    "steps": self._steps,
                    "epoch": round(row["step"] / self._steps_per_epoch, 3),
                    "samples_per_second": round(self._samples / elapsed, 2),
                    "data_wait_ratio": round(self._waited / elapsed, 4),
                    "time_spent": {state: share for state, share in spent.items() if share > 0},
                    "eta_seconds": round((self._steps - row["step"]) * elapsed / max(1, row["step"] - self._last_step)),
                },
            )
        share = self._waited / elapsed
        long_enough = self._filled and elapsed > LONG_ENOUGH_SECONDS  # the first interval fills the pipeline
        if share > DATA_LIMITS and long_enough and not self._advised and (remedy := self._remedy()):
            self._advised = True
            log.warning("%.0f %% of the time went into waiting for data. %s", 100 * share, remedy)
        self._filled = True
        self._last_time, self._last_step, self._samples, self._waited = time.monotonic(), row["step"], 0, 0.0

    def evaluating(self, done: int, total: int) -> None:
        """So many of the held-out images and texts have been encoded."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"evaluating {done / total:.0%}")

    def evaluated(self, step: int, metrics: dict[str, float], *, best: bool) -> None:
        """Held-out metrics of a step."""
        if "mean_recall" not in metrics:
            log.warning("no held-out image could be decoded, so nothing was evaluated", extra={"step": step})
            return
        both_ways = f"{metrics['image_retrieval_recall@5']:.3f}/{metrics['text_retrieval_recall@5']:.3f}"
        self._recall = f", recall@5 {both_ways}"
        guard = [metrics.get(f"guard_{way}_retrieval_recall@5") for way in ("image", "text")]
        kept = "" if None in guard else f", guard {guard[0]:.3f}/{guard[1]:.3f}"
        if self._bar is not None:
            note = ", the best so far" if best else ""
            log.info("step %d: held-out recall@5 %s (text -> image / image -> text)%s%s", step, both_ways, kept, note)
        else:
            log.info("evaluated", extra={"step": step, **metrics, "best": best})

    def saved(self, step: int, seconds: float, *, stall_seconds: float, upload_seconds: float, size: int) -> None:
        """A checkpoint that is durable now."""
        self._saved = f"step {step} at {time.strftime('%H:%M:%S')}"
        if self._bar is None:
            figures = {"seconds": seconds, "stall_seconds": stall_seconds, "upload_seconds": upload_seconds}
            rounded = {name: round(value, 3) for name, value in figures.items()}
            log.info("checkpoint", extra={"step": step, "bytes": size, **rounded})

    def _due(self, step: int) -> bool:
        if step == self._steps:
            return True
        if self._every.kind == "steps":
            return step % int(self._every.value) == 0
        if self._every.kind == "epochs":
            return step - self._last_step >= self._every.value * self._steps_per_epoch
        seconds = self._every.value if self._every.kind == "seconds" else 10.0
        return self._every.kind != "never" and time.monotonic() - self._last_time >= seconds


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
