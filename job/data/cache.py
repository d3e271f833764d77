"""Staged files on scratch, a folder each: named after source and version, locked while in use, evicted when room is short.

    <scratch>/staged/<source>-<version>/lock        flock: users share it, who downloads or removes holds it alone
                                        data.part   while incomplete: sparse, as long as the whole
                                        journal     the parts of it that are there, with their checksums
                                        <its name>  the whole
                                        DONE        written last; its time is that of the last use

The kernel lets go of a lock when its process ends, however it ends. Nothing is flushed to the disk, which would take as long as the
download: a kill loses no written byte, and after the machine itself has started anew, the journal's checksums tell what is there.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import StorageError
from job.storage import files
from job.storage.files import FileInfo, shown

log = logging.getLogger(__name__)

LOCK, PART, JOURNAL, DONE = "lock", "data.part", "journal", "DONE"
PRIVATE = "private-"
"""Begins the name of a folder of one process, where there are no locks."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LONGEST_NAME_BYTES = 200
RESERVE_BYTES = 2**28
"""Left free on the disk: others write there too, checkpoints among them."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class NoLocks(Exception):
    """The file system has no flock, as some Lustre and NFS mounts."""


@dataclass(frozen=True)
class Entry:
    """A version of a file, there or not."""

    folder: Path
    name: str
    size: int
    """Bytes of the whole."""

    @property
    def file(self) -> Path:
        return self.folder / self.name

    @property
    def part(self) -> Path:
        return self.folder / PART

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def is_marked(self) -> bool:
        """Whether all of it was there once."""
        return (self.folder / DONE).exists() and self.file.exists()

    @property
    def is_done(self) -> bool:
        """Whether all of it is there. Not a file that was cut since, nor one from before the machine started anew."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            marked: Any = json.loads((self.folder / DONE).read_bytes())
            return bool(marked["boot"] == boot_id() and marked["size"] == self.size == self.file.stat().st_size)
        return False


def boot_id() -> str:
    """Changes when the machine starts anew."""
    return BOOT_ID.read_text(encoding="ascii").strip()


def entry_of(staged: Path, uri: str, info: FileInfo) -> Entry:
    """The place of a version of a file: the same for all processes on this node."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "") if uri.startswith("s3") else ""
    source = hashlib.sha256(f"{endpoint}\n{uri}".encode()).hexdigest()[:16]
    version = hashlib.sha256(f"{info.token}\n{info.size}".encode()).hexdigest()[:16]
    return Entry(staged / f"{source}-{version}", _name(uri), info.size)


def private_entry(entry: Entry) -> Entry:
    """The same in a folder that only this process uses."""
    name = f"{PRIVATE}{socket.gethostname()}-{os.getpid()}-{entry.folder.name}"
    return Entry(entry.folder.with_name(name), entry.name, entry.size)


def _name(uri: str) -> str:
    """The file's own name, without what may be secret, as long as a file system takes it."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    if uri.startswith("http"):
        name = name.partition("?")[0]
    name = name.encode()[-LONGEST_NAME_BYTES:].decode(errors="ignore").replace("\0", "")
    return f"file-{name}" if name in ("", ".", "..", LOCK, PART, JOURNAL, DONE) else name


