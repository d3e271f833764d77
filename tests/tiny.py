"""Small real parts for tests: a model config, an LMDB of real image files, a CSV."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image

from job.model.build import ClipModel, load_base, write_base

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def write_config(folder: Path, **changes: Any) -> Path:
    """A model config JSON; changes replace top-level keys."""
    path = folder / "tiny-model.json"
    path.write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return path


def make_clip(folder: Path, **changes: Any) -> ClipModel:
    """A tiny model with random weights, built the way a job builds it."""
    folder.mkdir(exist_ok=True)
    write_base(folder / "base", model=str(write_config(folder, **changes)), pretrained="", seed=0)
    return load_base(folder / "base")


def picture(number: int, *, width: int = 40, height: int = 30) -> bytes:
    """A JPEG of its own for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_lmdb(path: Path, images: Mapping[str, bytes]) -> Path:
    environment = lmdb.open(str(path), map_size=2**26)
    with environment.begin(write=True) as transaction:
        for key, data in images.items():
            transaction.put(key.encode(), data)
    environment.close()
    return path


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("path|tags\n" + "".join(f"{key}|{text}\n" for key, text in rows), encoding="utf-8")
    return path


def write_data(folder: Path, count: int) -> tuple[Path, Path]:
    """(CSV, LMDB) of so many pairs."""
    keys = [f"images/{number:04}.jpg" for number in range(count)]
    rows = [(key, f"thing number {number}, kind {number % 7}") for number, key in enumerate(keys)]
    csv = write_csv(folder / "data.csv", rows)
    return csv, write_lmdb(folder / "images.lmdb", {key: picture(number) for number, key in enumerate(keys)})
