"""Images per CPU-second: open_clip's training transform against clipjob's pipeline, from the same LMDB and from a packed one."""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from benchmarks.images import write_photos
from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, paired, publish, ratios, say, spread, table
from job.data.batches import Samples, load_batches
from job.data.captions import Captions
from job.data.images import Images, open_images
from job.data.manifest import Column
from job.data.order import batches_from, rows_at
from job.data.pack import pack
from job.data.pixels import View
from job.runtime.memory import keep_freed_memory

BASELINE = "PIL + open_clip's train transform"
RAW, PACKED = "clipjob, raw JPEGs", "clipjob, packed to 256 pixels"
REQUIRED = {RAW: 2.6, PACKED: 6.0}
"""Times the baseline, per CPU-second, with one decode thread."""

VIEW = View(height=224, width=224, interpolation="bicubic", resize_mode="shortest")
CROP_SCALE = 0.9
BATCH_SIZE = 64


@dataclass(frozen=True)
class Rate:
    """One round of one variant."""

    per_cpu_second: float
    per_second: float


def measured(work: Callable[[], int]) -> Rate:
    """Args: work: returns how many images it made. CPU time is that of all threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    count = work()
    return Rate(count / (time.process_time() - cpu), count / (time.perf_counter() - wall))


def open_clip_images(images: Images, keys: Column) -> int:
    """What open_clip's own loader does to each image: LMDB value -> PIL -> float tensor. It is spared making batches."""
    transform = open_clip.image_transform(VIEW.height, is_train=True, aug_cfg={"scale": (CROP_SCALE, 1.0)})
    for key in keys:
        data = images.get(key)
        assert data is not None
        with Image.open(io.BytesIO(data)) as image:
            assert transform(image).shape == (3, VIEW.height, VIEW.width)
    return len(keys)


def clipjob_images(images: Images, keys: Column, *, captions: Captions, threads: int) -> int:
    """What `clipjob train` does: whole batches of pixels and tokens, in the order of an epoch."""
    positions = batches_from(0, global_batch_size=BATCH_SIZE)
    samples = (
        Samples(next(positions), rows_at(np.arange(start, start + BATCH_SIZE), row_count=len(keys), seed=0))
        for start in range(0, len(keys), BATCH_SIZE)
    )
    batches = load_batches(
        samples, keys=keys, images=images, captions=captions, view=VIEW, threads=threads, seed=0, crop_scale=CROP_SCALE
    )
    count = 0
    for batch in batches:
        assert not batch.bad
        count += len(batch.images)
    assert count == len(keys)
    return count


def captions_of(count: int) -> Captions:
    """Captions as long as COCO's. They are tokenised in the warm-up, so what is measured is any epoch but the first."""
    words = ["a", "the", "man", "woman", "dog", "cat", "red", "two", "small", "sitting", "on", "near", "street", "table", "water"]
    random = np.random.default_rng(1)
    texts = Column.of(f"{' '.join(random.choice(words, 10))} {number}" for number in range(count))
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return Captions(
        texts,
        tokenizer,
        lengths_of=lambda tokens: tokens.argmax(dim=-1) + 1,  # end-of-text is the largest token
        mode="whole",
        tag_separator=", ",
        template="{}",
        seed=0,
    )


def main() -> int:
    args = arguments(__doc__ or "", repeats=9).parse_args()
    count = 128 if args.quick else 1024
    keep_freed_memory()  # as `clipjob train` does; it serves the baseline as well
    torch.set_num_threads(1)  # else the baseline pays for OpenMP threads that wait; clipjob's decode threads do the same
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        say(f"making {count} images")
        sizes = write_photos(folder / "photos", count=count, seed=0)
        raw_bytes = pack(folder / "photos", folder / "raw").output_bytes
        packed_bytes = pack(folder / "photos", folder / "packed", resize=256).output_bytes
        raw, packed = open_images(folder / "raw"), open_images(folder / "packed")
        keys, captions = Column.of(raw.sample_keys(count)), captions_of(count)
        variants = {BASELINE: partial(open_clip_images, raw, keys)}
        for label, source in ((RAW, raw), (PACKED, packed)):
            for threads in (1, 2):
                variants[f"{label}, {threads} thread{'s' * (threads > 1)}"] = partial(
                    clipjob_images, source, keys, captions=captions, threads=threads
                )
        rates = paired({label: partial(measured, work) for label, work in variants.items()}, rounds=args.repeats)
        raw.close()
        packed.close()

    by_cpu = {label: [rate.per_cpu_second for rate in found] for label, found in rates.items()}
    by_wall = {label: [rate.per_second for rate in found] for label, found in rates.items()}
    compared = {label: ratios(found, by_cpu[BASELINE]) for label, found in by_cpu.items()}
    rows = [
        (label, spread(by_cpu[label]), spread(by_wall[label]), f"{of_medians:.2f}", spread(of_rounds, 2))
        for label, (of_medians, of_rounds) in compared.items()
    ]
    limits = [
        Limit(
            f"{label}, 1 thread, against the baseline",
            float(np.median(compared[f"{label}, 1 thread"][1])),
            bound,
            "×",
            at_least=True,
            spread=spread(compared[f"{label}, 1 thread"][1], 2),
        )
        for label, bound in REQUIRED.items()
    ]
    made = (
        f"{count} JPEGs of 500 × 375 pixels, {min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} KB "
        f"(median {np.median(sizes) / 1000:.0f}); LMDB {raw_bytes / count / 1000:.0f} KB per image, packed "
        f"{packed_bytes / count / 1000:.0f} KB. {args.repeats} paired rounds; median (min–max)."
    )
    text = "\n".join(
        (
            made,
            "",
            table(("pipeline", "images per CPU-second", "images per second", "ratio of medians", "ratio in each round"), rows),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    raw_figures = {"sizes": sizes, "per_cpu_second": by_cpu, "per_second": by_wall}
    return publish(args, "Image pipeline", text, limits=limits, raw=raw_figures)


if __name__ == "__main__":
    sys.exit(main())
