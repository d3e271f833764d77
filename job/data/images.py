"""The LMDB of encoded images: read-only, from any number of threads, also on a read-only file system."""

import itertools
import os
import threading
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from job.data.manifest import Column
from job.errors import AccessError, DataError

MAX_KEY_BYTES = 511
"""LMDB's limit. A longer key can't be stored, so it is never found either."""

_SPARE_TRANSACTIONS = 64
_DAMAGES = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.BadTxnError)

_opened: dict[tuple[int, int], tuple[Any, int]] = {}
_opened_lock = threading.Lock()
"""Environments by device and inode, with their number of users: LMDB must not open a file twice in one process."""


class Images:
    """Encoded images by key. Thread-safe until `close`; made by `open_images`."""

    def __init__(self, path: Path, file: Path, environment: Any) -> None:
        self.path = path
        self.file_bytes = file.stat().st_size
        self._environment: Any = environment
        self._entries: int = environment.stat()["entries"]

    def get(self, key: str) -> bytes | None:
        """The encoded image, a copy that outlives the transaction; None if there is no such key. Raises: DataError."""
        encoded = key.encode()
        if not 0 < len(encoded) <= MAX_KEY_BYTES:
            return None
        try:
            with self._environment.begin() as transaction:
                value: bytes | None = transaction.get(encoded)
                return value
        except _DAMAGES as error:
            raise self._damaged(error) from None

    def __contains__(self, key: str) -> bool:
        encoded = key.encode()
        if not 0 < len(encoded) <= MAX_KEY_BYTES:
            return False
        try:
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                found: bool = cursor.set_key(encoded)  # unlike get, it reads no page of the image: 20 times less on a cold disk
                return found
        except _DAMAGES as error:
            raise self._damaged(error) from None

    def __len__(self) -> int:
        return self._entries

    def sample_keys(self, count: int) -> list[str]:
        """At most count keys, evenly spread over the LMDB's order. Reads every key, not the images: seconds for millions."""
        if count <= 0:
            return []
        stride = -(-self._entries // count)
        try:
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                keys = list(itertools.islice(cursor.iternext(values=False), 0, None, stride))
        except _DAMAGES as error:
            raise self._damaged(error) from None
        return [key.decode(errors="replace") for key in keys]

    def fingerprint(self) -> dict[str, int]:
        """What tells this LMDB from another at no cost: entries, and bytes in use (the same for every copy of the file)."""
        return {"entries": self._entries, "bytes": _used_bytes(self._environment)}

    def close(self) -> None:
        """Idempotent. The file itself is closed when its last user closes."""
        if self._environment is not None:
            _release(self._environment)
            self._environment = None

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"The LMDB {self.path} is damaged ({error}). Copy it again from its source, or pack it again (clipjob pack)."
        )


