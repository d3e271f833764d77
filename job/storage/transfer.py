"""Files in parts, several at once: each part is checked, tried again a bounded number of times, given up with all others.

Downloads are pinned to one version of the object; uploads carry checksums that the store verifies.
"""

import base64
import contextlib
import itertools
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from awscrt.checksums import combine_crc32, combine_crc32c, combine_crc64nvme, crc32c, crc64nvme

from job.errors import StorageError
from job.storage import s3
from job.storage.explain import shown
from job.storage.parallel import in_parallel, retried
from job.storage.remote import is_s3, open_uri

PART_BYTES = 16 * 2**20
MOST_PARTS = 9_000
"""S3 takes 10,000 parts of an upload at most."""
_CRCS: dict[str, Callable[[Any, int], int]] = {"crc32": zlib.crc32, "crc32c": crc32c, "crc64nvme": crc64nvme}
_COMBINED: dict[str, Callable[[int, int, int], int]] = {
    "crc32": combine_crc32,
    "crc32c": combine_crc32c,
    "crc64nvme": combine_crc64nvme,
}
_WIDTHS = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}


class Replaced(StorageError):
    """The object is another version than the one asked for."""


class Damaged(StorageError):
    """The bytes that came do not have the checksum that the store keeps of the object."""


class Part(NamedTuple):
    start: int
    length: int


@dataclass(frozen=True)
class FileInfo:
    size: int
    """Bytes."""
    token: str
    """Changes with the content: the store's etag, else modification time and size."""
    algorithm: str = "crc64nvme"
    """Of the checksums of parts: what the store's own one can be compared with."""
    checksum: str = ""
    """The store's own of the whole object, as S3 writes it; empty: it keeps none."""
    stored_part_bytes: int = 0
    """The parts that the object was uploaded in, where its checksum is made of theirs; else 0."""


def parts_of(info: FileInfo, *, part_bytes: int = 0) -> list[Part]:
    """The parts to read an object in. Each lies within one of those that it was uploaded in, so that `verify` can work."""
    most = part_bytes or PART_BYTES
    outer = info.stored_part_bytes or max(info.size, 1)
    return [
        Part(start, min(most, first + outer - start, info.size - start))
        for first in range(0, info.size, outer)
        for start in range(first, min(first + outer, info.size), most)
    ]


def crc_of(info: FileInfo, data: Any, before: int = 0) -> int:
    """The checksum of a part in info.algorithm. Args: before: that of the bytes in front of data."""
    return _CRCS[info.algorithm](data, before)


def crc_in(info: FileInfo, handle: int, part: Part) -> int:
    """The checksum of a part that is in a local file."""
    crc, at, end = 0, part.start, part.start + part.length
    while at < end and (block := os.pread(handle, min(2**20, end - at), at)):
        crc, at = crc_of(info, block, crc), at + len(block)
    return crc


