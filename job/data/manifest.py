"""The CSV of image keys and captions, as two columns of text: 10 million rows of 120 bytes need 1.5 GB."""

import contextlib
import csv
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.data.csv_rows import quotes_enclose, rows, scan
from job.errors import ConfigError, DataError

AUTO = "auto"
SEPARATORS = ("|", "\t", ",", ";")
IMAGE_COLUMNS = (
    *("path", "filepath", "file_path", "filename", "file_name", "file", "image", "image_path", "image_file", "img", "img_path"),
    *("key", "image_key", "image_id", "img_id", "imageid", "id", "url", "image_url"),
)
CAPTION_COLUMNS = (
    *("tags", "tag", "caption", "captions", "title", "text", "texts", "description", "descriptions", "label", "labels"),
    *("prompt", "prompts", "alt", "alt_text", "class", "category", "keywords"),
)
"""Names that `auto` accepts, whatever their case; of several in one file the first in these lists wins."""

_CHUNK_ROWS = 65_536


class Column:
    """Immutable texts in one block of UTF-8: a tenth of the memory of as many str objects, and nothing for a fork to copy."""

    __slots__ = ("_blob", "_offsets")

    def __init__(self, blob: bytes, offsets: NDArray[np.int64]) -> None:
        """offsets: int64, one more than there are texts, ascending from 0 to len(blob)."""
        self._blob = blob
        self._offsets = offsets

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Column":
        growing = _GrowingColumn()
        growing.extend(list(texts))
        return growing.finish()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self.encoded(row).decode()

    def __iter__(self) -> Iterator[str]:
        return map(bytes.decode, self.all_encoded())

    def all_encoded(self) -> Iterator[bytes]:
        """Every text as UTF-8, several times faster than row by row."""
        for start in range(0, len(self), _CHUNK_ROWS):
            offsets = self._offsets[start : start + _CHUNK_ROWS + 1].tolist()
            yield from (self._blob[begin:end] for begin, end in itertools.pairwise(offsets))

    def encoded(self, row: int) -> bytes:
        """The text of one row as UTF-8. Raises: IndexError outside 0 … len-1; negative rows have no meaning here."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a column of {len(self)}")
        return self._blob[self._offsets[row] : self._offsets[row + 1]]

    def byte_lengths(self) -> NDArray[np.int64]:
        return np.diff(self._offsets)

    @property
    def nbytes(self) -> int:
        return len(self._blob) + self._offsets.nbytes


class _GrowingColumn:
    def __init__(self) -> None:
        self._blob = io.BytesIO()
        self._lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]

    def extend(self, texts: list[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._blob.write(b"".join(encoded))
        self._lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))

    def finish(self) -> Column:
        offsets = np.concatenate(self._lengths)
        np.cumsum(offsets, out=offsets)
        return Column(self._blob.getvalue(), offsets)  # getvalue() hands its block over without a copy


@dataclass(frozen=True)
class Manifest:
    keys: Column
    captions: Column
    sha256: str
    """Of the file's bytes, hexadecimal."""
    separator: str
    image_column: str
    caption_column: str

    def __len__(self) -> int:
        return len(self.keys)


