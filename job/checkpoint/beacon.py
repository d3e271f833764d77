"""How far an attempt has come, told now and then between commits, for the one that follows a `kill -9`."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from job.checkpoint.commit import Rejection, claims, encode, read
from job.checkpoint.store import RunStore
from job.errors import JobError
from job.storage import files

log = logging.getLogger(__name__)

EVERY_SECONDS = 10.0


def read_beacon(run: str, *, before: int, since: int) -> dict[str, Any] | None:
    """The newest beacon of attempts since … before-1; None, if none of them wrote one.

    Raises: StorageError, AccessError.
    """
    for number in sorted((number for number in claims(run) if since <= number < before), reverse=True):
        try:
            found = read(files.join(run, "attempts", f"{number:06}-beacon.json"))
            return found if isinstance(found["step"], int) and isinstance(found["ledger"]["seconds"], dict) else None
        except (FileNotFoundError, Rejection, KeyError, TypeError):  # it is bookkeeping: torn is as good as absent
            continue
    return None


class Beacon:
    """Writes one every EVERY_SECONDS until it is closed, the first at once. A store that fails is not waited for.

    Args:
        content: "step", "ledger" and what else a reader wants to know; called on another thread.
        on_written: called there with what was written: from now on the next attempt knows it.
    """

    def __init__(
        self, store: RunStore, content: Callable[[], Mapping[str, Any]], *, on_written: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._uri = files.join(store.uri, "attempts", f"{store.attempt:06}-beacon.json")
        self._attempt = store.attempt
        self._content = content
        self._on_written = on_written
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="beacon", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while True:
            try:
                content = {"attempt": self._attempt, "at": time.time(), **self._content()}
                files.write_bytes(self._uri, encode(content))
                self._on_written(content)
            except JobError as error:
                log.debug("no beacon could be written", extra={"reason": str(error)})
            if self._closed.wait(EVERY_SECONDS):
                return
