"""The ranks of a job know of each other: who is alive, what one has found for all, and why one has failed.

All of it stands in a small store (torch's TCPStore) in rank 0's process. Every rank writes a heartbeat each second and reads the
others'. A rank that ends for a reason leaves it there first, and the others end with the same exit code; one that just falls
silent is lost, and they end with 70. A thread sees to that even where the training thread hangs in a transfer that will never end.
"""

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from job.errors import PeerFailed
from job.runtime.ranks import Ranks

log = logging.getLogger(__name__)

MEET_SECONDS = 600.0
"""How long ranks wait for each other at the start: pods of one job may be scheduled minutes apart."""
BEAT_SECONDS = 0.5
SILENCE_SECONDS = 30.0
"""A rank that is not heard of for so long is lost."""
LEAVE_SECONDS = 15.0
"""How long the training thread may take to notice a failure by itself; then the process ends without it."""
LINGER_SECONDS = 3.0
"""How long rank 0 keeps the store for others to read why it ends, and how long the others look for a reason there."""
POLL_SECONDS = 0.05

_ADVICE = "Start the job again: it goes on from the last checkpoint."


class Peers:
    """Rank 0's store, as one rank sees it, and the thread that watches it. All ranks must make one. Close it.

    Args:
        check: called while waiting for others; what it raises ends that.
    Raises: PeerFailed, naming the ranks that did not come in MEET_SECONDS.
    """

    def __init__(self, ranks: Ranks, *, check: Callable[[], None] = lambda: None) -> None:
        self.ranks = ranks
        self.step = 0
        """Told to the others with each heartbeat."""
        self.check = check
        self._deadline = time.monotonic() + MEET_SECONDS
        self._host = socket.gethostname()
        self._failure: PeerFailed | None = None
        self._closed = threading.Event()
        self._noticed = threading.Event()
        """The training thread is on its way out."""
        self._heard: dict[int, tuple[str, float]] = {}
        self._contact = time.monotonic()
        self.store = self._connect(ranks.rank == 0)
        self._meet()
        beating = self.connect()
        for target in (lambda: self._beat(beating), self._watch):
            threading.Thread(target=target, name="peers", daemon=True).start()

    def connect(self) -> Any:
        """A connection of its own, for one thread: calls on the same one wait for each other."""
        return self._connect(host_it=False)

    def share(self, name: str, make: Callable[[], Any], *, source: int = 0) -> Any:
        """What `make` returns on one rank, on all that ask. JSON values. Raises: PeerFailed; what make raises."""
        if self.ranks.rank == source:
            value = make()
            self.store.set(f"shared/{name}", json.dumps(value))
            return value
        return json.loads(self.wait_for(f"shared/{name}"))

    def wait_for(self, key: str, *, store: Any = None) -> str:
        """The value of a key, once it is there. Raises: PeerFailed; what check raises."""
        store = store or self.store
        while True:
            self.check()
            self.raise_failure()
            with self._explained():
                if store.check([key]):
                    return str(store.get(key).decode())
            time.sleep(POLL_SECONDS)

    def fail(self, exit_code: int, reason: str) -> None:
        """Tells the others why this rank ends. The first to tell is believed."""
        self._noticed.set()
        with contextlib.suppress(RuntimeError):
            told = json.dumps({"rank": self.ranks.rank, "exit_code": exit_code, "reason": reason})
            self.store.compare_set("failure", "", told)

    def raise_failure(self) -> None:
        """Raises: PeerFailed, if a rank has failed or is lost."""
        if self._failure is not None:
            self._noticed.set()
            raise self._failure

    def explain(self, error: BaseException) -> PeerFailed | None:
        """Which rank's end made a transfer fail with this error; None, if it is no error of a transfer. Takes seconds."""
        if not _is_of_transfer(error):
            return None
        self._noticed.set()
        deadline = time.monotonic() + LINGER_SECONDS
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        rank, heard_at = min(((rank, at) for rank, (_, at) in self._heard.items()), key=lambda item: item[1], default=(0, 0.0))
        silent = time.monotonic() - heard_at > LINGER_SECONDS - 2 * BEAT_SECONDS
        if "imed out" in str(error):
            who = f"{self._behind()} did not come to a transfer"
        else:
            who = f"Rank {rank} is gone" if silent else "The ranks lost contact"
        return self._failure or PeerFailed(
            f"{who} ({_first_line(error)}). Start the job again: it goes on from the last checkpoint."
        )

    def _behind(self) -> str:
        """The ranks whose heartbeats tell of the earliest step."""
        steps = {rank: int(beat.split()[1]) for rank, (beat, _) in self._heard.items() if beat}
        first = min(steps.values(), default=0)
        return f"Rank {', '.join(str(rank) for rank, step in steps.items() if step == first)}, at step {first},"

    def close(self) -> None:
        """Leaves. Rank 0, which keeps the store, waits a moment until the others have left: less long for one that is lost."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):
            left = self.store.add("left", 1)
            deadline = time.monotonic() + (LINGER_SECONDS if self._noticed.is_set() else SILENCE_SECONDS)
            while self.ranks.rank == 0 and left < self.ranks.size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                left = self.store.add("left", 0)

    # The start

    def _connect(self, host_it: bool) -> Any:
        where = f"{self.ranks.address}:{self.ranks.port}"
        while True:
            self.check()
            left = self._deadline - time.monotonic() if not self._heard else SILENCE_SECONDS
            try:
                return dist.TCPStore(  # type: ignore[attr-defined]
                    self.ranks.address,
                    self.ranks.port,
                    None,
                    host_it,
                    timeout=timedelta(seconds=min(5.0, max(left, 1.0))),
                    wait_for_workers=False,
                )
            except RuntimeError as error:  # not there yet, or its name is not published yet
                if host_it:
                    raise PeerFailed(
                        f"Rank 0 can't listen on port {self.ranks.port} ({_first_line(error)}). Set MASTER_PORT to a free one."
                    ) from None
                if left <= 0 or self._heard:
                    raise PeerFailed(
                        f"Rank {self.ranks.rank} can't reach rank 0 at {where} ({_first_line(error)}). Check MASTER_ADDR, "
                        "MASTER_PORT, and that node 0 runs."
                    ) from None
                time.sleep(POLL_SECONDS)

    def _meet(self) -> None:
        """Returns when all ranks are here."""
        everyone = range(self.ranks.size)
        self.store.set(f"here/{self.ranks.rank}", self._host)
        while True:
            self.check()
            missing = [rank for rank in everyone if not self.store.check([f"here/{rank}"])]
            if not missing:
                return
            if time.monotonic() > self._deadline:
                raise PeerFailed(
                    f"{self.ranks.size - len(missing)} of {self.ranks.size} ranks met in {MEET_SECONDS:.0f} seconds; missing: "
                    f"{', '.join(map(str, missing))}. Look at their logs, and whether every node was given as many ranks."
                )
            time.sleep(POLL_SECONDS)

    # Threads

    def _beat(self, store: Any) -> None:
        beats = 0
        while not self._closed.is_set():
            beats += 1
            try:
                store.set(f"alive/{self.ranks.rank}", f"{beats} {self.step}")
                for rank in range(self.ranks.size):
                    key = f"alive/{rank}"
                    beat = store.get(key).decode() if store.check([key]) else ""
                    if beat != self._heard.get(rank, (None, 0.0))[0]:
                        self._heard[rank] = beat, time.monotonic()
                told = store.get("failure").decode() if store.check(["failure"]) else ""
            except RuntimeError:  # rank 0 has left, or can't be reached: _watch counts the seconds
                time.sleep(BEAT_SECONDS)
                continue
            self._contact = time.monotonic()
            if told:
                self._take(json.loads(told))
            self._closed.wait(BEAT_SECONDS)

    def _watch(self) -> None:
        """Ends the process if the training thread does not, once a rank has failed."""
        while not self._closed.wait(BEAT_SECONDS) and self._failure is None:
            now = time.monotonic()
            silent = [rank for rank, (_, at) in list(self._heard.items()) if now - at > SILENCE_SECONDS]
            if now - self._contact > SILENCE_SECONDS:
                silent = [0]
            if silent:
                self._lose(silent[0])
        if not self._closed.is_set() and not self._noticed.wait(LEAVE_SECONDS) and self._failure is not None:
            sys.stderr.write(f"clipjob: rank {self.ranks.rank}: {self._failure}\n")
            sys.stderr.flush()
            os._exit(self._failure.exit_code)

    def _take(self, told: dict[str, Any]) -> None:
        if told["rank"] != self.ranks.rank and self._failure is None:
            self._failure = PeerFailed(f"Rank {told['rank']} has ended: {told['reason']}", told["exit_code"])

    def _lose(self, rank: int) -> None:
        host = "" if rank else f" at {self.ranks.address}:{self.ranks.port}"
        reason = f"Rank {rank}{host} has not been heard of for {SILENCE_SECONDS:.0f} seconds"
        self._failure = PeerFailed(f"{reason}: its process, its node or the network is gone. {_ADVICE}")

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except RuntimeError as error:
            explained = self.explain(error)
            if explained is None:
                raise
            raise explained from None


def _is_of_transfer(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors, NCCL and the store subclasses of DistError."""
    words = ("gloo", "NCCL", "ncclUnhandled", "Broken pipe", "Connection reset", "closed by peer", "TCPStore", "socket")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _first_line(error: BaseException) -> str:
    """Without the place in a library's source that it starts with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", line).split(". ")[0][:200].rstrip(".")
