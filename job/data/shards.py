"""One LMDB file, opened once per process however many use it: read-only, also on a read-only file system."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb

from job.errors import AccessError, DataError

_SPARE_TRANSACTIONS = 64
_DAMAGES = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.BadTxnError)

_opened: dict[tuple[int, int], tuple[Any, int]] = {}
_opened_lock = threading.Lock()
"""Environments by device and inode, with their number of users: LMDB must not open a file twice in one process."""


class Shard:
    """Values by key. Thread-safe until `close`; made by `open_shard`. Every method raises DataError when the file is damaged."""

    def __init__(self, path: Path, environment: Any, *, file_bytes: int, used_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.used_bytes = used_bytes
        """The same for every copy of the file."""
        self.entries: int = environment.stat()["entries"]
        self._environment: Any = environment

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[bytes], memoryview | None]]:
        """A function from keys to values, None where there is no such key. Values lie in the file, and end with the context."""
        try:
            transaction = self._environment.begin(buffers=True)
        except _DAMAGES as error:
            raise self._damaged(error) from None

        def get(key: bytes) -> memoryview | None:
            try:
                value: memoryview | None = transaction.get(key)
            except _DAMAGES as error:
                raise self._damaged(error) from None
            return value

        with transaction:
            yield get

    def __contains__(self, key: bytes) -> bool:
        try:
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                found: bool = cursor.set_key(key)  # unlike get, it reads no page of the value: 20 times less on a cold disk
                return found
        except _DAMAGES as error:
            raise self._damaged(error) from None

    def keys(self) -> Iterator[bytes]:
        """Every key, in the LMDB's order."""
        try:
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                yield from cursor.iternext(values=False)
        except _DAMAGES as error:
            raise self._damaged(error) from None

    def close(self) -> None:
        """Idempotent. The file itself is closed when its last user closes. Not while anyone is reading."""
        if self._environment is not None:
            _release(self._environment)
            self._environment = None

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"The LMDB {self.path} is damaged ({error}). Copy it again from its source, or pack it again (clipjob pack)."
        )


def open_shard(path: Path) -> Shard:
    """The LMDB at a path: a folder with data.mdb, or a single file.

    Raises:
        DataError: it is missing, no LMDB, shorter than its own header says, or empty.
        AccessError: it may not be read.
    """
    file = _find_file(path)
    size = file.stat().st_size
    environment = _acquire(path, file)
    try:
        # A missing tail must be found now: reading it later through the memory map would end the process with SIGBUS.
        needed = _used_bytes(environment)
        if size < needed:
            raise DataError(
                f"The LMDB {path} is cut short: {file.name} has {size} bytes and its header speaks of {needed}. Copy it again. "
                "(If it was never copied, rewrite it with: mdb_copy -c.)"
            )
        if environment.stat()["entries"] == 0:
            raise DataError(f"The LMDB {path} is empty. Fill it with clipjob pack, or check the path.")
        return Shard(path, environment, file_bytes=size, used_bytes=needed)
    except BaseException:
        _release(environment)
        raise


def _find_file(path: Path) -> Path:
    file = path / "data.mdb" if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            start = stream.read(24)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_dir():
            found = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
            raise DataError(f"The folder {path} holds no data.mdb, so it is no LMDB. It holds {found}. Check the path.") from None
        if path.with_name(path.name + ".partial").exists():
            raise DataError(
                f"{path} is only partly packed ({path.name}.partial). Run the same clipjob pack again to finish it."
            ) from None
        raise DataError(
            f"There is no LMDB {path}. Check --lmdb, --val-lmdb, --guard-lmdb; in a container, check that its folder is mounted."
        ) from None
    except IsADirectoryError:
        raise DataError(f"{file} is a folder, and an LMDB's data file is needed. Check the path.") from None
    except PermissionError:
        raise AccessError(f"{file} may not be read by this user (id {os.getuid()}). Check the file's permissions.") from None
    if len(start) < 24:
        raise DataError(f"{file} has {len(start)} bytes and is no LMDB. Copy it again.")
    return file


def _acquire(path: Path, file: Path) -> Any:
    with _opened_lock:
        status = file.stat()
        identity = status.st_dev, status.st_ino
        environment, users = _opened.get(identity) or (_open_environment(path, file), 0)
        _opened[identity] = environment, users + 1
        return environment


def _open_environment(path: Path, file: Path) -> Any:
    try:
        return lmdb.open(
            str(file),
            subdir=False,
            readonly=True,
            create=False,
            lock=False,  # a lock file can't be written to a read-only file system, and nobody writes
            readahead=False,  # images are read in random order
            max_spare_txns=_SPARE_TRANSACTIONS,
        )
    except lmdb.VersionMismatchError:
        raise DataError(
            f"The LMDB {path} was written by an incompatible version of LMDB or a 32-bit system. Pack it again."
        ) from None
    except lmdb.InvalidError:
        raise DataError(f"{file} is no LMDB. Check the path; clipjob pack makes one from a folder of images.") from None
    except lmdb.Error as error:
        raise DataError(
            f"The LMDB {path} can't be opened ({error}). Check that it was copied whole and that no other program writes it."
        ) from None


def _release(environment: Any) -> None:
    with _opened_lock:
        identity = next(identity for identity, (known, _) in _opened.items() if known is environment)
        users = _opened.pop(identity)[1]
        if users > 1:
            _opened[identity] = environment, users - 1
        else:
            environment.close()


def _used_bytes(environment: Any) -> int:
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])
