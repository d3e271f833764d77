"""What metrics, ledger, watchdog, history and log cost per step, against a step of the demo on this machine."""

import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.demo import run_demo
from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, publish, say, spread, table
from job.fields import Interval
from job.runtime.history import History
from job.runtime.ledger import Ledger
from job.runtime.log import always_with
from job.runtime.metrics import Metrics
from job.runtime.progress import Progress
from job.runtime.watchdog import Watchdog

MOST_PERCENT = 0.2
STEPS = 20_000


class Report:
    """What a step hands over, its numbers read already."""

    def __init__(self, step: int) -> None:
        self._step = step

    def read(self) -> dict[str, Any]:
        names = ("loss", "gradient_norm", "logit_scale", "accuracy_image_to_text", "accuracy_text_to_image")
        row: dict[str, Any] = {"step": self._step, "lr": 1e-5, "pairs": 256, "bad_samples": 0, "right_caption_probability": 0.5}
        return row | dict.fromkeys(names, 1.0)


def seconds_per_step(steps: int) -> float:
    """The calls that train.py makes around each step, the step itself left out."""
    ledger, watchdog, metrics = Ledger(), Watchdog(limit_seconds=1800), Metrics(port=0)
    progress = Progress(steps=steps, done=0, every=Interval("seconds", 10), steps_per_epoch=100.0, live=False)

    def on_row(row: dict[str, Any]) -> None:
        progress.step(row, samples=256)
        metrics.row(row, steps=steps, steps_per_epoch=100.0)

    history = History(on_row)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        with ledger.within("evaluate"):
            pass
        always_with(step=step)
        watchdog.beat("training")
        ledger.enter("data_wait")
        ledger.enter("productive")
        history.add(Report(step), data_wait_seconds=0.0)
    seconds = (time.perf_counter() - began) / steps
    watchdog.close()
    return seconds


def main() -> int:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    logging.disable(logging.INFO)  # nothing is printed; a line every ten seconds costs nothing per step
    ours = [seconds_per_step(STEPS // (10 if args.quick else 1)) for _ in range(args.repeats)]
    say("the demo's steps")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        result = run_demo(Path(name), seed=0, flags=["--max-steps", "40", "--evaluate-every", "0"])
    step = 64 / result["samples_per_second"]
    share = [100 * seconds / step for seconds in ours]
    limits = [Limit("of a step of the demo", median(share), MOST_PERCENT, "%", spread=spread(share, 3))]
    rows = [("calls around a step", f"{spread([1e6 * seconds for seconds in ours], 1)} µs"), ("step", f"{1000 * step:.1f} ms")]
    text = "\n".join((table(("what", "found"), rows), "", table(LIMIT_COLUMNS, [limit.row() for limit in limits])))
    return publish(args, "Overhead of seeing", text, limits=limits, raw={"seconds_per_step": ours, "step_seconds": step})


if __name__ == "__main__":
    sys.exit(main())
