"""The fsspec side of storage: one filesystem per protocol, create-only writes, and errors that say what to do.

fsspec, s3fs and botocore are imported on the first remote URI only: a local run never loads them.
"""

import errno
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import AccessError, ConfigError, JobError, StorageError

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


def shown(text: str) -> str:
    """A URI or a message without passwords and signatures."""
    text = re.sub(r"(?<=://)[^/\s\"']*@", "***@", text)
    return re.sub(r"(?i)((?:X-Amz-)?(?:Signature|Credential|Security-Token|AWSAccessKeyId))=[^&\s\"']+", r"\1=***", text)


def response_code(error: BaseException) -> str:
    """The store's own code for an error (such as NoSuchBucket), or an empty text. s3fs keeps it in the cause."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""


@contextmanager
def explained(uri: str, operation: str, *, writing: bool = False) -> Iterator[None]:
    """Turns what storage raises into our errors, with the URI, the operation, the likely cause and the remedy.

    Args:
        operation: what was being done, as "reading" or "listing".
        writing: nothing needs to be there beforehand, so what is absent was removed under our hands: a failure.
    Raises:
        FileNotFoundError: unchanged; there is no such object. Not when writing.
        AccessError: it refuses us, and would refuse us again: credentials, permission, no such bucket, read-only.
        StorageError: it may work later, or elsewhere: unreachable, failing, full.
        ConfigError: no such kind of URI.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        verdict = _verdict(error, uri)
        if verdict is None and writing and isinstance(error, FileNotFoundError):
            verdict = (
                StorageError,
                "something was removed while it was being written",
                "Is someone removing this run? Else start again.",
            )
        if verdict is None:
            raise
        kind, cause, remedy = verdict
        found = shown(str(error)).strip().rstrip(".") or type(error).__name__
        raise kind(f"{operation[:1].upper()}{operation[1:]} {shown(uri)} failed: {cause} ({found}). {remedy}") from error


_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOError",
}
_UNREACHABLE = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "ClientError", "OSError"}
_WRONG_PLACE = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
    "InvalidBucketName",
    "301",
    "400",  # all that a HEAD says of an expired token or a wrong region
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _verdict(error: Exception, uri: str) -> tuple[type[JobError], str, str] | None:
    """The class of our error, the likely cause and the remedy; None: not storage's doing, or simply absent."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code = response_code(error)
    number = getattr(error, "errno", None)
    if "SafetensorError" in names and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])  # its writer is in Rust and hands over the words only
    if code == "NoSuchBucket":
        return AccessError, "there is no such bucket", "Create the bucket, or correct the URI or the endpoint (AWS_ENDPOINT_URL)."
    causes = {kind.__name__ for kind in type(error.__cause__).__mro__}
    if isinstance(error, FileNotFoundError) and "ClientConnectionError" not in causes:  # fsspec's http calls that absent too
        return None
    if names & _NO_CREDENTIALS:
        return (
            AccessError,
            "no usable credentials were found",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine or pod a role.",
        )
    if isinstance(error, PermissionError) or number in _REFUSED:
        return AccessError, "it is not permitted", _permission_remedy(error)
    if number in _FULL:
        return StorageError, "the disk or the quota is full", "Free some space; what was committed before is untouched."
    if number in _NO_PLACE:
        return AccessError, "no file can be at this place", "Choose another path."
    if isinstance(error, ImportError) or (isinstance(error, ValueError) and "Protocol not known" in str(error)):
        remedy = "Use a local path or s3://, or install fsspec's package for it."
        return ConfigError, "this kind of URI is not supported here", remedy
    if names & _UNREACHABLE and code not in _WRONG_PLACE:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        where = f" at {shown(endpoint)}" if endpoint and uri.startswith("s3") else ""
        remedy = "Retries did not help. Check network, endpoint and the store's health, then start the same command again."
        return StorageError, f"storage{where} is unreachable or failing", remedy
    if code in _WRONG_PLACE or "BotoCoreError" in names or "Invalid endpoint" in str(error):
        remedy = "Check AWS_ENDPOINT_URL (with https:// or http://), AWS_REGION, the bucket's name and that no token has expired."
        return AccessError, "the request makes no sense to the store or its client", remedy
    return None


def _permission_remedy(error: Exception) -> str:
    if getattr(error, "errno", None) in _REFUSED and not response_code(error):
        return f"Make it writable and readable for user {os.getuid()}, and not mounted read-only, or choose another path."
    return (
        "Check the key, the secret, the clock and that the policy allows to list, read, write and delete objects under this URI "
        "(without permission to list, even an absent object is refused)."
    )
