"""Weak scaling: the same batch per rank on 1, 2, 4, … ranks of this machine. On GPUs ViT-B-32, on a CPU the demo's small model."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.checkpoint import write_data
from benchmarks.machine import LIMIT_COLUMNS, REPOSITORY, Limit, arguments, paired, parsed, publish, spread, table

SKIPPED_STEPS = 5
"""At the start: kernels are chosen, caches filled."""


def step_seconds(folder: Path, data: tuple[Path, Path], *, ranks: int, batch: int, steps: int, on_gpu: bool, turn: int) -> float:
    """The median step of one run. Steps only: nothing is held out, and nothing saved but the first and last state."""
    from job.checkpoint.store import RunStore
    from job.demo import settings as demo_settings

    run = folder / f"run-{ranks}-{turn}"
    settings = {
        "csv": data[0],
        "lmdb": data[1],
        "run": run,
        "scratch": folder / "scratch",
        "model": "ViT-B-32" if on_gpu else demo_settings()["model"],
        "device": "cuda" if on_gpu else "cpu",
        "precision": "bf16" if on_gpu else "fp32",
        "max_steps": steps,
        "global_batch_size": batch * ranks,
        "nproc_per_node": ranks,
        "val_fraction": 0,
        "checkpoint_every": 0,
        "metrics_port": 0,
        **({} if on_gpu else {"torch_threads": 1, "threads": 1}),
    }
    words = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    subprocess.run(
        [sys.executable, "-m", "job", "train", *words], cwd=REPOSITORY, check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL
    )
    rows = [row for row in RunStore(str(run)).read_history() if row["kind"] == "step"]
    return median(row["seconds"] for row in rows[SKIPPED_STEPS:])


def main() -> int:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=0, help="pairs per rank [default: 256 on a GPU, 64 on a CPU]")
    parser.add_argument("--ranks", type=int, nargs="*", help="[default: 1 2 4 8 on GPUs, as far as they go; 1 2 on a CPU]")
    args = parsed(parser)
    on_gpu = args.device == "cuda"
    batch, steps = args.batch or (256 if on_gpu else 64), 15 if args.quick else 60
    if on_gpu:
        import torch

        most = torch.cuda.device_count()
    else:
        most = min(2, len(os.sched_getaffinity(0)))
    counts = args.ranks or [count for count in (1, 2, 4, 8) if count <= most]
    turns = iter(range(10**6))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        data = write_data(Path(name), 256 if args.quick else 2048)
        found = paired(
            {
                str(ranks): lambda ranks=ranks: step_seconds(
                    Path(name), data, ranks=ranks, batch=batch, steps=steps, on_gpu=on_gpu, turn=next(turns)
                )
                for ranks in counts
            },
            rounds=args.repeats,
        )
    one = found[str(counts[0])]
    rows, limits = [], []
    for ranks in counts:
        seconds = found[str(ranks)]
        efficiency = [alone / together for alone, together in zip(one, seconds, strict=True)]
        overhead = [(together - alone) * 1000 for alone, together in zip(one, seconds, strict=True)]
        rate = [ranks * batch / each for each in seconds]
        rows.append((str(ranks), spread([1000 * each for each in seconds], 1), spread(rate), spread(efficiency, 3)))
        if ranks != counts[0]:
            what = f"a step of {ranks} ranks takes longer than one of 1 by"
            limits.append(Limit(what, median(overhead), None, "ms", spread=spread(overhead, 1)))
    model = "ViT-B-32 in bf16 on GPUs" if on_gpu else "the small model of the demo on one core per rank"
    made = (
        f"{batch} pairs per rank, {model}; {steps} steps a run, the median of those after the first {SKIPPED_STEPS}; "
        f"{args.repeats} paired rounds."
    )
    text = "\n".join(
        (
            made,
            "",
            table(("ranks", "step, ms", "pairs/s", "efficiency against 1 rank"), rows),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    return publish(args, "Ranks", text, limits=limits, raw={"step_seconds": found, "batch": batch})


if __name__ == "__main__":
    sys.exit(main())
