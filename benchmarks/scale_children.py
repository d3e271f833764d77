"""The parts of benchmarks.scale that run in processes of their own, so that each has its memory to itself.

Imports are inside the functions: what a part does not import must not count as its memory.
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.machine import mapped_bytes, peak_rss_bytes, rss_bytes

VAL_FRACTION = 0.05


def read_and_split(csv: Path) -> dict[str, Any]:
    """Reads the CSV into columns and divides the rows. The peak is that of the whole process, Python and numpy included."""
    from job.data.manifest import read_manifest, split_rows

    began = time.perf_counter()
    manifest = read_manifest(csv)
    training, held_out = split_rows(manifest.keys, VAL_FRACTION)
    seconds = time.perf_counter() - began
    assert len(training) + len(held_out) == len(manifest)
    return {"rows": len(manifest), "seconds": seconds, "peak_bytes": peak_rss_bytes()}


def first_batch(csv: Path, lmdb: Path) -> dict[str, Any]:
    """From the first look at the CSV to a batch: the job's own reading and preflight, the split, then the pipeline."""
    import open_clip

    from job.config import Config
    from job.data.batches import Samples, load_batches
    from job.data.captions import Captions
    from job.data.order import batches_from, rows_at
    from job.data.pixels import View
    from job.inputs import read_data, staging_area
    from job.runtime.device import decode_threads

    imports_bytes, imports_mapped_bytes = rss_bytes(), mapped_bytes()
    began = time.perf_counter()
    config = Config(csv=str(csv), lmdb=str(lmdb), val_fraction=VAL_FRACTION)
    with staging_area(config, check=lambda: None) as staging:
        config, dataset = read_data(config, staging)
    captions = Captions(
        dataset.manifest.captions,
        open_clip.get_tokenizer("ViT-B-32"),
        lengths_of=lambda tokens: tokens.argmax(dim=-1) + 1,  # end-of-text is the largest token
        mode=config.caption_mode,
        tag_separator=config.tag_separator,
        template=config.template,
        seed=config.seed,
    )
    samples = (
        Samples(positions, dataset.train_rows[rows_at(positions, row_count=len(dataset.train_rows), seed=config.seed)])
        for positions in batches_from(0, global_batch_size=config.global_batch_size)
    )
    batches = load_batches(
        samples,
        keys=dataset.manifest.keys,
        images=dataset.images,
        captions=captions,
        view=View(height=224, width=224, interpolation="bicubic", resize_mode="shortest"),
        threads=decode_threads(config.threads),
        seed=config.seed,
        crop_scale=config.crop_scale,
    )
    batch = next(batches)
    seconds = time.perf_counter() - began
    assert len(batch.images) == config.global_batch_size
    memory = {"peak_bytes": peak_rss_bytes(), "mapped_bytes": mapped_bytes() - imports_mapped_bytes}
    batches.close()
    return {"batch_size": len(batch.images), "seconds": seconds, "imports_bytes": imports_bytes, **memory}
