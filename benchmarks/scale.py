"""What clipjob promises at size: 10 million rows, resuming anywhere, the first batch, the command's own start."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scale_children
from benchmarks.images import write_small_images
from benchmarks.machine import LIMIT_COLUMNS, REPOSITORY, Limit, arguments, in_child, publish, say, spread, table
from job.data.order import batches_from, derived_key, permute, rows_at

MB = 1e6
KEY_BYTES, CAPTION_BYTES = 40, 80
CHUNK_ROWS = 100_000
RESUME_STEP, RESUME_BATCH = 1_000_000, 4096
BYTES_PER_SMALL_IMAGE = 8192
"""In the LMDB, generously: an image of 3 KB takes a page of its own."""


def key_of(row: int) -> str:
    """40 bytes, different for each row, in no order."""
    return f"images/{row % 1000:03d}/{row * 0x9E3779B97F4A7C15 % 2**64:016x}-{row:08d}.jpg"


def lines(start: int, stop: int) -> Iterator[str]:
    for row in range(start, stop):
        caption = f"a photo of thing {row * 2654435761 % 2**32:010d}, tag {row % 9973:04d}"
        yield f"{key_of(row)}|{caption:.<{CAPTION_BYTES}}\n"


def write_csv(path: Path, rows: int) -> None:
    assert len(key_of(rows - 1)) == KEY_BYTES
    with path.open("w", encoding="utf-8") as file:
        file.write("path|tags\n")
        for start in range(0, rows, CHUNK_ROWS):
            file.writelines(lines(start, min(start + CHUNK_ROWS, rows)))


def need_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes * 1.2:
        raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free and {needed_bytes * 1.2 / 1e9:.1f} are needed; give --folder.")


def big_csv(folder: Path, rows: int, repeats: int) -> tuple[list[Limit], dict[str, Any]]:
    need_disk(folder, rows * (KEY_BYTES + CAPTION_BYTES + 2))
    say(f"writing a CSV of {rows:,} rows")
    csv = folder / "big.csv"
    write_csv(csv, rows)
    say(f"reading it {repeats} times, each in a new process")
    found = [in_child(scale_children.read_and_split, csv) for _ in range(repeats)]
    csv.unlink()
    peaks = [one["peak_bytes"] / MB for one in found]
    seconds = [one["seconds"] for one in found]
    what = f"{rows:,} rows of {KEY_BYTES} + {CAPTION_BYTES} bytes"
    return [
        Limit(f"{what}: CSV → columns and split, peak memory of the process", max(peaks), 2000, "MB", spread=spread(peaks)),
        Limit(f"{what}: CSV → columns and split", float(np.median(seconds)), None, "s", spread=spread(seconds, 1)),
    ], {"big_csv": found}


def order(rows: int, repeats: int) -> tuple[list[Limit], dict[str, Any]]:
    say("the order of all rows")
    indices, seconds = np.arange(rows), []
    for turn in range(repeats):
        began = time.perf_counter()
        shuffled = permute(indices, row_count=rows, key=derived_key(0, 1, turn))
        seconds.append(time.perf_counter() - began)
        assert np.bincount(shuffled, minlength=rows).max() == 1
    what = f"order of {rows:,} rows, one epoch"
    return [Limit(what, float(np.median(seconds)), 2, "s", spread=spread(seconds, 2))], {"order_seconds": seconds}


def resume(rows: int, repeats: int) -> tuple[list[Limit], dict[str, Any]]:
    say("resuming")
    train_rows, seconds = np.arange(rows), []
    for turn in range(repeats):
        began = time.perf_counter()
        positions = next(batches_from(RESUME_STEP + turn, global_batch_size=RESUME_BATCH))
        batch = train_rows[rows_at(positions, row_count=rows, seed=0)]
        seconds.append(time.perf_counter() - began)
        assert batch.shape == (RESUME_BATCH,)
    what = f"resume at step {RESUME_STEP:,} (batch {RESUME_BATCH}, {rows:,} rows): rows of the next batch known"
    return [Limit(what, float(np.median(seconds)), 1, "s", spread=spread(seconds, 4))], {"resume_seconds": seconds}


def first_batch(folder: Path, rows: int, repeats: int) -> tuple[list[Limit], dict[str, Any]]:
    need_disk(folder, rows * (KEY_BYTES + CAPTION_BYTES + BYTES_PER_SMALL_IMAGE))
    say(f"writing a CSV and an LMDB of {rows:,} images")
    csv, images = folder / "middle.csv", folder / "images.lmdb"
    write_csv(csv, rows)
    write_small_images(images, [key_of(row) for row in range(rows)])
    say(f"the first batch, {repeats} times, each in a new process")
    found = [in_child(scale_children.first_batch, csv, images) for _ in range(repeats)]
    seconds = [one["seconds"] for one in found]
    added = [(one["peak_bytes"] - one["imports_bytes"]) / MB for one in found]
    mapped = [one["mapped_bytes"] / MB for one in found]
    imports = np.median([one["imports_bytes"] for one in found]) / MB
    what = f"{rows:,} rows: CSV → first batch of {found[0]['batch_size']}"
    return [
        Limit(f"{what}, after the imports", float(np.median(seconds)), 10, "s", spread=spread(seconds, 2)),
        Limit(f"{what}, memory above the {imports:.0f} MB of the imports", max(added), 400, "MB", spread=spread(added)),
        Limit("of these, pages of the LMDB in the kernel's cache", max(mapped), None, "MB", spread=spread(mapped)),
    ], {"first_batch": found}


def start_of_command(repeats: int) -> tuple[list[Limit], dict[str, Any]]:
    say("clipjob --help")
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "job", "--help"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    seconds = seconds[1:]  # the first one fills the disk cache
    return [Limit("`clipjob --help`", float(np.median(seconds)), 0.4, "s", spread=spread(seconds, 2))], {"help_seconds": seconds}


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[Limit], dict[str, Any]]:
    many, some = (200_000, 20_000) if args.quick else (10_000_000, 400_000)
    parts = (
        start_of_command(10),
        resume(many, 10),
        order(many, args.repeats),
        first_batch(folder, some, args.repeats),
        big_csv(folder, many, args.repeats),
    )
    return [limit for limits, _ in parts for limit in limits], {name: value for _, raw in parts for name, value in raw.items()}


def main() -> int:
    args = arguments(__doc__ or "", repeats=3).parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        limits, raw = measure(args, Path(name))
    note = "All files were in the page cache. For memory the worst run counts."
    return publish(args, "Scale", f"{table(LIMIT_COLUMNS, [limit.row() for limit in limits])}\n\n{note}", limits=limits, raw=raw)


if __name__ == "__main__":
    sys.exit(main())
