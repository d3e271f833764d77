"""What a commit is: the names and the JSON of a run, and the record that makes a checkpoint exist."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from job.errors import JobError, StorageError
from job.storage import files

FORMAT = 1
"""Stands in every JSON of a run. Higher: written by a newer version, whose files this one must not guess at."""

CLAIM_NAME = re.compile(r"(?P<attempt>\d{6,})\.json")
COMMIT_NAME = re.compile(r"a(?P<attempt>\d{6,})-s(?P<step>\d{12,})\.json")
DATA_NAME = re.compile(r"s(?P<step>\d{12,})-a(?P<attempt>\d{6,})-[0-9a-f]{32}")


class Rejection(Exception):
    """Something in the run can't be used; the message says why. Never a failure of storage itself."""


@dataclass(frozen=True)
class FileRecord:
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Commit:
    """One checkpoint, as its commit file describes it."""

    attempt: int
    step: int
    data: str
    """Name of the folder in data/ that holds its objects."""
    files: dict[str, FileRecord]
    config_hash: str = ""
    """sha256 of the run's config.json."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the trainer put beside it: whether the step was evaluated, metrics, ledger. And "at": when it was taken, in seconds
    since 1970."""

    @property
    def name(self) -> str:
        return f"a{self.attempt:06}-s{self.step:012}.json"


@dataclass(frozen=True)
class Restored:
    commit: Commit
    folder: Path
    """Holds commit.files. The run's own folder where that is local: read only."""
    rejected: dict[str, str]
    """Newer commits that can't be used: name -> reason."""


def encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, **content}, indent=1) + "\n").encode()


def decode(raw: bytes) -> dict[str, Any]:
    """What `encode` was given. Raises: Rejection."""
    try:
        content = json.loads(raw)
    except ValueError:
        raise Rejection(f"not readable as JSON ({len(raw)} bytes)") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Rejection("no format version in it, so not written by clipjob")
    version = content.pop("format")
    if version > FORMAT:
        raise Rejection(f"format version {version} is newer than {FORMAT}, the newest this version of clipjob reads")
    return content


def read(uri: str) -> dict[str, Any]:
    """A JSON object of the run. Raises: FileNotFoundError, Rejection, or StorageError when two reads differ."""
    raw = files.read_bytes(uri)
    try:
        return decode(raw)
    except Rejection:
        if files.read_bytes(uri) != raw:  # a cut-off reply looks like a broken file, but not twice
            raise StorageError(
                f"Reading {files.shown(uri)} twice gave different bytes. Check the network, then start again."
            ) from None
        raise


def read_commit(uri: str) -> Commit:
    """Raises: Rejection, when it is not a commit; StorageError."""
    try:
        content = read(uri)
    except FileNotFoundError:
        raise Rejection("removed while it was being read") from None
    try:
        commit = Commit(**{**content, "files": records(content["files"])})
        numbered = isinstance(commit.attempt, int) and isinstance(commit.step, int)
        named = numbered and commit.name == uri.rsplit("/", 1)[1] and DATA_NAME.fullmatch(commit.data) is not None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Rejection("fields are missing, unknown or of the wrong type") from None
    if not named:
        raise Rejection("its content belongs to another name")
    return commit


def claims(run: str) -> list[int]:
    """The numbers of all attempts of a run, in no order."""
    matches = map(CLAIM_NAME.fullmatch, files.list_files(files.join(run, "attempts")))
    return [int(match["attempt"]) for match in matches if match]


def read_attempts(run: str) -> list[dict[str, Any]]:
    """Every claim in order, with "attempt", what it noted at the start, and "end": what it noted last, or None."""
    found = []
    for number in sorted(claims(run)):
        notes: dict[str, Any] = {}
        for suffix in (".json", "-end.json"):
            with contextlib.suppress(FileNotFoundError, Rejection):  # only people read them: torn is as good as absent
                notes[suffix] = read(files.join(run, "attempts", f"{number:06}{suffix}"))
        found.append({**notes.get(".json", {}), "attempt": number, "end": notes.get("-end.json")})
    return found


def read_end(run: str, attempt: int) -> dict[str, Any]:
    """What an attempt noted last; empty, if it could note nothing."""
    with contextlib.suppress(FileNotFoundError, Rejection):
        return read(files.join(run, "attempts", f"{attempt:06}-end.json"))
    return {}


def read_history(run: str) -> list[dict[str, Any]]:
    """The rows of all attempts, as `merge_histories` orders them."""
    histories = []
    for number in sorted(claims(run)):
        with contextlib.suppress(FileNotFoundError):
            histories.append(files.read_bytes(files.join(run, "attempts", f"{number:06}-history.jsonl")))
    return merge_histories(histories)


def commit_entries(run: str) -> list[tuple[int, int, str]]:
    """(attempt, step, name) of every commit file of a run, newest first."""
    matches = map(COMMIT_NAME.fullmatch, files.list_files(files.join(run, "commits")))
    return sorted(((int(match["attempt"]), int(match["step"]), match[0]) for match in matches if match), reverse=True)


def may_be_committed(run: str, commit: Commit) -> bool:
    """Whether an earlier try wrote this commit, whose reply was lost. True also where that can't be told."""
    try:
        return read_commit(files.join(run, "commits", commit.name)).data == commit.data
    except Rejection:
        return False
    except JobError:
        return True


def readable_commits(run: str) -> list[Commit]:
    """The commits that can be understood, newest first; their data is not looked at."""
    found = []
    for _, _, name in commit_entries(run):
        with contextlib.suppress(Rejection):
            found.append(read_commit(files.join(run, "commits", name)))
    return found


def records(content: Mapping[str, Any]) -> dict[str, FileRecord]:
    """File name -> record, from JSON. Raises: Rejection, for a name that leads outside its folder; KeyError, TypeError."""
    for name in content:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise Rejection(f"it names a file outside of its folder ({name!r})")
    return {name: FileRecord(size=int(record["size"]), sha256=str(record["sha256"])) for name, record in content.items()}


def to_json(stored: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: asdict(record) for name, record in stored.items()}


def hash_of(content: Mapping[str, Any]) -> str:
    """sha256 of JSON values, whatever their layout and order in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def merge_histories(histories: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows of all attempts, by step; rows without a step come first.

    Args: histories: JSON lines, oldest attempt first. Of rows of the same "kind" at the same "step" the newest attempt's win.
    """
    rows: list[dict[str, Any]] = []
    for raw in histories:
        new = [row for row in map(_parse_row, raw.splitlines()) if row is not None]
        repeated = {(row.get("kind"), row["step"]) for row in new if "step" in row}
        rows = [row for row in rows if (row.get("kind"), row.get("step")) not in repeated] + new
    return sorted(rows, key=lambda row: row.get("step", -1))


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill tore."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
