"""The preflight: everything about the data that would cost a night if the job found out by itself."""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.data.check_report import Findings, Problem, Report, Severity, shown_bytes
from job.data.check_samples import check_captions, check_images
from job.data.images import Images, match_keys
from job.data.manifest import Column, Manifest, split_rows
from job.errors import DataError

SAMPLED_IMAGES = 500
SAMPLED_CAPTIONS = 20_000
SAMPLED_KEYS = 1_000
"""By quick_check. Each looked-up key maps 64 KB of the LMDB into memory, and costs a seek on a cold disk."""


def check_data(
    manifest: Manifest,
    images: Images,
    *,
    token_lengths: Callable[[list[str]], NDArray[np.int64]],
    decode: Callable[[bytes], Any],
    context_length: int,
    global_batch_size: int,
    epochs: float,
    max_steps: int = 0,
    val_fraction: float = 0.0,
    max_bad_samples: float = 0.01,
    weight_bytes: int = 0,
    optimizer_bytes: int = 0,
    keep_checkpoints: int = 2,
    keep_every: int = 0,
    run: str = "",
    threads: int = 0,
    all_images: bool = False,
) -> Report:
    """What is in the data, what is wrong with it, and what the job will take.

    Args:
        token_lengths: n texts -> (n,) lengths in tokens before truncation, start and end included.
        decode: encoded image -> array (height, width, channels). Raises ValueError, saying why, for what is no image. Thread-safe.
        max_bad_samples: share of missing or undecodable images above which that is an error, not a warning.
        weight_bytes, optimizer_bytes: what a checkpoint holds (AdamW in float32: 8 bytes per trained parameter); 0: unknown.
        run: path or URI of the run; the free space of a local one is compared with what the checkpoints need.
        threads: decode threads; 0: one per core, 16 at most.
        all_images: every image and caption instead of an evenly spread sample.
    Raises: DataError, when the LMDB is damaged.
    """
    training, held_out = split_rows(manifest.keys, val_fraction)
    key_hashes, caption_hashes = hash_column(manifest.keys), hash_column(manifest.captions)
    distinct = np.sort(np.unique(key_hashes, return_index=True)[1])
    facts: dict[str, Any] = {
        "rows": len(manifest),
        "images_in_lmdb": len(images),
        "distinct_keys": len(distinct),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
        "separator": manifest.separator,
        "image_column": manifest.image_column,
        "caption_column": manifest.caption_column,
        "lmdb_bytes": images.file_bytes,
    }
    looked_at = distinct if all_images else _spread(distinct, SAMPLED_IMAGES)
    captions = np.arange(len(manifest)) if all_images else _spread(np.arange(len(manifest)), SAMPLED_CAPTIONS)
    parts: list[Findings] = [
        (facts, _split_problems(training, held_out, global_batch_size=global_batch_size, val_fraction=val_fraction)),
        _keys(manifest.keys, distinct, images, max_bad_samples=max_bad_samples),
        _captions(manifest.captions, caption_hashes, key_hashes),
        check_captions(manifest.captions, captions, token_lengths=token_lengths, context_length=context_length),
        check_images(
            manifest.keys,
            looked_at,
            images,
            is_held_out=np.isin(looked_at, held_out),
            decode=decode,
            threads=threads,
            max_bad_samples=max_bad_samples,
        ),
    ]
    steps = max_steps or math.ceil(epochs * len(training) / global_batch_size)
    kept = keep_checkpoints + 2 + (steps // keep_every if keep_every else 0)  # the best one, and the one being written
    parts.append(_job(steps, weight_bytes=weight_bytes, optimizer_bytes=optimizer_bytes, kept=kept, run=run))
    return Report(
        {name: value for part, _ in parts for name, value in part.items()}, [problem for _, some in parts for problem in some]
    )


def quick_check(
    manifest: Manifest, images: Images, *, training: NDArray[np.int64], global_batch_size: int, max_bad_samples: float
) -> list[Problem]:
    """The part of the check that is cheap enough for every start of a job: under a second, whatever the size.

    Args: training: the rows left after the split.
    Returns: warnings. Raises: DataError for errors, all in one message.
    """
    problems = _split_problems(training, np.empty(0, np.int64), global_batch_size=global_batch_size, val_fraction=0.0)
    problems += _keys(manifest.keys, _spread(np.arange(len(manifest)), SAMPLED_KEYS), images, max_bad_samples=max_bad_samples)[1]
    problems += _empty_captions(manifest.captions)[1]
    if errors := [problem.text for problem in problems if problem.severity == "error"]:
        raise DataError(" ".join(errors))
    return problems


def hash_column(column: Column) -> NDArray[np.uint64]:
    """A 64-bit hash per row: the means to count equal texts among 10 million in 80 MB."""
    from pandas.util import hash_array  # half a second that `train` need not wait for

    hashes = np.empty(len(column), np.uint64)
    texts = iter(column)
    for start in range(0, len(column), 65_536):
        chunk = np.array(list(itertools.islice(texts, 65_536)), dtype=object)
        hashes[start : start + len(chunk)] = hash_array(chunk, categorize=False)
    return hashes


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _split_problems(
    training: NDArray[np.int64], held_out: NDArray[np.int64], *, global_batch_size: int, val_fraction: float
) -> list[Problem]:
    problems = []
    if len(training) < global_batch_size:
        text = f"{len(training)} training rows do not fill one batch of {global_batch_size}. Lower --global-batch-size or add rows."
        problems.append(Problem("error", "too-few-rows", text))
    if val_fraction > 0 and not len(held_out):
        text = (
            f"--val-fraction {val_fraction:g} holds out no row at all, so nothing would be evaluated. Raise it, or give --val-csv."
        )
        problems.append(Problem("warning", "nothing-held-out", text))
    return problems


def _keys(keys: Column, rows: NDArray[np.int64], images: Images, *, max_bad_samples: float) -> Findings:
    missing = match_keys(keys, rows, images)
    facts = {"missing_keys": missing.count}
    if not missing.count:
        return facts, []
    severity: Severity = "error" if missing.count > max_bad_samples * missing.checked else "warning"
    return facts, [Problem(severity, "missing-keys", str(missing))]


def _empty_captions(captions: Column) -> Findings:
    short = np.flatnonzero(captions.byte_lengths() <= 16)  # longer runs of blanks do not occur
    empty = sum(not captions[row].strip() for row in short.tolist())
    facts = {"empty_captions": empty}
    if not empty:
        return facts, []
    most = 2 * empty > len(captions)
    text = f"{empty} of {len(captions)} captions are empty. " + (
        "Check that --caption-column names the right column."
        if most
        else "Remove these rows or write captions: they teach nothing."
    )
    return facts, [Problem("error" if most else "warning", "empty-captions", text)]


def _captions(captions: Column, caption_hashes: NDArray[np.uint64], key_hashes: NDArray[np.uint64]) -> Findings:
    facts, problems = _empty_captions(captions)
    filled = np.flatnonzero(captions.byte_lengths() > 0)
    values, first, counts = np.unique(caption_hashes[filled], return_index=True, return_counts=True)
    pairs = len(np.unique(caption_hashes * np.uint64(0x9E3779B97F4A7C15) ^ key_hashes))
    facts |= {"distinct_captions": len(values), "repeated_rows": len(captions) - pairs}
    if repeated := len(captions) - pairs:
        text = f"{repeated} rows repeat another row's key and caption, which only weighs that pair more. Remove them if unwanted."
        problems.append(Problem("advice", "repeated-rows", text))
    if not len(values):
        return facts, problems
    top = int(np.argmax(counts))
    share = float(counts[top]) / len(captions)
    example = captions[int(filled[first[top]])]
    if counts[top] > 1:
        facts |= {"most_common_caption": example[:80], "most_common_caption_share": share}
    if len(values) == 1 and len(captions) > 1:
        text = f"Every row has the same caption, {example[:80]!r}, so there is nothing to tell apart. Check --caption-column."
        problems.append(Problem("error", "one-caption", text))
    elif share > 0.1:
        text = (
            f"{share:.0%} of the rows share the caption {example[:80]!r}. The loss copes with that, but pairs with equal captions "
            "teach little. Add what distinguishes the images, if you can."
        )
        problems.append(Problem("advice", "common-caption", text))
    return facts, problems


def _job(steps: int, *, weight_bytes: int, optimizer_bytes: int, kept: int, run: str) -> Findings:
    checkpoint_bytes = weight_bytes + optimizer_bytes
    facts: dict[str, Any] = {"steps": steps}
    if checkpoint_bytes:
        facts |= {"weight_bytes": weight_bytes, "checkpoint_bytes": checkpoint_bytes}
        facts |= {"checkpoints_kept": kept, "run_needed_bytes": checkpoint_bytes * kept}
    if not run or "://" in run:
        return facts, []
    folder = Path(run).absolute()
    while not folder.exists():
        folder = folder.parent
    facts["run_free_bytes"] = free = shutil.disk_usage(folder).free
    if free >= checkpoint_bytes * kept:
        return facts, []
    text = (
        f"{folder} has {shown_bytes(free)} free, and {kept} checkpoints of {shown_bytes(checkpoint_bytes)} need "
        f"{shown_bytes(checkpoint_bytes * kept)}. Free some, choose another --run, or lower --keep-checkpoints."
    )
    return facts, [Problem("error", "disk-too-small", text)]
