"""From the command to the first step, against a bare script that imports torch and open_clip and builds the model."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.checkpoint import write_data
from benchmarks.machine import LIMIT_COLUMNS, REPOSITORY, Limit, arguments, paired, publish, ratios, spread, table

BARE = """
import torch, open_clip
model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
tokenizer = open_clip.get_tokenizer("ViT-B-32")
"""
MOST_RATIO = 1.3


def bare_seconds() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", BARE], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def start_seconds(data: tuple[Path, Path], run: Path) -> float:
    """Until the first step can begin: the run exists, its first checkpoint was handed over, the first batch is decoded.

    It is a restart, as most starts of a job that is preempted are; so it reads the model from the run.
    """
    settings = {
        "csv": data[0],
        "lmdb": data[1],
        "run": run,
        "scratch": run.parent / "scratch",
        "model": "ViT-B-32",
        "device": "cpu",
        "max_steps": 1000,
        "global_batch_size": 16,
        "val_fraction": 0,
        "metrics_port": 0,
    }
    words = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "job", "train", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        for line in process.stderr or ():
            if line.startswith(b"{") and json.loads(line)["event"] == "training":
                process.kill()
                return time.monotonic() - began
        raise SystemExit(f"clipjob ended with {process.wait()} before its first step")


def main() -> int:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        data = write_data(folder, 64)
        found = paired({"bare": bare_seconds, "clipjob": partial(start_seconds, data, folder / "run")}, rounds=args.repeats)
    _, each = ratios(found["clipjob"], found["bare"])
    rows = [(label, f"{spread(seconds, 2)} s") for label, seconds in found.items()]
    limits = [Limit("clipjob against the bare script", float(np.median(each)), MOST_RATIO, "×", spread=spread(each, 2))]
    text = "\n".join(
        (
            f"ViT-B-32 from random weights on the CPU, nothing held out; {args.repeats} paired rounds; median (min–max).",
            "",
            table(("from the command to", "found"), rows),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    return publish(args, "Start", text, limits=limits, raw=found)


if __name__ == "__main__":
    sys.exit(main())
