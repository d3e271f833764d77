"""One checkpoint's way into the run: history, files, commit. Several ranks send their own files, and rank 0 commits them all."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from job.checkpoint.commit import FileRecord, records, to_json
from job.checkpoint.store import RunStore

POLL_SECONDS = 0.05


class GivenUp(Exception):
    """Ends the sending of a checkpoint that is not wanted any more, here or on another rank."""


@dataclass
class Entry:
    """The files of one checkpoint, complete on local disk; of several ranks, this one's files."""

    step: int
    number: int
    """Of this attempt's saves, the same on every rank."""
    folder: Path
    files: Mapping[str, Path]
    history: bytes
    info: dict[str, Any]
    best_step: int
    needed: str
    """best: until there is a better one; always: no other can replace it; empty: any later one does."""
    began: float = field(default_factory=time.monotonic)
    stall_seconds: float = 0.0
    size: int = 0
    """Bytes of all files."""
    sent: int = 0
    """Bytes that have arrived in this try."""
    data: str = ""
    stored: dict[str, FileRecord] | None = None
    """What `RunStore.send` returned: then only the commit is missing, and the same one may be tried again."""
    given_up: bool = False

    @property
    def is_nearly_there(self) -> bool:
        return self.stored is not None or 2 * self.sent >= self.size


class SharedValues(Protocol):
    """A store that all ranks see: torch's TCPStore."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Team:
    """What the ranks tell each other of the checkpoints that they write together.

    Args:
        values: used by one thread at a time.
        raise_failure: raises, when a rank is gone: then what is waited for will never come.
    """

    def __init__(self, values: SharedValues, *, rank: int, size: int, raise_failure: Callable[[], None]) -> None:
        self._values = values
        self._rank = rank
        self._size = size
        self._raise_failure = raise_failure

    def data_name(self, number: int, make: Callable[[], str], *, check: Callable[[], None]) -> str:
        """The folder in data/, which rank 0 names."""
        if self._rank == 0:
            self._values.set(f"save/{number}/data", make())
        return self._value(f"save/{number}/data", number, check)

    def all_files(self, number: int, mine: Mapping[str, FileRecord], *, check: Callable[[], None]) -> dict[str, FileRecord]:
        """For rank 0: the files of every rank, once all have arrived. For the others: their own, once rank 0 has committed."""
        self._values.set(f"save/{number}/files/{self._rank}", json.dumps(to_json(mine)))
        if self._rank:
            self._value(f"save/{number}/committed", number, check)
            return dict(mine)
        parts = [json.loads(self._value(f"save/{number}/files/{rank}", number, check)) for rank in range(self._size)]
        return {name: record for part in parts for name, record in records(part).items()}

    def committed(self, number: int) -> None:
        self._values.set(f"save/{number}/committed", "1")

    def give_up(self, number: int) -> None:
        """Tells the others that this rank's part will not come."""
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, which everybody notices anyway
            self._values.set(f"save/{number}/given-up", "1")

    def _value(self, key: str, number: int, check: Callable[[], None]) -> str:
        while not self._values.check([key]):
            check()
            self._raise_failure()
            if self._values.check([f"save/{number}/given-up"]):
                raise GivenUp
            time.sleep(POLL_SECONDS)
        return self._values.get(key).decode()


class Publisher:
    """Puts entries into the run. Args: team: of several ranks; None for one alone."""

    def __init__(self, store: RunStore, *, team: Team | None = None, is_first: bool = True) -> None:
        self._store = store
        self._team = team
        self.is_first = is_first
        """Whether this rank writes the history, commits and prunes."""
        self._history_step = -1
        """Of the history that was written last."""

    @property
    def in_order(self) -> bool:
        """Whether entries must be sent in the order of their numbers: ranks that choose different ones wait for each other."""
        return self._team is not None

    def publish(self, entry: Entry, *, check: Callable[[], None], sent: Callable[[int], None]) -> None:
        """Returns when the checkpoint exists. After a failure of storage it may be repeated.

        Raises: GivenUp; what storage raises; Superseded; PeerFailed.
        """
        if self.is_first and entry.step >= self._history_step:  # it holds all rows of the older ones
            self._store.write_history(entry.history)
            self._history_step = entry.step
        if entry.stored is None:
            data = self._team.data_name(entry.number, lambda: self._store.new_data(entry.step), check=check) if self._team else ""
            entry.data, entry.stored = self._store.send(entry.step, entry.files, data=data, check=check, sent=sent)
        stored = self._team.all_files(entry.number, entry.stored, check=check) if self._team else entry.stored
        if self.is_first:
            self._store.commit(entry.step, data=entry.data, stored=stored, info=entry.info)
            if self._team:
                self._team.committed(entry.number)

    def give_up(self, number: int) -> None:
        if self._team:
            self._team.give_up(number)

    def prune(self, *, keep: int, keep_every: int, best_step: int) -> None:
        if self.is_first:
            self._store.prune(keep=keep, keep_every=keep_every, best_step=best_step)
