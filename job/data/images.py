"""The LMDB of encoded images: read-only, from any number of threads, also on a read-only file system."""

import contextlib
import itertools
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.data.manifest import Column
from job.data.shards import Shard, open_shard

MAX_KEY_BYTES = 511
"""LMDB's limit. A longer key can't be stored, so it is never found either."""


class Images:
    """Encoded images by key, in one LMDB or several. Thread-safe until `close`; made by `open_images`.

    Where several hold a key, the first one's image counts. Lengths and sampled keys count such a key once for each of them.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.path = shards[0].path
        self.file_bytes = sum(shard.file_bytes for shard in shards)
        self._shards = tuple(shards)
        self._entries = sum(shard.entries for shard in shards)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[str], memoryview | None]]:
        """A function from keys to encoded images, None where there is no such key; for one thread.

        Nothing is copied: images lie in the file, and end with the context, which must end before `close`.

        Raises: DataError, also the function.
        """
        with contextlib.ExitStack() as opened:
            getters: list[Callable[[bytes], memoryview | None]] = []

            def get(key: str) -> memoryview | None:
                encoded = key.encode()
                if 0 < len(encoded) <= MAX_KEY_BYTES:
                    for number, shard in enumerate(self._shards):
                        if number == len(getters):
                            getters.append(opened.enter_context(shard.reading()))
                        if (value := getters[number](encoded)) is not None:
                            return value
                return None

            yield get

    def get(self, key: str) -> bytes | None:
        """A copy of the encoded image; None if there is no such key. Raises: DataError."""
        with self.reading() as get:
            value = get(key)
            return None if value is None else bytes(value)

    def __contains__(self, key: str) -> bool:
        encoded = key.encode()
        return 0 < len(encoded) <= MAX_KEY_BYTES and any(encoded in shard for shard in self._shards)

    def __len__(self) -> int:
        return self._entries

    def sample_keys(self, count: int) -> list[str]:
        """At most count keys, evenly spread over the LMDB's order. Reads every key, not the images: seconds for millions."""
        if count <= 0:
            return []
        stride = -(-self._entries // count)
        keys = itertools.chain.from_iterable(shard.keys() for shard in self._shards)
        return [key.decode(errors="replace") for key in itertools.islice(keys, 0, None, stride)]

    def fingerprint(self) -> dict[str, int]:
        """What tells this LMDB from another at no cost: entries, and bytes in use (the same for every copy of the file)."""
        return {"entries": self._entries, "bytes": sum(shard.used_bytes for shard in self._shards)}

    def close(self) -> None:
        """Idempotent. A file itself is closed when its last user closes."""
        for shard in self._shards:
            shard.close()


def open_images(paths: Path | Sequence[Path]) -> Images:
    """The LMDB at a path, or those at several paths as one: each a folder with data.mdb, or a single file.

    A file that several commands open is opened once.

    Raises:
        DataError: it is missing, no LMDB, shorter than its own header says, or empty.
        AccessError: it may not be read.
    """
    shards: list[Shard] = []
    try:
        for path in [paths] if isinstance(paths, Path) else paths:
            shards.append(open_shard(path))  # noqa: PERF401  those before a bad one are closed
        return Images(shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise


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
