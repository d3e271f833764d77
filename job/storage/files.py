"""Objects by URI: the same few functions for a local path, s3:// and whatever else fsspec knows.

What is durable and atomic here, the checkpoint protocol builds on: a name holds all of the bytes or does not exist, and
once a function has returned, they survive a crash of this machine. Every function raises the errors of `explained`.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from job.errors import StorageError
from job.storage import local as disk
from job.storage import transfer
from job.storage.explain import explained, shown
from job.storage.parallel import retried
from job.storage.remote import create_bytes as create_remote
from job.storage.remote import is_s3, open_uri
from job.storage.transfer import Damaged, FileInfo, Part, Replaced, crc_in, parts_of, verify

__all__ = [
    "Damaged",
    "FileInfo",
    "Part",
    "Replaced",
    "abort_uploads",
    "crc_in",
    "create_bytes",
    "download",
    "explained",
    "fetch_parts",
    "free_bytes",
    "is_local",
    "join",
    "list_files",
    "local_path",
    "parts_of",
    "read_bytes",
    "remove",
    "remove_temporaries",
    "remove_tree",
    "shown",
    "stat",
    "upload",
    "verify",
    "write_bytes",
]

Check = Callable[[], None]
"""Called several times a second while bytes move, on any thread; what it raises ends the transfer."""


def _go_on() -> None:
    """The check of who never wants to give up."""


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI."""
    return Path(uri.removeprefix("file://"))


def read_bytes(uri: str) -> bytes:
    with explained(uri, "reading"):
        if is_local(uri):
            return local_path(uri).read_bytes()
        filesystem, path = open_uri(uri)
        return bytes(retried(lambda: filesystem.cat_file(path)))


def write_bytes(uri: str, data: bytes) -> None:
    """Replaces an object as a whole: a reader sees the old bytes or the new ones."""
    with explained(uri, "writing", writing=True):
        if is_local(uri):
            disk.place(local_path(uri), lambda temporary: disk.write(temporary, data))
        else:
            filesystem, path = open_uri(uri)
            retried(lambda: filesystem.pipe_file(path, data))


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes an object only where none is.

    Args:
        data: holds something unique to the caller (a token), for an object that is there already counts as ours if it
            holds exactly these bytes: a client that lost the reply to its first try is refused at its second.
    Returns: True when the object is ours, False when it is someone else's.
    """
    with explained(uri, "creating", writing=True):
        return disk.create(local_path(uri), data) if is_local(uri) else create_remote(uri, data)


def upload(
    local: Path, uri: str, *, move: bool = False, check: Check = _go_on, sent: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Copies a local file to a URI, its size checked; S3 verifies a checksum of each part and of the whole.

    Args:
        move: the source is no longer needed: on the same disk it is renamed instead of copied.
        sent: called, on any thread, with bytes that have arrived.
    """
    size = local.stat().st_size
    with explained(uri, f"copying {local.name} to", writing=True):
        if is_s3(uri):
            transfer.upload_s3(local, uri, check=check, sent=sent)
        elif not is_local(uri):
            filesystem, path = open_uri(uri)
            retried(lambda: filesystem.put_file(str(local), path), check=check)
            sent(size)
        elif not (move and disk.rename(local, local_path(uri))):
            disk.place(local_path(uri), lambda temporary: _copy(local, temporary))
        arrived = stat(uri).size
    if arrived != size:
        raise StorageError(f"Copying {local} to {shown(uri)} failed: {size} bytes were sent and {arrived} are there. Start again.")


def abort_uploads(uri: str) -> int:
    """Aborts the unfinished uploads below a URI that killed processes left: they cost money and no listing shows them.

    Returns: how many there were.
    """
    with explained(uri, "aborting unfinished uploads below"):
        return transfer.abort_uploads(uri)


def fetch_parts(
    uri: str,
    info: FileInfo,
    handle: int,
    parts: Sequence[Part],
    *,
    fetched: Callable[[Part, int], None],
    check: Check = _go_on,
) -> None:
    """Reads parts of one version of an object into an open file: see `transfer.fetch_parts`. Raises: Replaced."""
    with explained(uri, "reading"):
        transfer.fetch_parts(uri, info, handle, parts, fetched=fetched, check=check)


def download(uri: str, local: Path, *, check: Check = _go_on) -> None:
    """Copies an object to a local file, which appears once it is complete. Raises: Replaced, Damaged."""
    info = stat(uri)
    with explained(uri, f"copying to {local} from"):
        disk.place(local, lambda temporary: _fetch(uri, temporary, info, check))


def list_files(uri: str) -> dict[str, int]:
    """The objects below a URI: path relative to it -> bytes, sorted. Empty when nothing is there."""
    with explained(uri, "listing"):
        if is_local(uri):
            return dict(sorted(disk.walk(local_path(uri)).items()))
        filesystem, path = open_uri(uri)
        found = retried(lambda: filesystem.find(path, detail=True))
        below = path.rstrip("/") + "/"
        return {
            name.removeprefix(below): int(info["size"])
            for name, info in sorted(found.items())
            if info["type"] == "file" and name.startswith(below) and not name.endswith("/")
        }


def stat(uri: str) -> FileInfo:
    """Raises: FileNotFoundError, also for a folder."""
    with explained(uri, "looking up"):
        if is_local(uri):
            found = os.stat(local_path(uri))
            if os.path.isdir(local_path(uri)):
                raise FileNotFoundError(errno.ENOENT, "a folder is there", uri)
            return FileInfo(found.st_size, f"{found.st_mtime_ns}-{found.st_size}")
        if is_s3(uri):
            return transfer.stat_s3(uri)
        filesystem, path = open_uri(uri)
        info = retried(lambda: filesystem.info(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "a folder is there", shown(uri))
        changed = info.get("LastModified") or info.get("mtime") or info.get("created")
        return FileInfo(int(info["size"]), str(info.get("ETag") or f"{changed}-{info['size']}").strip('"'))


def remove(uri: str) -> None:
    """Removes one object; absent is fine."""
    with explained(uri, "removing"), contextlib.suppress(FileNotFoundError):
        if is_local(uri):
            local_path(uri).unlink()
        else:
            filesystem, path = open_uri(uri)
            retried(lambda: filesystem.rm_file(path))


def remove_tree(uri: str) -> None:
    """Removes everything below a URI; absent is fine."""
    with explained(uri, "removing"):
        if is_local(uri):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(local_path(uri))
            return
    for name in list_files(uri):
        remove(join(uri, name))


def remove_temporaries(uri: str, *, before: str) -> int:
    """Removes local files that were being written when their writer was killed.

    Args:
        before: URI of a file; only what was last written before it is removed.
    Returns: how many. Always 0 on an object store, where no half-written object is visible.
    """
    if not is_local(uri):
        return 0
    with explained(uri, "removing"):
        limit = os.stat(local_path(before)).st_mtime_ns
        removed = 0
        for name in disk.walk(local_path(uri), temporary=True):
            path = local_path(uri) / name
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_mtime_ns < limit:
                    path.unlink()
                    removed += 1
        return removed


def free_bytes(uri: str) -> int | None:
    """Bytes that can still be written, None where that is unknown (object stores)."""
    if not is_local(uri):
        return None
    with explained(uri, "looking up"):
        folder = local_path(uri).absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _fetch(uri: str, target: Path, info: FileInfo, check: Check) -> None:
    crcs: dict[Part, int] = {}
    with target.open("xb") as file:
        transfer.fetch_parts(uri, info, file.fileno(), parts_of(info), fetched=crcs.__setitem__, check=check)
    verify(uri, info, crcs)