def mark_done(entry: Entry, uri: str, info: FileInfo) -> None:
    """Says that all of it is there, until the machine starts anew."""
    about = {
        "boot": boot_id(),
        "uri": shown(uri),
        "size": info.size,
        "token": info.token,
        "staged": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    new = entry.folder / f"{DONE}.new"
    new.write_text(json.dumps(about), encoding="utf-8")
    os.replace(new, entry.folder / DONE)


def touch(entry: Entry) -> None:
    """Makes it the last that goes."""
    with contextlib.suppress(OSError):  # another user's: it keeps its place in the order
        os.utime(entry.folder / DONE)


def try_lock(folder: Path, kind: int, *, make: bool = True) -> int | None:
    """A handle that holds an entry's lock, or None: others hold it, or the entry was removed at this moment.

    Args:
        kind: fcntl.LOCK_SH or LOCK_EX. make: also where there is no such folder yet.
    Raises: NoLocks; OSError.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        if change_lock(handle, kind) and os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def change_lock(handle: int, kind: int) -> bool:
    """Whether the handle holds this kind of lock now. Raises: NoLocks; OSError."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(os.strerror(error.errno)) from error
        raise
    return True


def empty(entry: Entry) -> None:
    """Removes all but the lock of an entry whose lock the caller holds alone."""
    for path in (entry.folder / DONE, entry.file, entry.part, entry.journal):
        path.unlink(missing_ok=True)


def remove_locked(folder: Path) -> None:
    """Removes an entry whose lock the caller holds alone.

    The lock goes last: whoever makes it anew then finds nothing of the old, and nothing of the new is removed.
    """
    with contextlib.suppress(OSError):
        (folder / DONE).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def try_remove(folder: Path) -> bool:
    """Removes an entry that nobody uses. False: it is in use, or another user's."""
    if folder.name.startswith(PRIVATE):
        if _is_alive(folder.name):
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    try:
        handle = try_lock(folder, fcntl.LOCK_EX, make=False)
    except (NoLocks, OSError):
        return False
    if handle is not None:
        remove_locked(folder)
        os.close(handle)
    return not folder.exists()


def _is_alive(name: str) -> bool:
    """Whether the process of a private folder runs, or may run, for it is on another node."""
    host, _, number = name.removeprefix(PRIVATE).rsplit("-", 2)[0].rpartition("-")
    return host != socket.gethostname() or os.path.exists(f"/proc/{number}")


@dataclass(frozen=True)
class _Found:
    """An entry as it lies on the disk."""

    folder: Path
    planned_bytes: int
    """Of the whole, also while a part of it is there."""
    present_bytes: int
    used_seconds: float
    is_partial: bool


def _look(folder: Path) -> _Found | None:
    try:
        found = {path.name: path.stat() for path in folder.iterdir()}
        newest = max([folder.stat().st_mtime, *(status.st_mtime for name, status in found.items() if name != LOCK)])
    except OSError:  # removed at this moment, or none of ours
        return None
    if DONE in found:
        newest = found[DONE].st_mtime
    planned = sum(status.st_size for status in found.values())
    return _Found(folder, planned, sum(status.st_blocks * 512 for status in found.values()), newest, PART in found)


def make_room(entry: Entry, *, limit_bytes: int | None, check: Callable[[], None]) -> None:
    """Lets an entry fit on scratch, if need be by removing others: stale versions first, then the longest unused.

    One that is in use is never removed, and none where that would not help.

    Raises: StorageError.
    """
    staged, source = entry.folder.parent, entry.folder.name.partition("-")[0]
    folders = [folder for folder in staged.iterdir() if folder != entry.folder and folder.is_dir()]
    kept = [found for folder in folders if (found := _look(folder)) is not None]
    removable_bytes = sum(found.present_bytes for found in kept)
    reason = _lack(entry, [], limit_bytes=limit_bytes, removable_bytes=removable_bytes)
    for found in sorted(kept, key=lambda found: (not found.folder.name.startswith(source), found.used_seconds)):
        check()
        if reason or not _lack(entry, kept, limit_bytes=limit_bytes):
            break
        if try_remove(found.folder):
            kept = [other for other in kept if other is not found]
            log.info("evicted from scratch", extra={"folder": str(found.folder), "bytes": found.present_bytes})
    if reason := reason or _lack(entry, kept, limit_bytes=limit_bytes):
        raise StorageError(
            f"{entry.name} has {entry.size} bytes, for which there is no room: {reason}. Free some space, point --scratch at a "
            "larger disk, or raise --scratch-limit if there is one."
        )


def _lack(entry: Entry, kept: list[_Found], *, limit_bytes: int | None, removable_bytes: int = 0) -> str:
    """Why an entry does not fit beside the kept ones, which may still grow; empty, if it does."""
    used_bytes = sum(found.planned_bytes for found in kept)
    if limit_bytes is not None and used_bytes + entry.size > limit_bytes:
        return f"--scratch-limit allows {limit_bytes} bytes for staged files, and {used_bytes} are taken by files in use"
    staged, own = entry.folder.parent, _look(entry.folder)
    free_bytes = (files.free_bytes(str(staged)) or 0) + removable_bytes
    missing_bytes = max(0, entry.size - (own.present_bytes if own else 0))
    growing_bytes = sum(max(0, found.planned_bytes - found.present_bytes) for found in kept if found.is_partial)
    reserve_bytes = min(RESERVE_BYTES, entry.size)
    if free_bytes >= missing_bytes + growing_bytes + reserve_bytes:
        return ""
    return (
        f"{staged.parent} has {free_bytes} bytes free, {missing_bytes} are missing of it, {growing_bytes} of others on their way, "
        f"and {reserve_bytes} must stay free"
    )
