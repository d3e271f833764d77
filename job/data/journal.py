"""A file fetched part by part, with a journal of what is there: a download that was killed goes on where it was."""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable

from job.data.cache import Entry
from job.errors import StorageError
from job.storage import files
from job.storage.files import FileInfo, Part, Replaced, shown
from job.storage.parallel import in_parallel
from job.storage.remote import is_s3

PROGRESS_SECONDS = 0.3

log = logging.getLogger(__name__)

_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]+)\n")


class Journal:
    """What of a file is there, in memory and in a file. Thread-safe; owns the two files until `close`.

    A line may outlive its bytes when the machine fails, so the checksum is compared before a part is believed to be there.
    """

    def __init__(self, entry: Entry, info: FileInfo, *, check: Callable[[], None]) -> None:
        if not entry.part.exists():  # killed between the rename and DONE
            with contextlib.suppress(FileNotFoundError):
                os.replace(entry.file, entry.part)
        self.crcs: dict[Part, int] = {}
        """Of the parts that are there."""
        self._lock = threading.Lock()
        self._closed = False
        self.handle = os.open(entry.part, os.O_RDWR | os.O_CREAT, 0o666)
        self._journal = -1
        try:
            os.ftruncate(self.handle, info.size)
            self._recall(entry, info, check)
            fresh = entry.journal.with_name(f"{entry.journal.name}.new")
            fresh.write_bytes(_lines(self.crcs))  # without what was torn or is damaged
            os.replace(fresh, entry.journal)
            self._journal = os.open(entry.journal, os.O_WRONLY | os.O_APPEND)
        except BaseException:
            self.close()
            raise

    def _recall(self, entry: Entry, info: FileInfo, check: Callable[[], None]) -> None:
        """Takes over the journalled parts whose bytes still have the checksum written down."""
        try:
            text = entry.journal.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return
        planned = set(files.parts_of(info))
        written = {Part(int(start), int(length)): int(crc, 16) for start, length, crc in _LINE.findall(text)}

        def look(part: Part, given_up: Callable[[], None]) -> None:
            given_up()
            if files.crc_in(info, self.handle, part) == written[part]:
                self.crcs[part] = written[part]

        in_parallel(look, sorted(planned & written.keys()), check=check)

    @property
    def present_bytes(self) -> int:
        return sum(part.length for part in list(self.crcs))

    def add(self, part: Part, crc: int) -> None:
        """The part's bytes are in the file."""
        with self._lock:
            if not self._closed:  # else it is a straggler of a transfer that was given up
                self.crcs[part] = crc
                os.write(self._journal, _lines({part: crc}))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self.handle)
            if self._journal >= 0:
                os.close(self._journal)


def _lines(crcs: dict[Part, int]) -> bytes:
    return "".join(f"{part.start} {part.length} {crc:x}\n" for part, crc in sorted(crcs.items())).encode()


def fetch(
    entry: Entry,
    uri: str,
    info: FileInfo,
    *,
    began: Callable[[int], None],
    progress: Callable[[int], None],
    check: Callable[[], None],
) -> int:
    """Brings all of a version of a file into the entry's folder, under its name; the caller holds the lock alone.

    Args:
        began: called once with the bytes that were there already.
        progress: called with the bytes that are there, a few times a second at most, one call at a time.
        check: called often; what it raises ends it, and what has come stays for the next attempt.
    Returns: bytes fetched.
    Raises: Replaced; Damaged; what storage raises. OSError: of the disk.
    """
    journal = Journal(entry, info, check=check)
    resumed_bytes = journal.present_bytes
    telling = threading.Lock()
    told = 0.0

    def fetched(part: Part, crc: int) -> None:
        nonlocal told
        journal.add(part, crc)
        if telling.acquire(blocking=False):
            try:
                if time.monotonic() - told >= PROGRESS_SECONDS:
                    progress(journal.present_bytes)
                    told = time.monotonic()
            finally:
                telling.release()

    try:
        began(resumed_bytes)
        missing = [part for part in files.parts_of(info) if part not in journal.crcs]
        files.fetch_parts(uri, info, journal.handle, missing, fetched=fetched, check=check)
    except (StorageError, FileNotFoundError):
        if not is_s3(uri):  # of another store's file that is shorter or gone by now, all that is seen is that bytes don't come
            _check_version(uri, info)
        raise
    finally:
        journal.close()
    if not files.verify(uri, info, journal.crcs):
        log.info("the store keeps no checksum of it to compare with", extra={"uri": shown(uri)})
    _check_version(uri, info)
    os.replace(entry.part, entry.file)
    with telling:
        progress(info.size)
    return info.size - resumed_bytes


def _check_version(uri: str, info: FileInfo) -> None:
    """Not every store can be asked for one version. Raises: Replaced."""
    try:
        found = files.stat(uri)
    except FileNotFoundError:
        found = None
    if found is None or (found.size, found.token) != (info.size, info.token):
        raise Replaced(f"{shown(uri)} was replaced or removed while it was read.")
