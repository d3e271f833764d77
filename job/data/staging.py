"""Remote files -> local scratch. Local paths are used where they are."""

import hashlib
import logging
from pathlib import Path

from job.errors import DataError, StorageError
from job.storage import files

log = logging.getLogger(__name__)


def stage_file(uri: str, scratch: Path, *, flag: str) -> Path:
    """A local path with the content of a file.

    A remote file is copied once: the copy is named after the URI and its version there, so a later attempt on this node finds it.

    Args: flag: the setting that named the file, for messages.
    Raises: DataError, if there is no such file. StorageError, if it does not fit or can't be read.
    """
    if files.is_local(uri):
        return files.local_path(uri)
    try:
        found = files.stat(uri)
    except FileNotFoundError:
        raise DataError(f"There is no {files.shown(uri)}. Check {flag}.") from None
    version = hashlib.sha256(f"{uri}\n{found.token}\n{found.size}".encode()).hexdigest()[:16]
    local = scratch / "staged" / version / uri.rstrip("/").rsplit("/", 1)[-1]
    if local.is_file() and local.stat().st_size == found.size:
        return local
    free = files.free_bytes(str(scratch))
    if free is not None and free < found.size:
        raise StorageError(
            f"{files.shown(uri)} needs {found.size} bytes and {scratch} has {free} free. Point --scratch at a larger disk."
        )
    log.info("staging", extra={"uri": files.shown(uri), "bytes": found.size})
    files.download(uri, local)
    if files.stat(uri).token != found.token:
        local.unlink()
        raise DataError(f"{files.shown(uri)} was replaced while it was copied. Start again once it no longer changes.")
    return local


def stage_lmdb(uri: str, scratch: Path, *, flag: str) -> Path:
    """A local path of an LMDB that is a folder with data.mdb or a single file. Raises: like `stage_file`."""
    if files.is_local(uri):
        return files.local_path(uri)
    inside = files.join(uri, "data.mdb")
    try:
        files.stat(inside)
    except FileNotFoundError:
        return stage_file(uri, scratch, flag=flag)
    return stage_file(inside, scratch, flag=flag)
