"""Saving ViT-B-32's full state (1.8 GB) to S3: the stall of the training thread, and the time from SIGTERM to durable."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.images import write_photos
from benchmarks.light_s3 import light_server
from benchmarks.machine import LIMIT_COLUMNS, REPOSITORY, Limit, arguments, in_child, publish, say, spread, table
from tests.s3server import BUCKET, running_server

BATCH_SIZE, STEPS = 32, 6
MOST_WAIT_SECONDS = 900


def write_data(folder: Path, count: int) -> tuple[Path, Path]:
    """A CSV and an LMDB of made photographs."""
    from job.data.pack import pack

    write_photos(folder / "photos", count=count, seed=0)
    pack(folder / "photos", folder / "images.lmdb", resize=256)
    csv = folder / "data.csv"
    csv.write_text(
        "path|tags\n" + "".join(f"{number:06d}.jpg|thing number {number}\n" for number in range(count)), encoding="utf-8"
    )
    return csv, folder / "images.lmdb"


def train(
    folder: Path, run: str, data: tuple[Path, Path], *, device: str, steps: int, **settings: Any
) -> "subprocess.Popen[bytes]":
    """The real command, its log in folder/log."""
    chosen = {
        "csv": data[0],
        "lmdb": data[1],
        "run": run,
        "scratch": folder / "scratch",
        "model": "ViT-B-32",
        "device": device,
        "max_steps": steps,
        "global_batch_size": BATCH_SIZE,
        "val_fraction": 0,
        "log_every": 1,
        "metrics_port": 0,
        **settings,
    }
    words = [word for name, value in chosen.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "job", "train", *words], cwd=REPOSITORY, stderr=log, stdout=log)


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, each with "at": seconds since 1970."""
    found = []
    for line in (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        event["at"] = dt.datetime.fromisoformat(event["time"]).timestamp()
        found.append(event)
    return found


def wait_for(folder: Path, process: "subprocess.Popen[bytes]", event: str, count: int) -> None:
    deadline = time.monotonic() + MOST_WAIT_SECONDS
    while sum(line["event"] == event for line in events(folder)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no {event} came:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def saving(folder: Path, data: tuple[Path, Path], *, device: str) -> dict[str, Any]:
    """A run that saves at every second step: stalls, seconds of steps, seconds until durable."""
    process = train(folder, f"s3://{BUCKET}/saving", data, device=device, steps=STEPS, checkpoint_every=2)
    if process.wait(timeout=MOST_WAIT_SECONDS):
        raise SystemExit((folder / "log").read_text(errors="replace")[-3000:])
    lines = events(folder)
    saves = [line for line in lines if line["event"] == "checkpoint"]
    history = in_child(_history, f"s3://{BUCKET}/saving")
    return {
        "stall_seconds": [line["stall_seconds"] for line in saves],
        "durable_seconds": [line["seconds"] for line in saves],
        "bytes": [line["bytes"] for line in saves],
        "step_seconds": [row["seconds"] for row in history if row["kind"] == "step"],
    }


def _history(run: str) -> list[dict[str, Any]]:
    from job.checkpoint.store import RunStore

    return RunStore(run).read_history()


def stopping(folder: Path, data: tuple[Path, Path], *, device: str, turn: int) -> dict[str, float]:
    """SIGTERM in the middle of a step: seconds from the end of that step until its checkpoint is durable, and until the exit."""
    run = f"s3://{BUCKET}/stopping-{turn}"
    process = train(folder, run, data, device=device, steps=1000, checkpoint_every=0)
    wait_for(folder, process, "step", 2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=MOST_WAIT_SECONDS)
    ended = time.time()
    assert code == 75, (folder / "log").read_text(errors="replace")[-3000:]
    lines = events(folder)
    last_step = [line for line in lines if line["event"] == "stopping"][-1]["at"]
    durable = [line for line in lines if line["event"] == "checkpoint"][-1]["at"]
    return {"durable_seconds": durable - last_step, "exit_seconds": ended - last_step}


def main() -> int:
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--device", default="cpu", help="of the job [default: %(default)s]")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory(dir=args.folder) as name, running_server(Path(name)) as server:
        folder = Path(name)
        os.environ.update(server.environment)
        data = write_data(folder, 4 * BATCH_SIZE)
        say("a run that saves at every second step")
        saved = saving(folder, data, device=args.device)
        say("SIGTERM, on SeaweedFS")
        stopped_there = [stopping(folder, data, device=args.device, turn=turn) for turn in range(args.repeats)]
        with light_server() as (endpoint, _):
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            say("SIGTERM, on a server that costs next to nothing")
            stopped = [stopping(folder, data, device=args.device, turn=turn) for turn in range(args.repeats)]
    steps, stalls = sorted(saved["step_seconds"]), saved["stall_seconds"]
    step = steps[len(steps) // 2]
    durable = [one["durable_seconds"] for one in stopped]
    interval = min(600.0, max(max(stalls) / 0.005, max(saved["durable_seconds"]) / 0.1, 60.0))
    limits = [
        Limit("stall of the training thread for one save", max(stalls), 0.05 if on_gpu else step, "s", spread=spread(stalls, 3)),
        Limit("stall, share of the time at the automatic interval", max(stalls) / interval * 100, 0.5, "%"),
        Limit(
            "from the end of the running step after SIGTERM to durable, benchmarks/light_s3.py",
            max(durable),
            10,
            "s",
            spread=spread(durable, 1),
        ),
    ]
    facts = [
        ("bytes of a checkpoint", f"{max(saved['bytes']) / 1e9:.2f} GB"),
        (f"step, {BATCH_SIZE} pairs", f"{spread(steps, 2)} s"),
        ("save to durable, beside training", f"{spread(saved['durable_seconds'], 1)} s"),
        ("automatic interval that follows", f"{interval:.0f} s"),
        (
            "SIGTERM: end of the step to the exit, benchmarks/light_s3.py",
            f"{spread([one['exit_seconds'] for one in stopped], 1)} s",
        ),
        (
            "SIGTERM: end of the step to durable, SeaweedFS (which takes 11 CPU-s per GiB itself)",
            f"{spread([one['durable_seconds'] for one in stopped_there], 1)} s",
        ),
    ]
    text = "\n".join(
        (
            f"ViT-B-32 on {args.device}; S3 on the same machine, SeaweedFS unless named. Median (min–max); limits: the worst.",
            "",
            table(("what", "found"), facts),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    return publish(
        args,
        "Checkpoints in object storage",
        text,
        limits=limits,
        raw={"saving": saved, "stopping": stopped, "seaweedfs": stopped_there},
    )


if __name__ == "__main__":
    sys.exit(main())
