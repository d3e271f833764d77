"""Checkpoints on their way out: sent one by one, kept on local disk while storage fails, dropped when a newer one will do."""

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.checkpoint.store import RunStore
from job.errors import AccessError, StorageError

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
EXIT_PATIENCE_SECONDS = 20.0
"""Once the job has been asked to stop: the grace of a pod is 30 seconds unless it asks for more."""
EXIT_SILENCE_SECONDS = 90.0
"""Then nothing has arrived for so long that nothing will."""
TOLD_EVERY_SECONDS = 60.0
POLL_SECONDS = 0.2


class _GivenUp(Exception):
    """Ends an upload that is not wanted any more."""


@dataclass
class Entry:
    """The files of one checkpoint, complete on local disk."""

    step: int
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
    """Bytes that have arrived."""
    given_up: bool = False

    @property
    def is_nearly_there(self) -> bool:
        return 2 * self.sent >= self.size


class Outbox:
    """Sends entries in the order of their steps, on a thread of its own. Close it.

    While storage fails nothing is lost and nobody waits: the newest checkpoint, the best one, and those that are always needed
    stay on local disk and are tried again, until storage has failed for patience_seconds (or the job is stopping).

    Args:
        keep, keep_every: see RunStore.prune.
        stopping: whether the job has been asked to stop.
        on_sent: called on the outbox's thread with each entry that is durable and the seconds that sending it took.
        on_waiting: called there with the number of entries that wait for storage, whenever it changes.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        keep: int,
        keep_every: int,
        patience_seconds: float,
        stopping: Callable[[], bool],
        on_sent: Callable[[Entry, float], None],
        on_waiting: Callable[[int], None],
    ) -> None:
        self._store = store
        self._keep = keep
        self._keep_every = keep_every
        self._patience_seconds = patience_seconds
        self._stopping = stopping
        self._on_sent = on_sent
        self._on_waiting = on_waiting
        self._changed = threading.Condition()
        self._entries: list[Entry] = []
        self._failing_since = 0.0
        """When storage began to fail; 0 while it works."""
        self._moved_at = 0.0
        """When bytes last arrived."""
        self._told_at = 0.0
        self._reason = ""
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Something is being sent, and storage works."""
        with self._changed:
            return bool(self._entries) and not self._failing_since

    def put(self, entry: Entry) -> None:
        """Takes over an entry and its folder; those that it makes pointless go."""
        with self._changed:
            for older in list(self._entries):
                replaced = not older.needed or (older.needed == entry.needed == "best")
                if replaced and self._failing_since:
                    self._drop(older)
            self._entries.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._tell()

    def give_up_older(self, step: int) -> None:
        """At a signal: what a checkpoint of this step will replace is given up, unless half of it has arrived."""
        with self._changed:
            unwanted = [entry for entry in self._entries if not (entry.needed or entry.step >= step or entry.is_nearly_there)]
            for entry in unwanted:
                self._drop(entry)
            self._changed.notify_all()

    def raise_failure(self) -> None:
        """Raises: what ended the outbox, if anything did."""
        with self._changed:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure

    def wait(self, *, leaving: bool = False) -> None:
        """Returns when everything is durable.

        Args: leaving: the job ends for another reason: be as patient as after a signal.
        Raises: what ended the outbox; StorageError when patience is over.
        """
        hurried_since = 0.0
        while True:
            self.raise_failure()
            with self._changed:
                if not self._entries:
                    return
                self._changed.wait(POLL_SECONDS)
                now = time.monotonic()
                hurried_since = hurried_since or (now if leaving or self._stopping() else 0.0)
                hopeless = self._failing_since and now - max(self._failing_since, hurried_since) > EXIT_PATIENCE_SECONDS
                silent = now - max(self._moved_at, hurried_since) > EXIT_SILENCE_SECONDS
            if hurried_since and (hopeless or silent):
                self._end(self._out_of_patience())

    def close(self) -> None:
        """Ends the thread after what it does now; what was not sent is removed, as after a kill."""
        with self._changed:
            self._closed = True
            entries = list(self._entries)
            for entry in entries:
                entry.given_up = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(POLL_SECONDS)
        for entry in entries:
            shutil.rmtree(entry.folder, ignore_errors=True)

    def _drop(self, entry: Entry) -> None:
        entry.given_up = True
        self._entries.remove(entry)
        shutil.rmtree(entry.folder, ignore_errors=True)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while (entry := self._next()) is not None:
            try:
                self._send(entry)
                pause = FIRST_PAUSE_SECONDS
            except _GivenUp:
                continue
            except (StorageError, AccessError) as error:  # we had access when the attempt was claimed: a token that ran out
                if entry.given_up:
                    continue
                self._note_failure(str(error))
                if time.monotonic() - self._failing_since > self._patience_seconds:
                    self._end(self._out_of_patience())
                    return
                self._pause(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except BaseException as error:  # noqa: BLE001  raised by the training thread
                self._end(error)
                return

    def _next(self) -> Entry | None:
        with self._changed:
            while not self._entries and not self._closed:
                self._changed.wait()
            return None if self._closed else self._entries[0]

    def _send(self, entry: Entry) -> None:
        """Raises: _GivenUp; what storage raises; Superseded."""
        began = self._moved_at = time.monotonic()
        entry.sent = 0

        def check() -> None:
            if entry.given_up:
                raise _GivenUp

        def sent(size: int) -> None:
            entry.sent += size
            self._moved_at = time.monotonic()

        check()
        self._store.write_history(entry.history)
        self._store.save(entry.step, entry.files, info=entry.info, check=check, sent=sent)
        with self._changed:
            recovered, self._failing_since = bool(self._failing_since), 0.0
        if recovered:
            log.info("storage works again", extra={"step": entry.step})
        self._on_sent(entry, time.monotonic() - began)
        self._prune(entry.best_step)
        shutil.rmtree(entry.folder, ignore_errors=True)
        with self._changed:
            if entry in self._entries:  # given up too late otherwise: it is durable all the same
                self._entries.remove(entry)
            self._changed.notify_all()
        self._tell()

    def _note_failure(self, reason: str) -> None:
        now = time.monotonic()
        with self._changed:
            first = not self._failing_since
            self._failing_since = self._failing_since or now
            self._reason = reason
            waiting = len(self._entries)
            told = first or now - self._told_at >= TOLD_EVERY_SECONDS
            if told:
                self._told_at = now
        if told:
            log.warning(
                "storage is failing, checkpoints wait locally",
                extra={"waiting": waiting, "waiting_seconds": round(now - self._failing_since, 1), "reason": reason},
            )
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            waiting = len(self._entries) if self._failing_since else 0
        self._on_waiting(waiting)

    def _pause(self, seconds: float) -> None:
        """Shorter when the job is stopping, for then every second counts."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._closed and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, POLL_SECONDS))
                if self._stopping():
                    deadline = min(deadline, time.monotonic() + FIRST_PAUSE_SECONDS)

    def _end(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = failure
            for entry in list(self._entries):
                self._drop(entry)
            self._changed.notify_all()

    def _out_of_patience(self) -> StorageError:
        with self._changed:
            steps = ", ".join(str(entry.step) for entry in self._entries)
            seconds = time.monotonic() - (self._failing_since or self._moved_at)
        reason = self._reason or "Nothing was refused, but nothing arrived."
        return StorageError(
            f"Storage has failed for {seconds:.0f} seconds, and checkpoints of step {steps} could not be sent. {reason} "
            "A restart goes on from the last one that was committed."
        )

    def _prune(self, best_step: int) -> None:
        """Too many checkpoints are no reason to end a job."""
        try:
            self._store.prune(keep=self._keep, keep_every=self._keep_every, best_step=best_step)
        except (StorageError, AccessError) as error:
            log.warning("old checkpoints were not removed", extra={"reason": str(error)})
