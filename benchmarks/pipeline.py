"""Images per CPU-second: open_clip's training transform, alone and in the usual loaders, against clipjob's pipeline."""

import contextlib
import gc
import importlib.util
import io
import multiprocessing
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import lmdb
import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.images import write_photos
from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, paired, parsed, publish, ratios, say, spread, table
from job.data.batches import Samples, load_batches
from job.data.captions import Captions
from job.data.gpu_jpeg import GpuJpegs
from job.data.images import Images, open_images
from job.data.manifest import Column
from job.data.order import batches_from, rows_at
from job.data.pack import pack
from job.data.pixels import View
from job.runtime.memory import keep_freed_memory

BASELINE = "PIL + open_clip's train transform"
RAW, PACKED = "clipjob, raw JPEGs", "clipjob, packed to 256 pixels"
PPM = f"{PACKED}, --format ppm"
DATALOADER, WEBDATASET = "the same in a DataLoader over the LMDB", "the same in WebDataset, from tar files"
PROCESSES = "2 processes of 1 thread"
LINEAR = 0.9
"""Share that is required of the rate of one thread times the number of threads."""
REQUIRED = {RAW: 2.6, PACKED: 6.0, PPM: 6.0}
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
    """Args: work: returns how many images it made. CPU time is that of all threads, and of worker processes that have ended."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    count = work()
    return Rate(count / (_cpu_seconds() - cpu), count / (time.perf_counter() - wall))


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def open_clip_images(images: Images, keys: Column) -> int:
    """What open_clip's own loader does to each image: LMDB value -> PIL -> float tensor. It is spared making batches."""
    transform = train_transform()
    for key in keys:
        data = images.get(key)
        assert data is not None
        with Image.open(io.BytesIO(data)) as image:
            assert transform(image).shape == (3, VIEW.height, VIEW.width)
    return len(keys)


def train_transform() -> Any:
    return open_clip.image_transform(VIEW.height, is_train=True, aug_cfg={"scale": (CROP_SCALE, 1.0)})


class Transformed(Dataset[torch.Tensor]):
    """What most training scripts have: LMDB value -> PIL -> transform. Each worker process opens the LMDB for itself."""

    def __init__(self, path: Path, keys: Column) -> None:
        self._path, self._keys, self._transform = path, keys, train_transform()
        self._transaction: Any = None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: int) -> torch.Tensor:
        if self._transaction is None:
            self._transaction = lmdb.open(str(self._path), readonly=True, lock=False).begin()
        with Image.open(io.BytesIO(self._transaction.get(self._keys[row].encode()))) as image:
            return cast(torch.Tensor, self._transform(image))


def dataloader_images(path: Path, keys: Column, *, workers: int) -> int:
    return _count(DataLoader(Transformed(path, keys), batch_size=BATCH_SIZE, shuffle=True, num_workers=workers))


def webdataset_images(shards: list[str], *, workers: int) -> int:
    import webdataset

    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg")
    transform = train_transform()
    return _count(DataLoader(dataset.map_tuple(transform), batch_size=BATCH_SIZE, num_workers=workers))


def _count(loader: Any) -> int:
    """Images of all batches; its workers have ended afterwards."""
    count = 0
    for batch in loader:
        count += len(batch[0] if isinstance(batch, list | tuple) else batch)
    gc.collect()
    return count


