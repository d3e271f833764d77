"""Remote files -> local scratch, once per node however many processes ask; kept for later attempts, and never a wrong copy.

LMDBs on a network file system are staged too: a page that can't be read through a memory map ends the process with SIGBUS.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from job.data.cache import (
    Entry,
    NoLocks,
    change_lock,
    empty,
    entry_of,
    make_room,
    mark_done,
    private_entry,
    remove_locked,
    touch,
    try_lock,
    try_remove,
)
from job.data.journal import fetch
from job.data.places import DATA, shard_uris
from job.errors import DataError, JobError, StorageError
from job.storage import files
from job.storage.files import Damaged, FileInfo, Replaced, shown
from job.storage.mounts import MOUNTINFO, network_file_system

__all__ = ["Staging", "shard_uris"]

POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


class Staging:
    """What a process has on scratch. Until `close`, no process evicts it.

    Thread-safe: different threads may stage different files at once.

    Args:
        limit_bytes: of all staged files on this scratch; those unused for longest make room.
        check: called often, on any thread; what it raises ends staging, and what has come stays for the next attempt.
        progress: called with (name, bytes there, bytes of the whole), a few times a second at most, from any thread.
        mountinfo: for tests.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        limit_bytes: int | None = None,
        check: Callable[[], None] = lambda: None,
        progress: Callable[[str, int, int], None] | None = None,
        mountinfo: Path = MOUNTINFO,
    ) -> None:
        self._scratch = scratch
        self._limit_bytes = limit_bytes
        self._check = check
        self._progress = progress or (lambda _name, _done, _planned: None)
        self._mountinfo = mountinfo
        self._lock = threading.Lock()
        self._private_lock = threading.Lock()
        self._held: dict[Path, int] = {}
        """Entries in use -> the handle that holds their lock."""
        self._private: list[Path] = []
        self._told: set[str] = set()
        """What is said once."""
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def file(self, uri: str, *, flag: str) -> Path:
        """A local path with the content of a CSV or a weights file. A local file is read where it is.

        Args: flag: the setting that named it, for messages.
        Raises: DataError, when there is no such file, or it changes. StorageError, when it does not fit or can't be read.
        """
        return files.local_path(uri) if files.is_local(uri) else self._stage(uri, flag=flag)

    def lmdb(self, uri: str, *, flag: str) -> list[Path]:
        """Local paths of one or more LMDBs: see `shard_uris`. Raises: like `file`."""
        return [self._stage_lmdb(place, flag=flag) for place in shard_uris(uri, flag=flag)]

    def purge(self) -> None:
        """Removes from scratch what this process used there, and other versions of it, unless another process uses it."""
        with self._lock:
            held, self._held = self._held, {}
        removed = 0
        for folder, handle in held.items():
            with contextlib.suppress(NoLocks, OSError):
                if change_lock(handle, fcntl.LOCK_EX):
                    remove_locked(folder)
                    removed += not folder.exists()
            os.close(handle)
            with contextlib.suppress(OSError):
                for other in list(folder.parent.glob(f"{folder.name.partition('-')[0]}-*")):
                    removed += other != folder and try_remove(other)
        self._remove_private()
        with contextlib.suppress(OSError):  # others have files there
            (self._scratch / "staged").rmdir()
        if held:
            log.info("scratch purged", extra={"entries": removed, "kept_for_others": sum(folder.exists() for folder in held)})

    def close(self) -> None:
        """Lets go of everything; it stays on scratch until room is short. Idempotent."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, {}
        for handle in held.values():
            os.close(handle)
        self._remove_private()

    def _remove_private(self) -> None:
        with self._lock:
            private, self._private = self._private, []
        for folder in private:
            shutil.rmtree(folder, ignore_errors=True)

    def _stage_lmdb(self, place: str, *, flag: str) -> Path:
        if not files.is_local(place):
            return self._stage(place, flag=flag)
        path = files.local_path(place)
        kind = network_file_system(path, mountinfo=self._mountinfo)
        file = path / DATA if path.is_dir() else path
        if not kind or not file.is_file():  # opening it will say what is missing
            return path
        if network_file_system(self._scratch, mountinfo=self._mountinfo):
            self._say_once(
                "this LMDB is on a network file system, and so is scratch: it is used where it is, and a fault of the network may "
                "end the job with SIGBUS; point --scratch at a local disk",
                uri=place,
                type=kind,
            )
            return path
        return self._stage(str(file.absolute()), flag=flag)

    def _stage(self, uri: str, *, flag: str) -> Path:
        if kind := network_file_system(self._scratch, mountinfo=self._mountinfo):
            self._say_once(
                "scratch is on a network file system, which is slow for images and may end the job with SIGBUS; point --scratch "
                "at a local disk",
                scratch=str(self._scratch),
                type=kind,
            )
        try:
            info = files.stat(uri)
        except FileNotFoundError:
            raise DataError(f"There is no {shown(uri)}. Check {flag}.") from None
        entry = entry_of(self._scratch / "staged", uri, info)
        with self._explained():
            try:
                return self._stage_shared(entry, uri, info)
            except NoLocks as error:
                self._say_once(
                    "scratch knows no file locks (flock): this process stages for itself alone", scratch=str(self._scratch)
                )
                log.debug("flock failed", exc_info=error)
                return self._stage_alone(private_entry(entry), uri, info)

    def _stage_shared(self, entry: Entry, uri: str, info: FileInfo) -> Path:
        """Waits while another process stages it: as long as that one lives, for its own waits are bounded. Raises: NoLocks."""
        fetched = False
        while True:
            self._check()
            with self._lock:
                if entry.folder in self._held:
                    if entry.is_done:
                        return entry.file
                    os.close(self._held.pop(entry.folder))  # someone cut the file: this process must not wait for itself
            kind = fcntl.LOCK_SH if entry.is_done else fcntl.LOCK_EX
            handle = try_lock(entry.folder, kind)
            if handle is None:
                if kind == fcntl.LOCK_EX and entry.folder.exists():
                    self._say_once("another process on this node is staging it", level=logging.INFO, uri=shown(uri))
                time.sleep(POLL_SECONDS)
                continue
            try:
                if kind == fcntl.LOCK_EX:
                    if not entry.is_done:
                        self._fetch(entry, uri, info)
                        fetched = True
                elif entry.is_done:
                    touch(entry)
                    handle = self._hold(entry, handle)
                    if not fetched:
                        log.info("staged before", extra={"uri": shown(uri), "bytes": info.size})
                    return entry.file
            finally:
                if handle is not None:
                    os.close(handle)  # after a download the next round shares the lock

    def _hold(self, entry: Entry, handle: int) -> int | None:
        """Keeps a handle until `close`. Returns: it, when it is not needed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("Staging after close")
            if entry.folder in self._held:
                return handle
            self._held[entry.folder] = handle
            return None

    def _stage_alone(self, entry: Entry, uri: str, info: FileInfo) -> Path:
        while not self._private_lock.acquire(timeout=POLL_SECONDS):
            self._check()
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError("Staging after close")
                if entry.folder not in self._private:
                    self._private.append(entry.folder)
            for folder in entry.folder.parent.glob("private-*"):
                try_remove(folder)  # of processes that were killed
            entry.folder.mkdir(parents=True, exist_ok=True)
            if not entry.is_done:
                self._fetch(entry, uri, info)
            return entry.file
        finally:
            self._private_lock.release()

    def _fetch(self, entry: Entry, uri: str, info: FileInfo) -> None:
        """Downloads it, a second time if what came is damaged."""
        fields = {"uri": shown(uri), "bytes": info.size}
        if entry.is_marked and entry.file.stat().st_size != entry.size:
            log.warning("a staged file is not as long as it was, so it is fetched again", extra=fields)
            empty(entry)
        make_room(entry, limit_bytes=self._limit_bytes, check=self._check)
        name = files.local_path(uri).parent.name if entry.name == DATA else entry.name
        began = time.monotonic()

        def tell(done_bytes: int) -> None:
            self._progress(name, done_bytes, info.size)

        def tell_start(resumed_bytes: int) -> None:
            log.info("staging", extra={**fields, "resumed_bytes": resumed_bytes})
            tell(resumed_bytes)

        def download() -> int:
            return fetch(entry, uri, info, began=tell_start, progress=tell, check=self._check)

        try:
            try:
                fetched_bytes = download()
            except Damaged as error:
                log.warning("what came is damaged, so all of it is fetched again", extra={**fields, "reason": str(error)})
                empty(entry)
                fetched_bytes = download()
        except Damaged as error:
            empty(entry)
            raise DataError(
                f"{shown(uri)} does not agree with its own checksum, twice in a row. Upload it again from its source. ({error})"
            ) from error
        except Replaced:
            remove_locked(entry.folder)  # its parts may be of two versions
            raise DataError(f"{shown(uri)} was replaced while it was copied. Start again once it no longer changes.") from None
        mark_done(entry, uri, info)
        seconds = time.monotonic() - began
        log.info(
            "staged",
            extra={**fields, "seconds": round(seconds, 3), "bytes_per_second": round(fetched_bytes / max(seconds, 1e-6))},
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the scratch disk name --scratch."""
        try:
            yield
        except (OSError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, JobError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"The disk or the quota of {self._scratch} is full ({os.strerror(cause.errno)}). Free some space, or point "
                    "--scratch at a larger disk; what has been staged stays there for the next attempt."
                ) from error
            with files.explained(str(self._scratch), "staging to", writing=True):
                raise

    def _say_once(self, text: str, *, level: int = logging.WARNING, **fields: str) -> None:
        said = f"{text} {fields}"
        with self._lock:
            if said in self._told:
                return
            self._told.add(said)
        log.log(level, text, extra=fields)
