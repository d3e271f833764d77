"""Checkpoints on their way out: sent one by one, kept on local disk while storage fails, dropped when a newer one will do."""

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable

from job.checkpoint.publish import Entry, GivenUp, Publisher
from job.errors import AccessError, StorageError

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
EXIT_PATIENCE_SECONDS = 20.0
"""Once the job has been asked to stop: the grace of a pod is 30 seconds unless it asks for more."""
EXIT_SILENCE_SECONDS = 300.0  # then nothing will arrive any more
TOLD_EVERY_SECONDS = 60.0
POLL_SECONDS = 0.2


class Outbox:
    """Sends entries in the order of their steps, on a thread of its own. Close it.

    An entry that waits goes when a newer one will do as well, so local disk holds one that is being sent, the newest, the best,
    and those that are always needed. While storage fails nobody waits for it, until patience is over.

    Args:
        keep, keep_every: see RunStore.prune.
        patience_seconds: how long storage may fail before that ends the job.
        stopping: whether the job has been asked to stop; then patience is short.
        on_sent: called on the outbox's thread with each entry that is durable and the seconds that sending it took.
        on_lost: called there with what storage failed with when an entry's files are used up, so that it can't be sent again.
        on_failed: called there after each try that failed.
        on_waiting: called on any thread with the number of entries that wait because storage fails.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        keep: int,
        keep_every: int,
        patience_seconds: float,
        stopping: Callable[[], bool],
        on_sent: Callable[[Entry, float], None],
        on_lost: Callable[[StorageError], None],
        on_failed: Callable[[], None],
        on_waiting: Callable[[int], None],
    ) -> None:
        self._publisher = publisher
        self._keep = keep
        self._keep_every = keep_every
        self._patience_seconds = patience_seconds
        self._stopping = stopping
        self._on_sent = on_sent
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._on_waiting = on_waiting
        self._changed = threading.Condition()
        self._entries: list[Entry] = []
        self._sending: Entry | None = None
        self._failing_since = 0.0
        """0 while storage works."""
        self._moved_at = 0.0
        """When bytes last arrived."""
        self._told_at = -TOLD_EVERY_SECONDS
        self._reason = ""
        self._failure: BaseException | None = None
        self._ended = False
        """Nothing is sent any more."""
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Something is being sent, or about to be. Not while the next try waits for storage to come back."""
        with self._changed:
            return bool(self._entries) and (self._sending is not None or not self._failing_since)

    def put(self, entry: Entry) -> None:
        """Takes over an entry and its folder; those that it makes pointless go."""
        with self._changed:
            for older in list(self._entries):
                replaced = not older.needed or (older.needed == entry.needed == "best")
                if replaced and older is not self._sending and older.stored is None:
                    self._drop(older)
            self._entries.append(entry)
            if self._ended:
                self._drop(entry)
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._tell()

    def give_up_older(self, step: int) -> None:
        """At a signal: what a checkpoint of this step will replace is given up, unless half of it has arrived."""
        with self._changed:
            for entry in list(self._entries):
                if not (entry.needed or entry.step >= step or entry.is_nearly_there):
                    self._drop(entry)
            self._changed.notify_all()
        self._tell()

    def raise_failure(self) -> None:
        """Raises: what ended the outbox, if anything did and nobody was told yet."""
        with self._changed:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure

    def wait(self, *, leaving: bool = False, waiting: Callable[[], None] = lambda: None) -> None:
        """Returns when everything is durable.

        Args: leaving: the job ends for another reason: be as patient as after a signal. waiting: called at every look.
        Raises: what ended the outbox; StorageError when patience is over.
        """
        hurried_since = 0.0
        with self._changed:
            while True:
                self.raise_failure()
                if not self._entries:
                    return
                self._changed.wait(POLL_SECONDS)
                waiting()
                now = time.monotonic()
                hurried_since = hurried_since or (now if leaving or self._stopping() else 0.0)
                quiet_seconds = now - max(self._moved_at, hurried_since)
                hopeless = self._failing_since and quiet_seconds > EXIT_PATIENCE_SECONDS
                if hurried_since and self._entries and (hopeless or quiet_seconds > EXIT_SILENCE_SECONDS):
                    self._end(self._out_of_patience())

    def close(self) -> None:
        """Gives up what was not sent; nothing of it is left here."""
        self._end(None)
        if self._thread is not None:
            self._thread.join(POLL_SECONDS)

    def _drop(self, entry: Entry, *, durable: bool = False) -> None:
        """The thread that is sending it notices at the next block. Call it with the lock held."""
        entry.given_up = True
        self._entries.remove(entry)
        if not durable:
            self._publisher.give_up(entry.number)
        shutil.rmtree(entry.folder, ignore_errors=True)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while (entry := self._next()) is not None:
            try:
                self._send(entry)
                pause = FIRST_PAUSE_SECONDS
            except GivenUp:
                with self._changed:
                    if entry in self._entries:
                        self._drop(entry)
            except BaseException as error:  # noqa: BLE001  raised by the training thread
                if entry.given_up:
                    continue
                if not isinstance(error, StorageError | AccessError):
                    self._end(error)
                    return
                # We had access when the attempt was claimed: a refusal is a token that ran out, and may end as well.
                self._note_failure(StorageError(str(error)), entry)
                if time.monotonic() - self._failing_since > self._patience_seconds:
                    self._end(self._out_of_patience())
                    return
                self._pause(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _next(self) -> Entry | None:
        with self._changed:
            while not self._entries and not self._ended:
                self._changed.wait()
            # The newest first when time may be short: older ones of an outage matter less than what the signal asked to save.
            newest = self._stopping() and not self._publisher.in_order
            self._sending = None if self._ended else self._entries[-1 if newest else 0]
            return self._sending

    def _send(self, entry: Entry) -> None:
        """Raises: see Publisher.publish."""
        began, entry.sent = time.monotonic(), 0

        def check() -> None:
            if entry.given_up:
                raise GivenUp

        def sent(size: int) -> None:
            entry.sent += size
            if size:
                self._moved_at = time.monotonic()

        check()
        self._publisher.publish(entry, check=check, sent=sent)
        if self._failing_since:
            log.info("storage works again", extra={"step": entry.step})
            self._failing_since = 0.0
        self._on_sent(entry, time.monotonic() - began)
        with self._changed:
            self._sending = None
            if entry in self._entries:  # else it was given up too late, and is durable all the same
                self._drop(entry, durable=True)
            self._changed.notify_all()
        self._tell()
        if not self._stopping():  # the next attempt will: nothing must stand between a durable state and the exit
            self._prune(entry.best_step)

    def _note_failure(self, failure: StorageError, entry: Entry) -> None:
        now = time.monotonic()
        with self._changed:
            self._sending = None
            self._failing_since = self._failing_since or now
            self._reason = str(failure)
            lost = entry.stored is None and not all(path.exists() for path in entry.files.values())
            if lost and entry in self._entries:
                self._on_lost(failure)  # first: who waits looks for it when the outbox is empty
                self._drop(entry)
            waiting, told = len(self._entries), now - self._told_at >= TOLD_EVERY_SECONDS
            if told:
                self._told_at = now
        self._on_failed()
        if told:
            log.warning(
                "storage is failing, checkpoints wait locally",
                extra={"waiting": waiting, "waiting_seconds": round(now - self._failing_since, 1), "reason": str(failure)},
            )
        self._tell()

    def _tell(self) -> None:
        self._on_waiting(len(self._entries) if self._failing_since else 0)

    def _pause(self, seconds: float) -> None:
        """Shorter when the job is stopping, for then every second counts."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._ended and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, POLL_SECONDS))
                if self._stopping():
                    deadline = min(deadline, time.monotonic() + FIRST_PAUSE_SECONDS)

    def _end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._ended = True
            self._failure = self._failure or failure
            for entry in list(self._entries):
                self._drop(entry)
            self._changed.notify_all()
        self._tell()

    def _out_of_patience(self) -> StorageError:
        with self._changed:
            steps = ", ".join(str(entry.step) for entry in self._entries)
            seconds = time.monotonic() - (self._failing_since or min(entry.began for entry in self._entries))
        reason = self._reason or "Nothing arrived."
        return StorageError(
            f"Storage has failed for {seconds:.0f} seconds, and checkpoints of step {steps} could not be sent. {reason} "
            "A restart goes on from the last one that was committed."
        )

    def _prune(self, best_step: int) -> None:
        try:
            self._publisher.prune(keep=self._keep, keep_every=self._keep_every, best_step=best_step)
        except (StorageError, AccessError) as error:
            log.warning("old checkpoints were not removed", extra={"reason": str(error)})  # no reason to end a job