def read_manifest(
    path: Path, *, separator: str = AUTO, image_column: str = AUTO, caption_column: str = AUTO, key_prefix: str = ""
) -> Manifest:
    """The rows of a CSV in UTF-8 whose first line names its columns; blank lines are no rows.

    Quotes: if no field begins with one, quotes mean nothing. If every line is a row as it stands (the right number of fields, and
    after a quote left open a key shaped like the others), and at most half of the fields that begin with a quote also end with
    one, quotes belong to the captions (5" screen, "big). In all other files quotes enclose fields, and each must follow the
    rules: closed, followed by a separator or the end of the line, doubled inside. A quoted field of several lines must hold no
    line that looks like a row. So no quote joins rows, or cuts one, without an error.

    Args:
        separator: one character, 'tab', or 'auto': the one among | tab , ; that makes both columns appear in the first line.
        image_column, caption_column: names, or 'auto' for the first known one of IMAGE_COLUMNS and CAPTION_COLUMNS.
        key_prefix: put before every key.
    Raises:
        ConfigError: a separator of several characters.
        DataError: anything else than a readable CSV with at least one row, each with as many fields as the first line.
        AccessError: the file may not be read.
    """
    candidates = _separators(separator)
    sha256, has_quotes = scan(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first_line = next((line for line in file if line.strip()), "")
    if not first_line:
        raise DataError(
            f"{path} is empty. It must begin with a line of column names, such as path|tags, and hold one row per image."
        )
    separator, names, image, caption = _find_columns(
        path, first_line, candidates, image_column=image_column, caption_column=caption_column
    )
    quoted = has_quotes and quotes_enclose(path, separator, columns=len(names), image=image)
    keys, captions = _GrowingColumn(), _GrowingColumn()
    parsed = rows(path, separator=separator, columns=len(names), image=image, quoted=quoted)
    next(parsed)  # the column names
    while chunk := list(itertools.islice(parsed, _CHUNK_ROWS)):
        keys.extend([key_prefix + row[image] for row in chunk] if key_prefix else [row[image] for row in chunk])
        captions.extend([row[caption] for row in chunk])
    manifest = Manifest(keys.finish(), captions.finish(), sha256, separator, names[image], names[caption])
    if not len(manifest):
        raise DataError(f"{path} holds column names ({', '.join(names)}) but no rows. Check that it was written to its end.")
    return manifest


def read_manifest_like(path: Path, *, separator: str, image_column: str, caption_column: str, key_prefix: str) -> Manifest:
    """A second CSV, such as that of held-out pairs: read as the first one was if its first line has the same two columns, else by
    itself. Args and Raises: see read_manifest; columns by name."""
    mark, first_line = {"tab": "\t"}.get(separator, separator), ""
    with contextlib.suppress(OSError), path.open(encoding="utf-8-sig", errors="replace") as file:
        first_line = file.readline()  # what can't be read, read_manifest explains
    names = {name.strip(' "\r\n') for name in first_line.split(mark)}
    if not {image_column, caption_column} <= names:
        return read_manifest(path, key_prefix=key_prefix)
    return read_manifest(path, separator=separator, image_column=image_column, caption_column=caption_column, key_prefix=key_prefix)


def split_rows(keys: Column, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training rows and held-out rows, int64, ascending.

    A row is held out if the first 8 bytes of the key's sha256, as a big-endian integer over 2**64, are below fraction. So all
    rows of an image go to one side, whatever the seed, the order of the rows and the other images.
    """
    if fraction <= 0:
        return np.arange(len(keys)), np.empty(0, np.int64)
    heads = bytearray()
    for key in keys.all_encoded():
        heads += hashlib.sha256(key).digest()[:8]
    held_out = np.frombuffer(heads, ">u8") / 2.0**64 < fraction
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _separators(separator: str) -> tuple[str, ...]:
    if separator == AUTO:
        return SEPARATORS
    character = {"tab": "\t", "\\t": "\t"}.get(separator.lower(), separator)
    if len(character) != 1 or character in '"\r\n':
        raise ConfigError(f"--csv-separator must be auto, tab or one character other than a quote; found {separator!r}.")
    return (character,)


def _find_columns(
    path: Path, first_line: str, candidates: tuple[str, ...], *, image_column: str, caption_column: str
) -> tuple[str, list[str], int, int]:
    """Separator, names of all columns, positions of the image and caption columns."""
    readings = {mark: [name.strip() for name in next(csv.reader([first_line], delimiter=mark))] for mark in candidates}
    for mark, names in readings.items():
        image, caption = _position(names, image_column, IMAGE_COLUMNS), _position(names, caption_column, CAPTION_COLUMNS)
        if image is None or caption is None:
            continue
        for place in (image, caption):
            if [name.lower() for name in names].count(names[place].lower()) > 1:
                raise DataError(f"{path} has several columns named '{names[place]}'. Rename all but one.")
        if image == caption:
            raise ConfigError(
                f"--image-column and --caption-column both mean the column '{names[image]}' of {path}. Name two columns."
            )
        return mark, names, image, caption
    mark, names = max(readings.items(), key=lambda item: len(item[1]))
    found = ", ".join(f"'{name[:40]}'" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    wanted = [
        f"{what}{'' if given == AUTO else f' named {given!r}'}"
        for what, flag, given, known in (
            ("image keys", "--image-column", image_column, IMAGE_COLUMNS),
            ("captions", "--caption-column", caption_column, CAPTION_COLUMNS),
        )
        if _position(names, given, known) is None
    ]
    raise DataError(
        f"{path} has no column of {' and none of '.join(wanted)}. Columns in its first line, with the separator {mark!r}: {found}. "
        "Name the right ones with --image-column and --caption-column, or the separator with --csv-separator. If the first line is "
        f"a row already, put a line such as path{mark}tags above it."
    )


def _position(names: list[str], wanted: str, known: tuple[str, ...]) -> int | None:
    if wanted in names:
        return names.index(wanted)
    lowered = [name.lower() for name in names]
    return next((lowered.index(name) for name in (known if wanted == AUTO else (wanted.strip().lower(),)) if name in lowered), None)
