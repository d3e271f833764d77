"""The S3 requests that move bytes: one request each, bounded in time, tried once. transfer.py tries again.

They go through botocore, the client that s3fs itself stands on, so credentials, endpoint, certificates and proxies are found
in the same places. Its blocking client in threads moves a file faster than s3fs's asyncio loop does (docs/decisions).
"""

import base64
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from awscrt.checksums import crc64nvme

from job.storage.options import for_operation

CONNECT_SECONDS = 5
READ_SECONDS = 30
"""The longest silence that is waited through."""
SLOWEST_BYTES_PER_SECOND = 64_000
"""A request that is slower on average, after READ_SECONDS, is given up."""
CONNECTIONS = 16
BLOCK_BYTES = 2**18

_lock = threading.Lock()
_clients: dict[int, Any] = {}


class OtherVersion(Exception):
    """The object is not the version that was asked for."""


@dataclass(frozen=True)
class Head:
    """What the store says of an object."""

    size: int
    etag: str
    checksum: str
    """base64 of the whole object's checksum, with "-<parts>" behind it where it is one of its parts' checksums; else empty."""
    algorithm: str
    """crc32, crc32c or crc64nvme; empty without a checksum."""
    part_bytes: int
    """Size of the parts that the object was uploaded in, where the checksum needs it; else 0."""


def client() -> Any:
    """The client of this process, shared by all its threads."""
    with _lock:
        if os.getpid() not in _clients:
            import botocore.session
            from botocore.config import Config

            config = Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                max_pool_connections=CONNECTIONS,
                retries={"total_max_attempts": 1, "mode": "standard"},
                request_checksum_calculation="when_required",  # ours are computed while the bytes are at hand
                response_checksum_validation="when_required",
                # The checksum guards the bytes. A second hash for the signature, which botocore leaves out over TLS anyway,
                # would take twice the time of all the rest.
                s3={"payload_signing_enabled": False},
            )
            _clients[os.getpid()] = botocore.session.Session().create_client("s3", config=config)
        return _clients[os.getpid()]


def close() -> None:
    """Lets go of the client; the next call makes a new one, with the credentials and endpoint of that moment."""
    with _lock:
        for known in _clients.values():
            known.close()
        _clients.clear()


def address(uri: str) -> dict[str, str]:
    """The bucket and key of s3://bucket/key, as requests name them."""
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return {"Bucket": bucket, "Key": key}


def head(uri: str) -> Head:
    """Raises: FileNotFoundError; what botocore raises."""
    from botocore.exceptions import ClientError

    try:
        found = _call("head_object", ChecksumMode="ENABLED", **address(uri))
    except (ClientError, FileNotFoundError):
        _call("get_object", Range="bytes=0-0", **address(uri))["Body"].close()  # a reply to HEAD has no room for reasons
        raise
    size, etag = int(found["ContentLength"]), str(found["ETag"]).strip('"')
    for algorithm in ("crc64nvme", "crc32c", "crc32"):
        if checksum := found.get(f"Checksum{algorithm.upper()}"):
            break
    else:
        return Head(size, etag, "", "", 0)
    part_bytes = 0
    if "-" in checksum:
        first = _call("head_object", PartNumber=1, IfMatch=found["ETag"], **address(uri))
        part_bytes = int(first["ContentLength"])
        if first.get("PartsCount") != int(checksum.rpartition("-")[2]):
            checksum = ""  # other boundaries than we can know
    return Head(size, etag, checksum, algorithm if checksum else "", part_bytes)


def get_range(uri: str, start: int, length: int, *, size: int, etag: str, take: Callable[[memoryview], None]) -> None:
    """Reads a part of one version of an object.

    Args:
        size, etag: of the version. take: called with the bytes in order, in a buffer that is used again.
    Raises: OtherVersion; FileNotFoundError; ConnectionError, when other bytes than asked for are announced, fewer come, or they
        come too slowly; what botocore raises.
    """
    reply = _call("get_object", Range=f"bytes={start}-{start + length - 1}", IfMatch=f'"{etag}"', **address(uri))
    expected = f"bytes {start}-{start + length - 1}/{size}"
    body, deadline, left = reply["Body"], _deadline(length), length
    try:
        if str(reply.get("ETag", etag)).strip('"') != etag:  # not every store knows If-Match
            raise OtherVersion(uri)
        if reply.get("ContentRange") != expected:
            raise ConnectionError(f"asked for {expected}, the store sends {reply.get('ContentRange') or 'all of it'}")
        stream, buffer = _stream(body), memoryview(bytearray(min(length, BLOCK_BYTES)))
        while left and (came := stream.readinto(buffer[:left])):
            left -= came
            take(buffer[:came])
            _check_pace(deadline)
        if left:
            raise ConnectionError(f"the body ended {left} bytes before its end")
    except BaseException:
        body.close()  # the connection is in the middle of something: not for others to use
        raise
    body._raw_stream.release_conn()  # noqa: SLF001  it is read to its end


