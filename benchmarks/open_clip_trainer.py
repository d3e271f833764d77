"""`python -m open_clip_train.main` as a baseline: its command, what its imports need, and its log."""

import importlib.util
import os
import re
import sys
from pathlib import Path

PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}
"""Ours -> its own. Both keep weights in float32 and compute in bf16 where autocast says so."""
STAND_INS = {
    "braceexpand.py": "",
    "webdataset/__init__.py": "class PipelineStage: pass\n",
    "webdataset/filters.py": "_shuffle = None\n",
    "webdataset/tariterators.py": "base_plus_ext = url_opener = tar_file_expander = valid_sample = None\n",
}
"""Its data module imports these two packages whatever the data are, and uses them for tar files alone."""


def command(csv: Path, *, model: str, device: str, precision: str, batch: int, workers: int, window: int) -> list[str]:
    """One epoch with our recipe and no checkpoint.

    Args:
        csv: columns path and tags, separated by |; path is that of an image file.
        window: steps between two lines of its log.
    """
    words = {
        "--dataset-type": "csv",
        "--train-data": csv,
        "--csv-separator": "|",
        "--csv-img-key": "path",
        "--csv-caption-key": "tags",
        "--model": model,
        "--device": device,
        "--precision": PRECISIONS[precision],
        "--batch-size": batch,
        "--workers": workers,
        "--epochs": 1,
        "--lr": 1e-5,
        "--wd": 0.1,
        "--warmup": 1,
        "--grad-clip-norm": 1.0,
        "--log-every-n-steps": window,
        "--logs": "none",
        "--report-to": "",
    }
    return [sys.executable, "-m", "open_clip_train.main", *(str(word) for pair in words.items() for word in pair)]


def environment(folder: Path) -> dict[str, str]:
    """os.environ, and where a package that it imports is not installed, a stand-in for it below folder."""
    missing = [name for name in STAND_INS if importlib.util.find_spec(name.removesuffix(".py").partition("/")[0]) is None]
    for name in missing:
        path = folder / "stand-ins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_INS[name], encoding="utf-8")
    paths = [str(folder / "stand-ins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def read_log(log: str, *, batch: int) -> list[tuple[int, float, float]]:
    """(steps done, seconds of a step, seconds of it spent waiting for data) of each line about training.

    Both are means over the steps since the line before.
    """
    found = re.findall(r"Train Epoch: 0 \[ *(\d+)/.*?Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", log)
    return [(int(samples) // batch, float(step), float(waited)) for samples, waited, step in found]


def steady(lines: list[tuple[int, float, float]], *, skipped: int, window: int) -> list[tuple[float, float]]:
    """(seconds of a step, seconds waited) of the lines whose steps all come after the first `skipped` ones.

    The first line is about one step, those after it about `window` of them, the last about as many as are left.
    """
    full = [line for line in lines if (line[0] - 1) % window == 0]
    return [(step, waited) for done, step, waited in full if done - window >= skipped]
