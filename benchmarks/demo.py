"""`clipjob demo`: how long it trains, how fast, and what the model has learnt from random weights."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import LIMIT_COLUMNS, REPOSITORY, Limit, arguments, publish, say, spread, table

RECALLS = ("image_retrieval_recall@5", "text_retrieval_recall@5")
LEAST_RECALL = 0.25
MOST_SECONDS = 180


def run_demo(folder: Path, *, seed: int, flags: list[str]) -> dict[str, Any]:
    """The content of result.json of a new run."""
    run = folder / f"run-{seed}"
    command = [sys.executable, "-m", "job", "demo", "--run", str(run), "--seed", str(seed), *flags]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


def main() -> int:
    args = arguments(__doc__ or "", repeats=3).parse_args()
    flags = ["--epochs", "1"] if args.quick else []
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for seed in range(args.repeats):
            say(f"clipjob demo, seed {seed}")
            results.append(run_demo(Path(name), seed=seed, flags=flags))
    rows = [
        (
            str(seed),
            f"{result['seconds']:.0f}",
            f"{result['samples_per_second']:.0f}",
            *(f"{result['before'][name]:.3f} → {result['after'][name]:.3f}" for name in RECALLS),
        )
        for seed, result in enumerate(results)
    ]
    seconds = [result["seconds"] for result in results]
    limits = [Limit("training seconds", median(seconds), MOST_SECONDS, "s", spread=spread(seconds))]
    least = None if args.quick else LEAST_RECALL  # one epoch teaches nothing
    for name in RECALLS:
        values = [result["after"][name] for result in results]
        limits.append(Limit(name, median(values), least, "", at_least=True, spread=spread(values, 3)))
    text = "\n".join(
        (
            f"{results[0]['step']} steps; seed 0 is the default. Recall on the held-out images, before → after.",
            "",
            table(("seed", "seconds", "samples/s", "text → image, recall@5", "image → text, recall@5"), rows),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    return publish(args, "Demo", text, limits=limits, raw={"results": results})


if __name__ == "__main__":
    sys.exit(main())