def verify(uri: str, info: FileInfo, crcs: Mapping[Part, int]) -> bool:
    """Compares what came with the checksum that the store keeps.

    Args: crcs: of all parts of `parts_of(info)`.
    Returns: False, when it keeps none that can be compared. Raises: Damaged.
    """
    if not info.checksum:
        return False
    outer = info.stored_part_bytes or max(info.size, 1)
    combine, width = _COMBINED[info.algorithm], _WIDTHS[info.algorithm]
    of_parts: dict[int, int] = {}
    for part in sorted(crcs):
        crc = of_parts.get(part.start // outer, 0)
        of_parts[part.start // outer] = combine(crc, crcs[part], part.length)
    found = of_parts.get(0, 0)
    if info.stored_part_bytes:  # the checksum of the checksums
        found = _CRCS[info.algorithm](b"".join(of_parts[number].to_bytes(width, "big") for number in sorted(of_parts)), 0)
    stored = int.from_bytes(base64.b64decode(info.checksum.partition("-")[0]), "big")
    if found != stored:
        raise Damaged(
            f"What came of {shown(uri)} has another {info.algorithm} ({found:x}) than the store keeps of it ({stored:x}). Check "
            "the network and what lies between here and the store, then start again; if it stays so, upload the file again."
        )
    return True


def fetch_parts(
    uri: str,
    info: FileInfo,
    handle: int,
    parts: Sequence[Part],
    *,
    fetched: Callable[[Part, int], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Reads parts of one version of a remote object into an open file, each at its own place.

    Args:
        handle: file descriptor, open for writing.
        fetched: called on a worker thread with (part, its checksum) once its bytes are in the file.
        check: called several times a second, on any thread; what it raises ends the transfer.
    Raises: Replaced; what storage raises after the last try.
    """
    read = _read_local if "://" not in uri else _read_s3 if is_s3(uri) else _read_any

    def fetch(part: Part, given_up: Callable[[], None]) -> None:
        own = os.dup(handle)  # this thread may outlive the transfer, and the number may be another file's by then

        def attempt() -> None:
            crc, at = 0, part.start

            def take(block: Any) -> None:
                nonlocal crc, at
                given_up()
                crc = crc_of(info, block, crc)
                _write_all(own, block, at)
                at += len(block)

            read(uri, info, part, take)
            fetched(part, crc)

        try:
            retried(attempt, check=given_up)
        finally:
            os.close(own)

    in_parallel(fetch, parts, check=check)


def upload_s3(
    local: Path, uri: str, *, check: Callable[[], None] = lambda: None, sent: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Writes a file to S3, in parts where it is large. Nothing of it is left there if that fails.

    Args:
        check: called several times a second, on any thread; what it raises ends the upload.
        sent: called on a worker thread with the bytes of each part that arrived.
    """
    size = local.stat().st_size
    part_bytes = max(PART_BYTES, math.ceil(size / MOST_PARTS / 2**20) * 2**20)
    parts = parts_of(FileInfo(size, ""), part_bytes=part_bytes)
    if len(parts) <= 1:
        data = memoryview(local.read_bytes())
        retried(lambda: s3.put(uri, data, check=check), check=check)
        sent(size)
        return
    tries = itertools.count()
    upload = retried(lambda: (next(tries), s3.start_upload(uri))[1], check=check)
    if next(tries) > 1:  # the reply to an earlier try may have been lost, and nobody else would know its upload
        _abort_others(uri, upload)
    lines: dict[Part, tuple[dict[str, Any], int]] = {}

    def send(part: Part, given_up: Callable[[], None]) -> None:
        with local.open("rb", buffering=0) as file:
            data = memoryview(os.pread(file.fileno(), part.length, part.start))
        number, checksum = part.start // part_bytes + 1, crc64nvme(data, 0)
        line = retried(lambda: s3.put_part(uri, upload, number, data, checksum=checksum, check=given_up), check=given_up)
        lines[part] = line, checksum
        sent(part.length)

    try:
        in_parallel(send, parts, check=check)
        whole = 0
        for part in parts:
            whole = combine_crc64nvme(whole, lines[part][1], part.length)
        retried(lambda: _finish(uri, upload, [lines[part][0] for part in parts], size=size, checksum=whole), check=check)
    except BaseException:
        _abort(uri, upload)
        raise


def _finish(uri: str, upload: str, lines: list[dict[str, Any]], *, size: int, checksum: int) -> None:
    """Completes an upload. One that is gone was completed by an earlier try whose reply was lost: the object tells."""
    try:
        s3.finish_upload(uri, upload, lines, checksum=checksum)
    except FileNotFoundError:
        found = s3.head(uri)
        if (found.size, found.checksum) not in ((size, s3.encoded(checksum, 8)), (size, "")):
            raise


def _abort(uri: str, upload: str) -> None:
    """Best effort: what can't be aborted now is by `abort_uploads` of the next attempt."""
    with contextlib.suppress(Exception):
        place = s3.address(uri)
        s3.abort_upload(place["Bucket"], place["Key"], upload)


def _abort_others(uri: str, upload: str) -> None:
    """Best effort, as above."""
    with contextlib.suppress(Exception):
        for bucket, key, other in list(s3.open_uploads(uri)):
            if key == s3.address(uri)["Key"] and other != upload:
                s3.abort_upload(bucket, key, other)


def abort_uploads(uri: str) -> int:
    """Aborts every unfinished upload below a URI. Returns: how many there were; always 0 where uploads leave nothing."""
    if not is_s3(uri):
        return 0
    found = retried(lambda: list(s3.open_uploads(uri.rstrip("/") + "/")))
    for bucket, key, upload in found:
        retried(lambda at=(bucket, key, upload): s3.abort_upload(*at))  # type: ignore[misc]
    return len(found)


def stat_s3(uri: str) -> FileInfo:
    """Raises: FileNotFoundError; what storage raises after the last try."""
    head = retried(lambda: s3.head(uri))
    return FileInfo(head.size, head.etag, head.algorithm or "crc64nvme", head.checksum, head.part_bytes)


def _read_s3(uri: str, info: FileInfo, part: Part, take: Callable[[Any], None]) -> None:
    try:
        s3.get_range(uri, part.start, part.length, size=info.size, etag=info.token, take=take)
    except (FileNotFoundError, s3.OtherVersion):
        raise Replaced(_replaced(uri)) from None


def _read_local(path: str, _info: FileInfo, part: Part, take: Callable[[Any], None]) -> None:
    with open(path, "rb", buffering=0) as file:
        at, end = part.start, part.start + part.length
        while at < end:
            block = os.pread(file.fileno(), min(2**20, end - at), at)
            if not block:
                raise Replaced(_replaced(path))
            take(block)
            at += len(block)


def _read_any(uri: str, _info: FileInfo, part: Part, take: Callable[[Any], None]) -> None:
    filesystem, path = open_uri(uri)
    data = bytes(filesystem.cat_file(path, start=part.start, end=part.start + part.length))
    if len(data) != part.length:
        raise ConnectionError(f"{len(data)} bytes came instead of {part.length}")
    take(data)


def _replaced(uri: str) -> str:
    return f"{shown(uri)} was replaced or removed while it was read. Start again once it no longer changes."


def _write_all(handle: int, block: Any, at: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written
