"""Samples per second of `clipjob train`, against open_clip's own trainer and the plain loop of a weblog post, on the same data."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import lmdb

from benchmarks import open_clip_trainer
from benchmarks.captions import make_captions
from benchmarks.device import cpu_has_bf16, device_name
from benchmarks.images import write_photos
from benchmarks.machine import (
    LIMIT_COLUMNS,
    REPOSITORY,
    Limit,
    arguments,
    in_child,
    paired,
    parsed,
    publish,
    ratios,
    say,
    spread,
    table,
)

OURS, OPEN_CLIP, PLAIN, SYNTHETIC = "clipjob train", "open_clip_train", "plain loop", "clipjob's step alone, one made batch"


@dataclass(frozen=True)
class Case:
    name: str
    precision: str
    tokens: float
    """Of a caption on average, start and end included."""
    packed: bool
    """Images packed to 256 pixels, for all of them; else JPEGs as they are."""
    required: float | None
    """Times the rate of open_clip_train."""
    of_synthetic: float | None = None
    """Times the rate of the step alone, on an H100 with 16 cores. And samples per second there."""
    rate: float | None = None


CASES = {
    "cpu": (
        Case("bf16-22", "bf16", 22, False, 1.35),
        Case("fp32-22", "fp32", 22, False, 1.5),
        Case("bf16-8", "bf16", 8, False, 1.5),
    ),
    "cuda": (
        Case("raw", "bf16", 22, False, 2.0, of_synthetic=0.8),
        Case("packed", "bf16", 22, True, None, of_synthetic=0.95, rate=10_000),
    ),
}


@dataclass(frozen=True)
class Size:
    """What all of them run, and which of its steps count."""

    model: str
    device: str
    batch: int
    steps: int
    skipped: int
    """Steps at the start, while kernels are chosen, caches filled, and ours saves its first checkpoint."""
    window: int
    """Steps between two lines of open_clip_train's log. Each line waits for the device, so on a GPU they are rare."""
    workers: int


@dataclass(frozen=True)
class Speed:
    samples_per_second: float
    waiting: float | None
    """Share of the time that the step waited for its batch; None where nobody tells."""


@dataclass(frozen=True)
class Data:
    """The same pairs in the form that each of them reads."""

    csv: Path
    images: Path
    """LMDB"""
    paths_csv: Path
    """Of loose files, for open_clip_train."""


def write_case_data(folder: Path, photos: Path, case: Case, *, rows: int) -> Data:
    """Row i has image i modulo their number, and a caption of its own."""
    from job.data.pack import pack

    images = photos.parent / ("packed.lmdb" if case.packed else "raw.lmdb")
    pack(photos, images, resize=256 if case.packed else 0)
    files = _unpack(images, photos.parent / "packed-files") if case.packed else photos
    names = sorted(path.name for path in photos.iterdir())
    pairs = list(
        zip([names[row % len(names)] for row in range(rows)], make_captions(rows, tokens=case.tokens, seed=0), strict=True)
    )
    folder.mkdir()
    for name, prefix in (("data", ""), ("paths", f"{files}/")):
        lines = "".join(f"{prefix}{key}|{caption}\n" for key, caption in pairs)
        (folder / f"{name}.csv").write_text("path|tags\n" + lines, encoding="utf-8")
    return Data(folder / "data.csv", images, folder / "paths.csv")