def write_shards(folder: Path, images: Images, keys: Column, *, shards: int) -> list[str]:
    """The images as tar files, as WebDataset wants them."""
    folder.mkdir()
    paths = [folder / f"{number}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for row in range(number, len(keys), shards):
                data = images.get(keys[row])
                assert data is not None
                entry = tarfile.TarInfo(f"{row:06}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return [str(path) for path in paths]


def clipjob_images(
    images: Images, keys: Column, *, captions: Captions, threads: int, batch: int = BATCH_SIZE, gpu: GpuJpegs | None = None
) -> int:
    """What `clipjob train` does: whole batches of pixels and tokens, in the order of an epoch. Args: gpu: decodes."""
    positions = batches_from(0, global_batch_size=batch)
    samples = (
        Samples(next(positions), rows_at(np.arange(start, start + batch), row_count=len(keys), seed=0))
        for start in range(0, len(keys), batch)
    )
    how: dict[str, Any] = {"view": VIEW, "threads": threads, "seed": 0, "crop_scale": CROP_SCALE, "gpu_jpegs": gpu}
    count = 0
    for made in load_batches(samples, keys=keys, images=images, captions=captions, pin_memory=gpu is not None, **how):
        assert not made.bad
        count += len(made.images)
    assert count == len(keys)
    return count


def clipjob_in_two_processes(pool: ProcessPoolExecutor, path: Path, *, count: int) -> int:
    """One decode thread each, half of the images: what a second core of this machine is worth to those who share nothing."""
    return sum(pool.map(_half, [path] * 2, [count] * 2, range(2)))


def _half(path: Path, count: int, which: int) -> int:
    images, keys, captions = _opened(path, count, which)
    return clipjob_images(images, keys, captions=captions, threads=1)


@cache
def _opened(path: Path, count: int, which: int) -> tuple[Images, Column, Captions]:
    """Of this process."""
    keep_freed_memory()
    torch.set_num_threads(1)
    images = open_images(path)
    return images, Column.of(images.sample_keys(count)[which::2]), captions_of(count)


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
    parser = arguments(__doc__ or "", repeats=9)
    parser.add_argument("--cores", type=int, default=2, help="threads and workers go up to this [default: %(default)s]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: also with JPEGs decoded on the GPU")
    args = parsed(parser)
    count = 128 if args.quick else 4096  # so that starting and ending threads weighs as little as in training
    keep_freed_memory()  # as `clipjob train` does; it serves the baseline as well
    torch.set_num_threads(1)  # else the baseline pays for OpenMP threads that wait; clipjob's decode threads do the same
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.ExitStack() as closing:
        folder = Path(name)
        say(f"making {count} images")
        sizes = write_photos(folder / "photos", count=count, seed=0)
        raw_bytes = pack(folder / "photos", folder / "raw").output_bytes
        packed_bytes = pack(folder / "photos", folder / "packed", resize=256).output_bytes
        ppm_bytes = pack(folder / "photos", folder / "ppm", resize=256, form="ppm").output_bytes
        raw, packed, ppm = (open_images(folder / name) for name in ("raw", "packed", "ppm"))
        keys, captions = Column.of(raw.sample_keys(count)), captions_of(count)
        variants = {BASELINE: partial(open_clip_images, raw, keys)}
        cores = max(2, min(16, args.cores))
        variants[f"{DATALOADER}, {cores} workers"] = partial(
            dataloader_images, shutil.copytree(folder / "raw", folder / "raw-of-workers"), keys, workers=cores
        )
        if importlib.util.find_spec("webdataset"):
            shards = write_shards(folder / "tars", raw, keys, shards=cores)
            variants[f"{WEBDATASET}, {cores} workers"] = partial(webdataset_images, shards, workers=cores)
        steps = [threads for threads in (1, 2, 4, 8, 16) if threads <= cores]
        for label, source in ((RAW, raw), (PACKED, packed), (PPM, ppm)):
            for threads in steps:
                variants[f"{label}, {threads} thread{'s' * (threads > 1)}"] = partial(
                    clipjob_images, source, keys, captions=captions, threads=threads
                )
        if args.device == "cuda":
            gpu, batch = GpuJpegs(torch.device("cuda")), min(count, 8 * GpuJpegs.chunk)
            for label, source in ((RAW, raw), (PACKED, packed)):
                for threads in steps:
                    variants[f"{label}, GPU decodes, {threads} thread{'s' * (threads > 1)}"] = partial(
                        clipjob_images, source, keys, captions=captions, threads=threads, batch=batch, gpu=gpu
                    )
        pool = closing.enter_context(ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")))
        for label, place in ((RAW, "raw"), (PACKED, "packed"), (PPM, "ppm")):
            variants[f"{label}, {PROCESSES}"] = partial(clipjob_in_two_processes, pool, folder / place, count=count)
        rates = paired({label: partial(measured, work) for label, work in variants.items()}, rounds=args.repeats)
        for images in (raw, packed, ppm):
            images.close()

    here = {label: found for label, found in rates.items() if PROCESSES not in label}  # those count their CPU time when they end
    by_cpu = {label: [rate.per_cpu_second for rate in found] for label, found in here.items()}
    by_wall = {label: [rate.per_second for rate in found] for label, found in rates.items()}
    compared = {label: ratios(found, by_cpu[BASELINE]) for label, found in by_cpu.items()}
    rows = [
        (label, spread(by_cpu[label]), spread(by_wall[label]), f"{of_medians:.2f}", spread(of_rounds, 2))
        for label, (of_medians, of_rounds) in compared.items()
    ]
    rows += [(label, "", spread(found), "", "") for label, found in by_wall.items() if label not in by_cpu]
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
    for label in REQUIRED:
        for threads in sorted({2, steps[-1]}):
            _, each = ratios(by_wall[f"{label}, {threads} threads"], by_wall[f"{label}, 1 thread"])
            what, bound = f"{label}, images per second of {threads} threads against 1", LINEAR * threads
            limits.append(Limit(what, float(np.median(each)), bound, "×", at_least=True, spread=spread(each, 2)))
        _, each = ratios(by_wall[f"{label}, 2 threads"], by_wall[f"{label}, {PROCESSES}"])
        what = f"{label}, images per second of 2 threads against {PROCESSES}"
        limits.append(Limit(what, float(np.median(each)), None, "×", at_least=True, spread=spread(each, 2)))
    made = (
        f"{count} JPEGs of 500 × 375 pixels, {min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} KB "
        f"(median {np.median(sizes) / 1000:.0f}); LMDB {raw_bytes / count / 1000:.0f} KB per image, packed "
        f"{packed_bytes / count / 1000:.0f} KB, as PPM {ppm_bytes / count / 1000:.0f} KB. {args.repeats} paired rounds; "
        "median (min–max)."
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
