"""What metrics, ledger, watchdog, history and log cost per step, against a step of the demo on this machine."""

import contextlib
import io
import logging
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.demo import run_demo
from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, publish, say, spread, table
from job.attempt import versions
from job.checkpoint.beacon import EVERY_SECONDS, Beacon
from job.checkpoint.store import RunStore
from job.config import Config
from job.data.batches import DecodeTally
from job.demo import FOLDER
from job.fields import Interval
from job.model.build import load_base, write_base
from job.runtime.history import History
from job.runtime.ledger import Ledger
from job.runtime.log import JsonLines, always_with
from job.runtime.metrics import Metrics
from job.runtime.watchdog import Watchdog
from job.runtime.world import World
from job.start import new_state
from job.telemetry import Telemetry

MOST_PERCENT = 0.2
STEPS = 20_000
PLANNED = 10**9
SCRAPE_SECONDS = 15.0
"""Prometheus's usual interval."""
GPU_STEP_SECONDS = 0.1
"""Batch 1024 of ViT-B-32 at 10 000 samples per second, as an H100 should have them."""


class Report:
    """What a step hands over, its numbers read already."""

    def __init__(self, step: int) -> None:
        self._step = step

    def read(self) -> dict[str, Any]:
        names = ("loss", "gradient_norm", "logit_scale", "accuracy_image_to_text", "accuracy_text_to_image")
        row: dict[str, Any] = {"step": self._step, "lr": 1e-5, "pairs": 256, "bad_samples": 0, "right_caption_probability": 0.5}
        return row | dict.fromkeys(names, 1.0)


class Seen:
    """What train.py keeps for those who look. Close it."""

    def __init__(self, folder: Path, *, log_every: Interval) -> None:
        self.config = Config(csv="x.csv", lmdb="x.lmdb", run=str(folder / "run"), global_batch_size=256, log_every=log_every)
        write_base(folder / "base", model=str(FOLDER / "tiny.json"), pretrained="", seed=0)
        clip = load_base(folder / "base")
        self.ledger, self.watchdog = Ledger(), Watchdog(limit_seconds=1800)
        self.metrics = Metrics(port=9465, watchdog=self.watchdog, build=versions())
        attempt: Any = SimpleNamespace(metrics=self.metrics, ledger=self.ledger, world=World(), device=torch.device("cpu"))
        self.telemetry = Telemetry(
            self.config,
            attempt,
            new_state(self.config, clip),
            view=clip.view,
            tally=DecodeTally(),
            steps=PLANNED,
            steps_per_epoch=100.0,
        )
        self.history = History(self.telemetry.row)
        self.store = RunStore(self.config.run)
        self.store.attempt = 1

    def step(self, step: int) -> None:
        """The calls that train.py makes around a step, the step itself left out."""
        with self.ledger.within("evaluate"):
            pass
        always_with(step=step)
        self.watchdog.beat("training")
        self.ledger.enter("data_wait")
        self.ledger.enter("productive")
        self.history.add(Report(step), data_wait_seconds=0.0)

    def write_beacon(self) -> None:
        """Once, as every so many seconds, and as then on another thread."""
        written = threading.Event()

        def on_written(content: Mapping[str, Any]) -> None:
            self.metrics.tell(content)
            written.set()

        content = {"step": 1, "steps": PLANNED, "row": self.history.last_row, "ledger": self.ledger.to_json()}
        beacon = Beacon(self.store, lambda: content, on_written=on_written)
        written.wait()
        beacon.close()

    def scrape(self) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics.port}/metrics") as answer:
            answer.read()

    def close(self) -> None:
        self.telemetry.close()
        self.metrics.close()
        self.watchdog.close()


def cpu_seconds(call: Callable[[int], object], *, times: int) -> float:
    """Per call, of all threads: what another thread computes is taken from the step as well."""
    began = time.process_time()
    for at in range(1, times + 1):
        call(at)
    return (time.process_time() - began) / times


def measure(folder: Path, *, steps: int) -> dict[str, float]:
    """CPU-seconds of each part, per occurrence."""
    lines = logging.StreamHandler(io.StringIO())
    lines.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[lines], force=True)
    with contextlib.closing(Seen(folder / "quiet", log_every=Interval("seconds", 10**9))) as quiet:
        step = cpu_seconds(quiet.step, times=steps)
        beacon = cpu_seconds(lambda _: quiet.write_beacon(), times=steps // 100)
        scrape = cpu_seconds(lambda _: quiet.scrape(), times=steps // 100)
    with contextlib.closing(Seen(folder / "telling", log_every=Interval("steps", 1))) as telling:
        line = cpu_seconds(telling.step, times=steps // 10) - step
    return {"step": step, "line": line, "beacon": beacon, "scrape": scrape}


def main() -> int:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        say("what is done around a step")
        found = [measure(Path(name) / f"{at}", steps=STEPS // (10 if args.quick else 1)) for at in range(args.repeats)]
        say("the demo's steps")
        result = run_demo(Path(name) / "demo", seed=0, flags=["--max-steps", "40", "--evaluate-every", "0"])
    seconds = {"the demo": 64 / result["samples_per_second"], "100 ms": GPU_STEP_SECONDS}

    def shares(of_step: float) -> list[float]:
        """In percent of a step, with what happens every so often spread over all steps."""
        return [
            100 * (one["step"] / of_step + (one["line"] + one["beacon"]) / EVERY_SECONDS + one["scrape"] / SCRAPE_SECONDS)
            for one in found
        ]

    limits = []
    for what, of_step in seconds.items():
        share = shares(of_step)
        limits.append(Limit(f"of a step of {what}", median(share), MOST_PERCENT, "%", spread=spread(share, 3)))
    names = {
        "step": "calls around each step",
        "line": f"a line in the log, every {EVERY_SECONDS:g} s",
        "beacon": f"a beacon in the run, every {EVERY_SECONDS:g} s",
        "scrape": f"a scrape of /metrics, every {SCRAPE_SECONDS:g} s",
    }
    rows = [(name, f"{spread([1e6 * one[part] for one in found], 1)} µs") for part, name in names.items()]
    rows.append(("step of the demo", f"{1000 * seconds['the demo']:.1f} ms"))
    text = "\n".join((table(("what", "CPU time"), rows), "", table(LIMIT_COLUMNS, [limit.row() for limit in limits])))
    return publish(args, "Overhead of seeing", text, limits=limits, raw={"seconds": found, "steps": seconds})


if __name__ == "__main__":
    sys.exit(main())