def _unpack(images: Path, folder: Path) -> Path:
    """The images of an LMDB as loose files, so that nobody has to decode larger ones than the others."""
    folder.mkdir(exist_ok=True)
    with lmdb.open(str(images), readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key, data in transaction.cursor():
            (folder / key.decode()).write_bytes(data)
    return folder


def clipjob_speed(data: Data, case: Case, size: Size, folder: Path, *, also: Sequence[str] = ()) -> Speed:
    """The real command; its figures are those that it keeps in the run's history. Args: also: further flags."""
    from job.checkpoint.store import RunStore

    run = folder / "run"
    settings = {
        "csv": data.csv,
        "lmdb": data.images,
        "run": run,
        "scratch": folder / "scratch",
        "model": size.model,
        "device": size.device,
        "precision": case.precision,
        "max_steps": size.steps,
        "global_batch_size": size.batch,
        "val_fraction": 0,
        "checkpoint_every": 0,
        "metrics_port": 0,
    }
    words = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    _run([sys.executable, "-m", "job", "train", *words, *also], folder, cwd=REPOSITORY)
    rows = [row for row in RunStore(str(run)).read_history() if row["kind"] == "step"][size.skipped :]
    shutil.rmtree(run)  # 4 GB
    assert len(rows) == size.steps - size.skipped
    assert not any(row["bad_samples"] for row in rows)
    seconds = [row["seconds"] for row in rows]
    return Speed(size.batch / median(seconds), sum(row["data_wait_seconds"] for row in rows) / sum(seconds))


def open_clip_speed(data: Data, case: Case, size: Size, folder: Path) -> Speed:
    """open_clip's own trainer; its figures are those of its log."""
    command = open_clip_trainer.command(
        data.paths_csv,
        model=size.model,
        device=size.device,
        precision=case.precision,
        batch=size.batch,
        workers=size.workers,
        window=size.window,
    )
    log = _run(command, folder, cwd=folder, environment=open_clip_trainer.environment(folder))
    lines = open_clip_trainer.read_log(log, batch=size.batch)
    steps = open_clip_trainer.steady(lines, skipped=size.skipped, window=size.window)
    seconds = [step for step, _ in steps]
    return Speed(size.batch / median(seconds), sum(waited for _, waited in steps) / sum(seconds))


def plain_speed(data: Data, case: Case, size: Size, folder: Path) -> Speed:
    words = {
        "--csv": data.csv,
        "--lmdb": data.images,
        "--model": size.model,
        "--device": size.device,
        "--precision": case.precision,
        "--batch": size.batch,
    }
    flat = [str(word) for pair in words.items() for word in pair]
    log = _run([sys.executable, "-m", "benchmarks.plain_loop", *flat], folder, cwd=REPOSITORY)
    seconds = json.loads(log.splitlines()[-1])["seconds"][size.skipped :]
    return Speed(size.batch / median(seconds), None)


def synthetic_speed(case: Case, size: Size) -> Speed:
    """The rate at which the device would work if batches cost nothing."""
    return Speed(size.batch / in_child(_synthetic_seconds, case, size), None)


def _synthetic_seconds(case: Case, size: Size) -> float:
    from benchmarks.synthetic import make_training

    training = make_training(model=size.model, device=size.device, precision=case.precision, batch=size.batch, tokens=case.tokens)
    seconds, unread, began = [], training.step(), time.monotonic()
    for _ in range(size.steps):
        report = training.step()
        unread.read()  # one step late, as the job reads them
        seconds.append(time.monotonic() - began)
        unread, began = report, time.monotonic()
    return median(seconds[size.skipped :])


def _run(command: list[str], folder: Path, *, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What the command printed. Raises: SystemExit, with the end of it, if it fails."""
    log = folder / "log"
    with log.open("wb") as stream:
        code = subprocess.run(command, cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    if code:
        raise SystemExit(f"{' '.join(command[:3])} ended with {code}:\n{text[-3000:]}")
    return text


def measure(case: Case, size: Size, *, photos: Path, rounds: int, ours: Sequence[str]) -> dict[str, list[Speed]]:
    """Each of them in every round, in a process of its own. Args: ours: further flags of clipjob train."""
    folder = photos.parent / case.name
    data = write_case_data(folder, photos, case, rows=size.batch * size.steps)
    variants: dict[str, Callable[[], Speed]] = {
        OURS: partial(clipjob_speed, data, case, size, folder, also=ours),
        OPEN_CLIP: partial(open_clip_speed, data, case, size, folder),
        PLAIN: partial(plain_speed, data, case, size, folder),
    }
    if size.device == "cuda":
        variants[SYNTHETIC] = partial(synthetic_speed, case, size)
    return paired(variants, rounds=rounds, warm_up=False)  # each is a new process and leaves out its own first steps


def report(case: Case, size: Size, found: dict[str, list[Speed]]) -> tuple[str, list[Limit]]:
    rates = {label: [one.samples_per_second for one in speeds] for label, speeds in found.items()}
    rows = []
    for label, speeds in found.items():
        waits = [100 * one.waiting for one in speeds if one.waiting is not None]
        of_medians, each = ratios(rates[OURS], rates[label])
        wait = f"{spread(waits, 1)} %" if waits else ""
        ratio = ("", "") if label == OURS else (f"{of_medians:.2f}", spread(each, 2))
        rows.append((label, spread(rates[label], 2 if size.device == "cpu" else 0), wait, *ratio))
    columns = ("", "samples/s", "waited for data", "clipjob over it: ratio of medians", "ratio in each round")
    images = "JPEGs packed to 256 pixels" if case.packed else "JPEGs of 500 × 375 pixels"
    heading = f"## {case.precision}, captions of {case.tokens:g} tokens on average, {images}"
    promised = size.device == "cpu" or "H100" in device_name(size.device)
    limits = []
    if case.rate and promised:
        limits.append(Limit(f"{case.name}: {OURS}", median(rates[OURS]), case.rate, "samples/s", at_least=True))
    for label in (OPEN_CLIP, PLAIN, SYNTHETIC):
        if label in rates:
            of_medians, each = ratios(rates[OURS], rates[label])
            bound = {OPEN_CLIP: case.required, SYNTHETIC: case.of_synthetic}.get(label) if promised else None
            what = f"{case.name}: {OURS} against {label}"
            text = f"{of_medians:.2f} ({min(each):.2f}–{max(each):.2f})"
            limits.append(Limit(what, of_medians, bound, "×", at_least=True, spread=text))
    return f"{heading}\n\n{table(columns, rows)}", limits


def main() -> int:
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="ViT-B-32", help="[default: %(default)s, which the requirements are about]")
    parser.add_argument("--batch", type=int, default=0, help="[default: 32 on the CPU, 1024 on a GPU; quick: 8 and 256]")
    names = [case.name for cases in CASES.values() for case in cases]
    parser.add_argument("--cases", nargs="*", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--ours", default="", metavar="FLAGS", help="further flags of clipjob train, such as '--compile auto'")
    args = parsed(parser)
    from job.runtime.device import cores

    on_gpu = args.device == "cuda"
    batch = args.batch or ((256 if args.quick else 1024) if on_gpu else (8 if args.quick else 32))
    steps, skipped, window = (61, 21, 5) if on_gpu else (9, 3, 1)
    if args.quick:
        steps, skipped, window, args.repeats = (11, 5, 5, 1) if on_gpu else (3, 1, 1, 1)
    size = Size(args.model, args.device, batch, steps, skipped, window, workers=cores())
    asked = [case for case in CASES[args.device] if not args.cases or case.name in args.cases]
    cases = [case for case in asked if args.cases or on_gpu or case.precision == "fp32" or cpu_has_bf16()]
    left_out = [
        (f"{case.name}: {OURS} against {OPEN_CLIP}", "not measured: no bf16 instructions here", f"≥ {case.required:g} ×", "")
        for case in asked
        if case not in cases
    ]
    parts, limits, raw = [], [], {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        photos = Path(name) / "photos"
        count = min(batch * steps, 2048)
        say(f"making {count} images")
        write_photos(photos, count=count, seed=0)
        for case in cases:
            say(f"{case.name}, {steps} steps each")
            found = measure(case, size, photos=photos, rounds=args.repeats, ours=args.ours.split())
            text, bounds = report(case, size, found)
            parts.append(text)
            limits += bounds
            raw[case.name] = {label: [vars(one) for one in speeds] for label, speeds in found.items()}
    made = (
        f"{args.model} on {device_name(args.device)}, random weights, batch {batch}, {count} made photographs, "
        f"captions all different; {steps} steps a run, the median of those after the first {skipped}; "
        f"open_clip_train with {size.workers} workers; {args.repeats} paired rounds in alternating order; median (min–max)."
    )
    text = "\n\n".join((made, *parts, table(LIMIT_COLUMNS, [*(limit.row() for limit in limits), *left_out])))
    return publish(args, "Training", text, limits=limits, raw=raw)


if __name__ == "__main__":
    sys.exit(main())