def open_images(path: Path) -> Images:
    """The LMDB at path: a folder with data.mdb, or a single file. A folder that several commands open is opened once.

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
        return Images(path, file, environment)
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
            f"There is no LMDB {path}. Check --lmdb or --val-lmdb; in a container, check that its folder is mounted."
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


@dataclass(frozen=True)
class Missing:
    """Keys of the CSV that the LMDB does not hold."""

    checked: int
    count: int
    examples: tuple[str, ...]
    """The first few of them."""
    cause: str
    """Why, and what to do, as a sentence; "" if nothing is known to explain it."""
    present: tuple[str, ...]
    """A few keys that the LMDB does hold, if any is missing."""

    def __str__(self) -> str:
        named = ", ".join(repr(key) for key in self.examples)
        here = " and ".join(repr(key) for key in self.present[:2])
        return (
            f"{self.count} of {self.checked} rows looked at have an image key that is not in the LMDB: {named}"
            f"{', …' if self.count > len(self.examples) else ''}. Keys of the LMDB look like {here}. "
            f"{self.cause or 'Check that the CSV and the LMDB belong together.'}"
        )


def match_keys(keys: Column, rows: NDArray[np.int64], images: Images, *, limit: int | None = None) -> Missing:
    """Looks the rows' keys up, all of them or at most limit, evenly spread; about 3 µs each. Raises: DataError, damaged LMDB."""
    if limit is not None and len(rows) > limit:
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
    missing = [row for row in rows.tolist() if keys[row] not in images]
    if not missing:
        return Missing(len(rows), 0, (), "", ())
    known = images.sample_keys(1000)
    spread = [keys[row] for row in missing[:: -(-len(missing) // 20)]]
    causes = Counter(cause for key in spread if (cause := _cause(key, images, known)))
    cause = causes.most_common(1)[0][0] if causes else ""
    return Missing(
        len(rows), len(missing), tuple(keys[row] for row in missing[:5]), cause, tuple(known[:: max(1, len(known) // 3)][:3])
    )


_SPELLINGS: tuple[tuple[Callable[[str], str], str], ...] = (
    (str.strip, "The CSV's keys have spaces around them; remove these."),
    (
        lambda key: unicodedata.normalize("NFC", key),
        "The LMDB's keys are in Unicode form NFC, the CSV's in NFD; normalize the CSV to NFC.",
    ),
    (
        lambda key: unicodedata.normalize("NFD", key),
        "The LMDB's keys are in Unicode form NFD, the CSV's in NFC; normalize the CSV to NFD.",
    ),
    (lambda key: key.replace("\\", "/"), "The CSV's keys have backslashes where the LMDB's have slashes; replace them in the CSV."),
    (lambda key: key.replace("/", "\\"), "The CSV's keys have slashes where the LMDB's have backslashes; replace them in the CSV."),
    (lambda key: key.removeprefix("./"), "The CSV's keys begin with './', the LMDB's do not; remove it from the CSV."),
    (urllib.parse.unquote, "The CSV's keys are percent-encoded, the LMDB's are not; decode them in the CSV."),
    (
        lambda key: _with_suffix(key, str.lower),
        "The extensions of the LMDB's keys are in lower case, the CSV's are not; change the CSV.",
    ),
    (
        lambda key: _with_suffix(key, str.upper),
        "The extensions of the LMDB's keys are in upper case, the CSV's are not; change the CSV.",
    ),
    (str.lower, "The LMDB's keys are in lower case, the CSV's are not; change the CSV."),
    (str.upper, "The LMDB's keys are in upper case, the CSV's are not; change the CSV."),
    (lambda key: os.path.splitext(key)[0], "The LMDB's keys have no file extension, the CSV's have; remove it from the CSV."),
)


def _with_suffix(key: str, change: Callable[[str], str]) -> str:
    stem, suffix = os.path.splitext(key)
    return stem + change(suffix)


def _cause(key: str, images: Images, known: list[str]) -> str:
    """The sentence that explains why this key is missing, found by trying what would be there."""
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"Keys of more than {MAX_KEY_BYTES} bytes can't be in an LMDB; shorten them in the CSV and in the LMDB."
    for change, sentence in _SPELLINGS:
        if change(key) != key and change(key) in images:
            return sentence
    stem, suffix = os.path.splitext(key)
    for other in sorted({os.path.splitext(name)[1] for name in known} - {""}):
        if key + other in images:
            return f"The LMDB's keys end in '{other}', the CSV's do not; add it in the CSV."
        if suffix and stem + other in images:
            return f"The LMDB's keys end in '{other}' where the CSV's end in '{suffix}'; change the CSV."
    for removed, added in _prefixes(key, known):
        if added + key.replace("\\", "/").removeprefix(removed) in images:
            if not removed:
                return f"The LMDB's keys begin with '{added}', the CSV's do not: add --key-prefix '{added}'."
            rest = f", the LMDB's with '{added}'; replace it in the CSV" if added else ", the LMDB's do not; remove it from the CSV"
            return f"The CSV's keys begin with '{removed}'{rest} (or correct --key-prefix, if that added it)."
    return ""


def _prefixes(key: str, known: list[str]) -> Iterator[tuple[str, str]]:
    """(what to remove from the key, what to put before it), folders only."""
    of_lmdb = sorted({name[: at + 1] for name in known for at, mark in enumerate(name) if mark == "/"} | {"./"}, key=len)
    of_key = ["", *(key[: at + 1].replace("\\", "/") for at, mark in enumerate(key) if mark in "/\\")]
    for removed, added in itertools.product(of_key, ["", *of_lmdb[:1000]]):
        if removed or added:
            yield removed, added
