"""Staging and pushing one large file: clipjob against s3fs, plain HTTP ranges and other clients, on a server on this machine."""

import argparse
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import storage_children as children
from benchmarks.light_s3 import light_server, object_file
from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, in_child, paired, publish, ratios, say, spread, table
from tests.s3server import BUCKET, running_server, s3_environment

GIB = 2**30
CHECKPOINT_BYTES = 1_800_000_000
"""ViT-B-32 with AdamW in float32."""

HTTP, STAGING, S3FS_GET = "plain parallel HTTP ranges", "clipjob, staging", "s3fs.get, defaults"
PUSH, S3FS_PUT = "clipjob, upload", "s3fs.put, defaults"


def write_random(path: Path, size: int) -> None:
    """A file that no server could compress or deduplicate."""
    with path.open("wb") as file:
        while size:
            size -= file.write(random.Random(size).randbytes(min(size, 2**24)))


def signed_url(endpoint: str, key: str) -> str:
    import boto3  # type: ignore[import-untyped]

    client = boto3.client("s3", endpoint_url=endpoint)
    return str(client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}))


def downloads(endpoint: str, folder: Path, size: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    uri = f"s3://{BUCKET}/source/data.mdb"
    url = signed_url(endpoint, "source/data.mdb")
    ways: dict[str, tuple[Callable[..., dict[str, float]], str]] = {
        HTTP: (children.get_with_http, url),
        STAGING: (children.get_with_staging, uri),
        S3FS_GET: (children.get_with_s3fs, uri),
        "ranges through s3fs": (children.get_with_s3fs_ranges, uri),
    }
    if importlib.util.find_spec("obstore"):
        ways["ranges through obstore"] = (children.get_with_obstore, uri)

    def get(way: Callable[..., dict[str, float]], place: str) -> dict[str, float]:
        target = folder / "target"
        target.mkdir()
        try:
            return in_child(way, place, target, size)
        finally:
            shutil.rmtree(target)

    return paired({name: partial(get, *way) for name, way in ways.items()}, rounds=rounds)


def uploads(local: Path, size: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    ways: dict[str, Callable[..., dict[str, float]]] = {
        PUSH: children.put_with_clipjob,
        S3FS_PUT: children.put_with_s3fs,
        "boto3.upload_file": children.put_with_boto3,
    }
    if importlib.util.find_spec("obstore"):
        ways["obstore.put"] = children.put_with_obstore

    def put(name: str, way: Callable[..., dict[str, float]]) -> dict[str, float]:
        uri = f"s3://{BUCKET}/target/{name.split(',')[0].replace(' ', '-')}"
        try:
            return in_child(way, uri, local, size)
        finally:
            in_child(_remove, uri)

    return paired({name: partial(put, name, way) for name, way in ways.items()}, rounds=rounds)


def _remove(uri: str) -> None:
    from job.storage import files

    files.remove(uri)


def rows(found: dict[str, list[dict[str, float]]], size: int, baseline: str) -> list[tuple[str, ...]]:
    shown = []
    for name, rounds in found.items():
        per_gib = [one["seconds"] * GIB / size for one in rounds]
        cpu = [one["cpu_seconds"] * GIB / size for one in rounds]
        times = spread([b["seconds"] / one["seconds"] for one, b in zip(rounds, found[baseline], strict=True)], 2)
        peak = max(one["peak_bytes"] for one in rounds) / 2**20
        shown.append((name, spread(per_gib, 2), spread(cpu, 2), f"{peak:.0f}", times))
    return shown


def ratio(found: dict[str, list[dict[str, float]]], above: str, below: str) -> tuple[float, str]:
    """Median over the rounds of seconds(above) / seconds(below), and its spread."""
    _, each = ratios([one["seconds"] for one in found[above]], [one["seconds"] for one in found[below]])
    return sorted(each)[len(each) // 2], spread(each, 2)


def both_ways(
    args: argparse.Namespace, endpoint: str, folder: Path, source: Path, checkpoint: Path
) -> tuple[str, list[Limit], Any]:
    """The tables, the limits and the raw figures of one server, which has the source already."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    down_bytes, up_bytes = source.stat().st_size, checkpoint.stat().st_size
    say(f"staging {down_bytes / 2**20:.0f} MiB")
    down = downloads(endpoint, folder, down_bytes, args.repeats)
    say(f"pushing {up_bytes / 1e6:.0f} MB")
    up = uploads(checkpoint, up_bytes, args.repeats)
    against_s3fs, against_s3fs_spread = ratio(down, S3FS_GET, STAGING)
    against_http, against_http_spread = ratio(down, STAGING, HTTP)
    pushed, pushed_spread = ratio(up, S3FS_PUT, PUSH)
    peak = max(one["peak_bytes"] for one in down[STAGING]) / 1e6
    limits = [
        Limit("staging, times as fast as s3fs.get", against_s3fs, 1.6, "×", at_least=True, spread=against_s3fs_spread),
        Limit("staging, time against plain HTTP ranges", against_http, 1.35, "×", spread=against_http_spread),
        Limit("staging, peak memory of the process", peak, 250, "MB"),
        Limit("pushing, times as fast as s3fs.put", pushed, 1.6, "×", at_least=True, spread=pushed_spread),
    ]
    columns = ("s / GiB", "CPU-s / GiB", "peak MiB")
    text = "\n".join(
        (
            table((f"staging {down_bytes / 2**20:.0f} MiB", *columns, "times s3fs.get"), rows(down, down_bytes, S3FS_GET)),
            "",
            table((f"pushing {up_bytes / 1e6:.0f} MB", *columns, "times s3fs.put"), rows(up, up_bytes, S3FS_PUT)),
            "",
            table(LIMIT_COLUMNS, [limit.row() for limit in limits]),
        )
    )
    return text, limits, {"download": down, "upload": up}


def main() -> int:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    down_bytes, up_bytes = (64 * 2**20, 100_000_000) if args.quick else (GIB, CHECKPOINT_BYTES)
    os.environ.update({**s3_environment(""), "BENCHMARK_BUCKET": BUCKET})
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, checkpoint = folder / "source", folder / "checkpoint"
        write_random(source, down_bytes)
        write_random(checkpoint, up_bytes)
        with light_server() as (endpoint, objects):
            shutil.copyfile(source, object_file(objects, BUCKET, "source/data.mdb"))
            light_text, light_limits, light_raw = both_ways(args, endpoint, folder, source, checkpoint)
        (folder / "seaweedfs").mkdir()
        with running_server(folder / "seaweedfs") as server:
            os.environ["AWS_ENDPOINT_URL"] = server.endpoint
            in_child(children.put_with_clipjob, f"s3://{BUCKET}/source/data.mdb", source, down_bytes)
            text, limits, raw = both_ways(args, server.endpoint, folder, source, checkpoint)
    text = "\n".join(
        (
            f"Plain HTTP on this machine, {args.repeats} paired rounds, each in a new process; median (min–max).",
            "",
            "## A server that costs next to nothing (benchmarks/light_s3.py)",
            "",
            light_text,
            "",
            "## SeaweedFS, which takes most of the cores itself",
            "",
            text,
        )
    )
    return publish(args, "Object storage", text, limits=[*light_limits, *limits], raw={"light": light_raw, "seaweedfs": raw})


if __name__ == "__main__":
    sys.exit(main())
