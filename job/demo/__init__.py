"""The embedded example: a small open_clip model, trained from random weights on 2465 real images (OpenMoji)."""

from pathlib import Path
from typing import Any

from job.fields import Interval

FOLDER = Path(__file__).parent


def settings() -> dict[str, Any]:
    """The demo's settings; flags, environment and config file win over them."""
    return {
        "csv": str(FOLDER / "openmoji" / "data.csv"),
        "lmdb": str(FOLDER / "openmoji" / "images.lmdb"),
        "run": str(Path("clipjob-demo").absolute()),
        "model": str(FOLDER / "tiny.json"),
        "val_fraction": 0.1007,
        "global_batch_size": 64,
        "epochs": 15.0,
        "lr": 1e-3,
        "checkpoint_every": Interval("seconds", 10),
    }
