"""One way each of moving a file to or from S3, timed in a process of its own. AWS_* in the environment name the server."""

import http.client
import os
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_rss_bytes

PART_BYTES = 16 * 2**20
THREADS = 8


def measured(move: Callable[[], object]) -> dict[str, float]:
    """Seconds, CPU-seconds of this process and its peak memory. Imports and connections' set-up come before."""
    began, cpu = time.perf_counter(), time.process_time()
    move()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_rss_bytes(),
    }


def _s3fs() -> Any:
    import s3fs

    filesystem = s3fs.S3FileSystem()
    filesystem.ls(os.environ["BENCHMARK_BUCKET"])  # connects
    return filesystem


def get_with_staging(uri: str, folder: Path, _size: int) -> dict[str, float]:
    """clipjob's staging, journal and verification included."""
    from job.data.staging import Staging
    from job.storage import files

    files.stat(uri)
    with Staging(folder) as staging:
        return measured(lambda: staging.file(uri, flag="--lmdb"))


def get_with_s3fs(uri: str, folder: Path, _size: int) -> dict[str, float]:
    """s3fs.get with its defaults."""
    filesystem = _s3fs()
    return measured(lambda: filesystem.get(uri, str(folder / "got")))


def get_with_s3fs_ranges(uri: str, folder: Path, size: int) -> dict[str, float]:
    """Ranges through s3fs, eight at once: what clipjob does on any other fsspec file system."""
    filesystem, target = _s3fs(), folder / "got"
    with target.open("wb") as file:

        def part(start: int) -> None:
            os.pwrite(file.fileno(), filesystem.cat_file(uri, start=start, end=min(start + PART_BYTES, size)), start)

        return measured(lambda: _in_threads(part, size))


def get_with_obstore(uri: str, folder: Path, size: int) -> dict[str, float]:
    import obstore

    store, path = _obstore(uri)
    with (folder / "got").open("wb") as file:

        def part(start: int) -> None:
            os.pwrite(file.fileno(), obstore.get_range(store, path, start=start, end=min(start + PART_BYTES, size)), start)

        return measured(lambda: _in_threads(part, size))


def get_with_http(url: str, folder: Path, size: int) -> dict[str, float]:
    """Plain ranges over HTTP with a signed URL, nothing checked: the floor for Python."""
    place = urllib.parse.urlsplit(url)
    with (folder / "got").open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
        connections: dict[int, http.client.HTTPConnection] = {}

        def part(start: int) -> None:
            import threading

            own = connections.setdefault(threading.get_ident(), http.client.HTTPConnection(place.netloc, timeout=60))
            end = min(start + PART_BYTES, size)
            own.request("GET", f"{place.path}?{place.query}", headers={"Range": f"bytes={start}-{end - 1}"})
            reply = own.getresponse()
            assert reply.status == 206, reply.status
            while block := reply.read(2**18):
                os.pwrite(file.fileno(), block, start)
                start += len(block)
            assert start == end

        return measured(lambda: list(pool.map(part, range(0, size, PART_BYTES))))


def put_with_clipjob(uri: str, local: Path, _size: int) -> dict[str, float]:
    """clipjob's upload; the store verifies a CRC64NVME of each part and of the whole."""
    from job.storage import files

    files.list_files(uri.rpartition("/")[0])
    return measured(lambda: files.upload(local, uri))


def put_with_s3fs(uri: str, local: Path, _size: int) -> dict[str, float]:
    """s3fs.put with its defaults."""
    filesystem = _s3fs()
    return measured(lambda: filesystem.put(str(local), uri))


def put_with_boto3(uri: str, local: Path, _size: int) -> dict[str, float]:
    """boto3's upload_file, eight parts of 16 MiB at once."""
    import boto3  # type: ignore[import-untyped]
    from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]

    client = boto3.client("s3")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=THREADS)
    client.head_bucket(Bucket=bucket)
    return measured(lambda: client.upload_file(str(local), bucket, key, Config=config))


def put_with_obstore(uri: str, local: Path, _size: int) -> dict[str, float]:
    import obstore

    store, path = _obstore(uri)
    return measured(lambda: obstore.put(store, path, local, chunk_size=PART_BYTES, max_concurrency=THREADS))


def _obstore(uri: str) -> tuple[Any, str]:
    from obstore.store import S3Store

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    store = S3Store(
        bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        client_options={"allow_http": True},
    )
    return store, key


def _in_threads(part: Callable[[int], None], size: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(part, range(0, size, PART_BYTES)))
