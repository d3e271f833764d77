"""The fsspec side of storage: one filesystem per protocol, and create-only writes.

fsspec, s3fs and botocore are imported on the first remote URI only: a local run never loads them.
"""

import logging
import os
import threading
import time
from typing import Any

from job.errors import ConfigError
from job.storage import s3
from job.storage.explain import response_code, shown
from job.storage.options import for_protocol, names_for_others
from job.storage.parallel import retried

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5
READ_SECONDS = 30
REQUEST_SECONDS = 40
"""The whole of one request; only small objects come this way."""
CONFLICT_TRIES = 6

_lock = threading.Lock()
_filesystems: dict[tuple[str, int, str], Any] = {}
_refuses_second: dict[str, bool] = {}
"""By bucket: whether a second create-only write of one name was refused. Absent: not tried yet."""


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def open_uri(uri: str) -> tuple[Any, str]:
    """The filesystem of a URI, and the URI's path in it. Filesystems are shared by all threads of this process."""
    import fsspec

    protocol = uri.split("://", 1)[0]
    with _lock:
        chosen = for_protocol(protocol)
        key = (protocol, os.getpid(), repr(chosen))  # s3fs refuses to work in a forked child
        if key not in _filesystems:
            options = {**(_s3_options() if is_s3(uri) else {}), **chosen}
            try:
                filesystem = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
            except TypeError as error:
                if not chosen:
                    raise
                raise ConfigError(f"--storage-option is not understood by the client of {protocol}://: {error}.") from error
            if others := names_for_others(protocol):
                logger.warning("these storage options are for other stores", extra={"options": others, "protocol": protocol})
            if is_s3(uri):
                filesystem.retries = 1  # parallel.py tries again: s3fs and botocore would multiply to 10 or 20 requests
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
        "config_kwargs": {
            "http_session_cls": BoundedSession,
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    }


def close() -> None:
    """Lets go of every connection and of what was learnt about stores; the next call starts anew."""
    s3.close()
    with _lock:
        filesystems = list(_filesystems.values())
        _filesystems.clear()
        _refuses_second.clear()
    for filesystem in filesystems:
        if getattr(filesystem, "_s3", None) is not None:
            filesystem.close_session(filesystem.loop, filesystem.s3)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes an object only where none is. See `job.storage.files.create_bytes`.

    The first object that a process creates in a bucket is created twice: a store that knows conditional writes refuses
    the second. Until that is known, and for ever where it is not so, the absence of the object is checked first.
    """
    filesystem, path = open_uri(uri)
    store = _store(uri)
    refuses = _refuses_second.get(store)
    if not refuses and (found := _read(filesystem, path)) is not None:
        return found == data
    outcome = "unsupported" if refuses is False else retried(lambda: _create_once(filesystem, path, data))
    if outcome == "created" and refuses is None:
        _refuses_second[store] = refuses = retried(lambda: _create_once(filesystem, path, data)) == "taken"
        if not refuses:
            _warn_unconditional(store)
    elif outcome == "unsupported":
        if refuses is None:
            _refuses_second[store] = False
            _warn_unconditional(store)
        retried(lambda: filesystem.pipe_file(path, data))
    if outcome == "created" and refuses:
        return True
    # A "taken" may be our own write, whose reply was lost and which the client sent again: the bytes decide.
    return _read(filesystem, path) == data


def refuses_to_overwrite(uri: str) -> bool:
    """Whether the store of a URI is known to refuse a second create-only write of one name: `create_bytes` finds out."""
    return _refuses_second.get(_store(uri), False)


def _store(uri: str) -> str:
    """The bucket of a URI."""
    protocol, _, path = uri.partition("://")
    return f"{protocol}://{path.strip('/').partition('/')[0]}"


def _read(filesystem: Any, path: str) -> bytes | None:
    try:
        return bytes(retried(lambda: filesystem.cat_file(path)))
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
        except (NotImplementedError, TypeError, ValueError):
            if "s3" in filesystem.protocol:
                raise
            return "unsupported"  # a filesystem that can only replace
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
