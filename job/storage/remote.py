"""The fsspec side of storage: one filesystem per protocol, and create-only writes.

fsspec, s3fs and botocore are imported on the first remote URI only: a local run never loads them.
"""

import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from job.storage.explain import response_code, shown

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5  # five tries and their pauses stay under a minute when nobody answers
READ_SECONDS = 30
REQUEST_SECONDS = 120  # the whole of one request; a part of 16 MiB needs 1.1 MB/s with eight in flight
PART_BYTES = 16 * 2**20
PARALLEL_PARTS = 8
CONFLICT_TRIES = 6

_lock = threading.Lock()
_filesystems: dict[tuple[str, int], Any] = {}
_refuses_second: dict[str, bool] = {}
"""By bucket: whether a second create-only write of one name was refused. Absent: not tried yet."""


def open_uri(uri: str) -> tuple[Any, str]:
    """The filesystem of a URI, and the URI's path in it. Filesystems are shared by all threads of this process."""
    import fsspec

    protocol = uri.split("://", 1)[0]
    with _lock:
        key = (protocol, os.getpid())  # s3fs refuses to work in a forked child
        if key not in _filesystems:
            options = _s3_options() if protocol in ("s3", "s3a") else {}
            filesystem = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
            if options:
                filesystem.retries = 2  # s3fs's own, on top of each five of botocore's: 5 x 5 would take over a minute
            _filesystems[key] = filesystem
        filesystem = _filesystems[key]
    return filesystem, str(filesystem._strip_protocol(uri))  # noqa: SLF001 - fsspec has no public name for it


def _s3_options() -> dict[str, Any]:
    import aiohttp
    from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]

    class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
        """Gives every request a total time. aiobotocore sets none, so an upload to a server gone silent never ended."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)

    return {
        "default_block_size": PART_BYTES,
        "max_concurrency": PARALLEL_PARTS,
        "config_kwargs": {
            "http_session_cls": BoundedSession,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 5, "mode": "standard"},
        },
    }


def close() -> None:
    """Lets go of every connection and of what was learnt about stores; the next call starts anew."""
    with _lock:
        filesystems = list(_filesystems.values())
        _filesystems.clear()
        _refuses_second.clear()
    for filesystem in filesystems:
        if getattr(filesystem, "_s3", None) is not None:
            filesystem.close_session(filesystem.loop, filesystem.s3)


def put_file(local: Path, uri: str) -> None:
    """Uploads a file, in parts where it is large."""
    filesystem, path = open_uri(uri)
    options = {}
    if "s3" in filesystem.protocol:
        options["chunksize"] = max(PART_BYTES, math.ceil(local.stat().st_size / 9_000))  # S3 takes 10,000 parts at most
    filesystem.put_file(str(local), path, **options)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes an object only where none is. See `job.storage.files.create_bytes`.

    The first object that a process creates in a bucket is created twice: a store that knows conditional writes refuses
    the second. Until that is known, and for ever where it is not so, the absence of the object is checked first.
    """
    filesystem, path = open_uri(uri)
    store = uri.split("://", 1)[0] + "://" + path.strip("/").split("/", 1)[0]
    refuses = _refuses_second.get(store)
    if not refuses and (found := _read(filesystem, path)) is not None:
        return found == data
    outcome = "unsupported" if refuses is False else _create_once(filesystem, path, data)
    if outcome == "created" and refuses is None:
        _refuses_second[store] = refuses = _create_once(filesystem, path, data) == "taken"
        if not refuses:
            _warn_unconditional(store)
    elif outcome == "unsupported":
        if refuses is None:
            _refuses_second[store] = False
            _warn_unconditional(store)
        filesystem.pipe_file(path, data)
    if outcome == "created" and refuses:
        return True
    # A "taken" may be our own write, whose reply was lost and which the client sent again: the bytes decide.
    return _read(filesystem, path) == data


def _read(filesystem: Any, path: str) -> bytes | None:
    try:
        return bytes(filesystem.cat_file(path))
    except FileNotFoundError:
        return None


def _warn_unconditional(store: str) -> None:
    logger.warning(
        "this store does not refuse to overwrite (If-None-Match): two attempts that start in the same second may both go on",
        extra={"store": shown(store)},
    )


def _create_once(filesystem: Any, path: str, data: bytes) -> str:
    """created, taken or unsupported."""
    for tried in range(CONFLICT_TRIES):
        try:
            filesystem.pipe_file(path, data, mode="create")
        except FileExistsError:
            return "taken"
        except OSError as error:
            code = response_code(error)
            if code in ("PreconditionFailed", "412"):
                return "taken"
            if code in ("NotImplemented", "501"):
                return "unsupported"
            if code not in ("ConditionalRequestConflict", "409") or tried + 1 == CONFLICT_TRIES:
                raise
            time.sleep(0.1 * 2**tried)  # another writer is at it; the next try sees its outcome
        else:
            return "created"
    raise AssertionError("the last try returns or raises")