def _stream(body: Any) -> Any:
    """What reads into a buffer of ours: http.client's reply, below two layers that would copy each block twice."""
    raw = body._raw_stream  # noqa: SLF001
    return getattr(raw, "_fp", None) or raw


def put(uri: str, data: memoryview, *, check: Callable[[], None]) -> None:
    """Writes a small object whose checksum the store verifies."""
    body = _Body(data, check)
    _call("put_object", Body=body, ChecksumCRC64NVME=encoded(crc64nvme(data), 8), **address(uri))


def start_upload(uri: str) -> str:
    """The id of a new multipart upload."""
    reply = _call("create_multipart_upload", ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT", **address(uri))
    return str(reply["UploadId"])


def put_part(uri: str, upload: str, number: int, data: memoryview, *, checksum: int, check: Callable[[], None]) -> dict[str, Any]:
    """Sends one part. Args: checksum: its CRC64NVME, which the store verifies. Returns: its line for `finish_upload`."""
    sent = {"PartNumber": number, "ChecksumCRC64NVME": encoded(checksum, 8)}
    reply = _call("upload_part", UploadId=upload, Body=_Body(data, check), **sent, **address(uri))
    return {**sent, "ETag": reply["ETag"]}


def finish_upload(uri: str, upload: str, parts: Iterable[dict[str, Any]], *, checksum: int) -> None:
    """Makes the object of its parts. Args: checksum: CRC64NVME of the whole, which the store compares with what it has."""
    _call(
        "complete_multipart_upload",
        UploadId=upload,
        MultipartUpload={"Parts": list(parts)},
        ChecksumCRC64NVME=encoded(checksum, 8),
        ChecksumType="FULL_OBJECT",
        **address(uri),
    )


def abort_upload(bucket: str, key: str, upload: str) -> None:
    """Removes the parts of an upload that nobody will finish; absent is fine."""
    try:
        _call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
    except FileNotFoundError:
        return


def open_uploads(uri: str) -> Iterator[tuple[str, str, str]]:
    """(bucket, key, id) of each unfinished multipart upload whose URI begins like this one."""
    place = address(uri)
    marker: dict[str, str] = {}
    while True:
        found = _call("list_multipart_uploads", Bucket=place["Bucket"], Prefix=place["Key"], **marker)
        for upload in found.get("Uploads", []):
            yield place["Bucket"], upload["Key"], upload["UploadId"]
        if not found.get("IsTruncated"):
            return
        marker = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def encoded(checksum: int, width: int) -> str:
    """A checksum of width bytes as S3 writes it."""
    return base64.b64encode(checksum.to_bytes(width, "big")).decode()


def _call(operation: str, **arguments: Any) -> dict[str, Any]:
    """One request. Raises: FileNotFoundError for an absent object or upload; OtherVersion; what botocore raises."""
    from botocore.exceptions import ClientError

    try:
        reply: dict[str, Any] = getattr(client(), operation)(**arguments, **for_operation(operation))
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("NoSuchKey", "NoSuchUpload", "404"):
            raise FileNotFoundError(f"{arguments['Bucket']}/{arguments.get('Key', '')}") from error
        if code in ("PreconditionFailed", "412", "InvalidRange", "416"):
            raise OtherVersion(f"{arguments['Bucket']}/{arguments.get('Key', '')}") from error
        raise
    return reply


def _deadline(length: int) -> float:
    return time.monotonic() + READ_SECONDS + length / SLOWEST_BYTES_PER_SECOND


def _check_pace(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ConnectionError(f"fewer than {SLOWEST_BYTES_PER_SECOND} bytes per second went through")


class _Body:
    """Bytes to be sent, given out block by block: one that is too slow or no longer wanted ends at the next block.

    botocore asks for 16 KB at a time; larger blocks cost it a quarter of the time.
    """

    def __init__(self, data: memoryview, check: Callable[[], None]) -> None:
        self._data = data
        self._check = check
        self._at = 0
        self._deadline = _deadline(len(data))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> memoryview:
        self._check()
        _check_pace(self._deadline)
        block = self._data[self._at :] if size < 0 else self._data[self._at : self._at + max(size, BLOCK_BYTES)]
        self._at += len(block)
        return block

    def readinto(self, target: memoryview) -> int:
        """For awscrt, with which botocore signs: it takes no more than it asked for."""
        block = self._data[self._at : self._at + len(target)]
        target[: len(block)] = block
        self._at += len(block)
        return len(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at
