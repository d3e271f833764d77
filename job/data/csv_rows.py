"""What is inside a CSV file: its bytes checked and hashed, its rows parsed strictly, every refusal with its line.

Rows are parsed by the csv module rather than by pandas. Both read 400 thousand rows in under a second, but pandas fills
short rows with empty text, drops a trailing empty field and joins lines after a lone quote, so a damaged file would
change the data without a word; the csv module says what it found and in which line.
"""

import codecs
import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from job.errors import AccessError, DataError

_OTHER_FORMATS = (
    (b"\x1f\x8b", "is gzip-compressed; unpack it first (gunzip)"),
    (b"BZh", "is bzip2-compressed; unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "is xz-compressed; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed; unpack it first (unzstd)"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel workbook; save the sheet as CSV UTF-8"),
    (b"PAR1", "is a Parquet file; write it as CSV first (pandas: read_parquet, then to_csv with index=False)"),
    (b"ARROW1", "is an Arrow file; write it as CSV first"),
    (b"SQLite format 3", "is an SQLite database; export the table as CSV first"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)
_BLOCK_BYTES = 8 << 20

Shape = tuple[str, bool, bool, bool]
"""What the keys of one file tend to have in common: extension; whether there are folders, digits, spaces."""


def scan(path: Path) -> tuple[str, bool]:
    """The file's sha256 and whether it holds a quote. Raises: DataError unless all of it is UTF-8 text; AccessError."""
    digest, decoder, has_quotes = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), False
    with _opened(path) as file:
        start = file.read(_BLOCK_BYTES)
        for magic, remedy in _OTHER_FORMATS:
            if start.startswith(magic):
                raise DataError(f"{path} is no CSV: it {remedy}.")
        block = start
        while block:
            if b"\0" in block:
                line = _first_line(path, lambda line: b"\0" in line)
                raise DataError(
                    f"{path}, line {line}: a NUL byte. This is a binary file, UTF-16 text or a damaged copy; save it as UTF-8 text."
                )
            digest.update(block)
            has_quotes = has_quotes or b'"' in block
            block = _decoded_or_refused(path, decoder, block) and file.read(_BLOCK_BYTES)
        _decoded_or_refused(path, decoder, b"")
    return digest.hexdigest(), has_quotes


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, and a CSV file is needed. Name the file inside it.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"There is no file {path}. Check the path; in a container, check that its folder is mounted.") from None
    except PermissionError:
        raise AccessError(f"{path} may not be read by this user (id {os.getuid()}). Check the file's permissions.") from None


def _decoded_or_refused(path: Path, decoder: codecs.IncrementalDecoder, block: bytes) -> bytes:
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        line = _first_line(path, lambda line: line.decode(errors="replace").encode() != line)
        raise DataError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}). If the file came from "
            "Windows or Excel, convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from None
    return block


def _first_line(path: Path, test: Callable[[bytes], bool]) -> int:
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if test(line))


def quotes_enclose(path: Path, separator: str, *, columns: int, image: int) -> bool:
    """Whether quotes enclose fields in this file; read_manifest says by which rule."""
    mark = re.escape(separator)
    opening, enclosed = re.compile(f'(?:^|{mark})"'), re.compile(f'(?:^|{mark})"(?:[^"]|"")*"(?={mark}|[\r\n]|$)')
    opened = closed = 0
    torn = pending = False
    shapes: set[Shape] = set()
    shapes_in_quotes: set[Shape] = set()
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, line in enumerate(line for line in file if not line.isspace()):
            if line.count(separator) != columns - 1:
                torn = True
            elif number:
                (shapes_in_quotes if pending else shapes).add(_shape(line.split(separator)[image].strip('"\r\n')))
            if '"' in line:
                here, whole = len(opening.findall(line)), len(enclosed.findall(line))
                pending = here > whole
                opened, closed = opened + here, closed + whole
    return opened > 0 and (torn or 2 * closed > opened or not shapes_in_quotes <= shapes)


def rows(path: Path, *, separator: str, columns: int, image: int, quoted: bool) -> Iterator[list[str]]:
    """The rows, that of the column names first, each with as many fields as there are columns. Raises: DataError."""
    line = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
        try:
            for row in reader:
                first, line = line + 1, reader.line_num
                if len(row) == columns and line == first and row[image]:
                    yield row
                elif len(row) > 1 or (row and row[0].strip()):
                    _check_row(path, row, line=first, separator=separator, columns=columns, image=image)
                    yield row
        except csv.Error as error:
            what = "a field of more than 131072 characters" if "limit" in str(error) else str(error)
            raise DataError(
                f"{path}, line {line + 1}: {what} (noticed in line {reader.line_num}). A quote that opens a field must be closed, "
                'be followed by the separator or the end of the line, and be doubled inside ("5"" screen"). Mend it, or write the '
                "file without quotes."
            ) from None


def _check_row(path: Path, row: list[str], *, line: int, separator: str, columns: int, image: int) -> None:
    if len(row) != columns:
        raise DataError(
            f"{path}, line {line}: {len(row)} fields where the first line has {columns} (separator {separator!r}): "
            f"{_shown(separator.join(row))}. Complete or remove it; a field that holds the separator must stand in quotes."
        )
    if not row[image]:
        raise DataError(f"{path}, line {line}: no image key. Complete or remove the line.")
    if swallowed := _line_like_a_row(row, separator, image=image):
        raise DataError(
            f"{path}, line {line}: a quote that opens here holds several lines together, and one of them looks like a row: "
            f"{_shown(swallowed)}. Close the quote, or double it inside a quoted field, or remove it."
        )


def _line_like_a_row(row: list[str], separator: str, *, image: int) -> str:
    """A line inside a quoted field whose image cell has the shape of this row's key; "" if there is none."""
    for position, cell in enumerate(row):
        for number, line in enumerate(cell.splitlines() if "\n" in cell or "\r" in cell else ()):
            cells, place = line.split(separator), image - (position if number == 0 else 0)
            if len(cells) > 1 and (number or place > 0) and 0 <= place < len(cells) and _shape(cells[place]) == _shape(row[image]):
                return line
    return ""


def _shape(key: str) -> Shape:
    return os.path.splitext(key)[1].lower(), "/" in key, any(map(str.isdigit, key)), " " in key.strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "…")
