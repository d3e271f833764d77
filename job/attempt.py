"""One attempt at a run: its ranks, its working folder, and what all of its parts use."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

import job
from job.checkpoint.store import RunStore
from job.data.staging import Staging
from job.errors import ConfigError, StorageError
from job.runtime.ledger import Ledger, process_age_seconds
from job.runtime.metrics import Metrics
from job.runtime.peers import Peers
from job.runtime.ranks import Ranks
from job.runtime.stop import StopSignal
from job.runtime.watchdog import Watchdog
from job.runtime.world import World

LOCK = "lock"


@dataclass(frozen=True)
class Attempt:
    """What all parts of one attempt use."""

    store: RunStore
    stop: StopSignal
    world: World
    device: torch.device
    scratch: Path
    """A folder of this process."""
    staging: Staging
    metrics: Metrics
    watchdog: Watchdog
    ledger: Ledger


def pairs_at_once(world: World, *, global_batch_size: int, micro_batch: int) -> int:
    """Pairs of a rank that go through the towers at a time where nothing is learnt: no more than while something is."""
    rows = world.largest_part(global_batch_size)
    return min(rows, micro_batch) if micro_batch > 0 else rows


@contextlib.contextmanager
def joined(ranks: Ranks, *, check: Callable[[], None]) -> Iterator[World]:
    """This rank among all others, once they are here. Leaving it with an error ends the others too, with the same exit code.

    Args: check: called while waiting for them; what it raises ends that.
    Raises: PeerFailed, when another rank has failed.
    """
    world = World()
    if ranks.size > 1:
        world = World(ranks, peers=Peers(ranks, check=check))
    try:
        yield world
    except Exception as error:
        explained = world.explained(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        world.leave()


def scratch_root(scratch: str) -> Path:
    """The folder for everything local: given, or clipjob-<user id> among the system's temporary files."""
    if "://" in scratch:
        raise ConfigError(f"--scratch must be a local folder; found {scratch}.")
    return Path(scratch) if scratch else Path(tempfile.gettempdir()) / f"clipjob-{os.getuid()}"


@contextlib.contextmanager
def working_folder(scratch: str, *, run: str) -> Iterator[Path]:
    """A local folder of this process, gone afterwards; what killed processes left for the same run goes first.

    Raises: StorageError.
    """
    shared = scratch_root(scratch) / "runs" / hashlib.sha256(run.encode()).hexdigest()[:16]
    try:
        shared.mkdir(parents=True, exist_ok=True)
        for other in shared.iterdir():
            _remove_if_dead(other)
        folder = Path(tempfile.mkdtemp(dir=shared))
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it up when this process ends, however it ends
    except OSError as error:
        raise StorageError(
            f"The scratch folder {shared} can't be written ({error.strerror}). Point --scratch at a writable local folder."
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_if_dead(folder: Path) -> None:
    """Removes a working folder whose process holds its lock no more. One that is younger than a minute may be about to take it."""
    with contextlib.suppress(OSError), (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - folder.stat().st_mtime > 60:
            shutil.rmtree(folder, ignore_errors=True)


def describe_attempt(attempt: Attempt) -> dict[str, Any]:
    """Where and with what an attempt runs, for its claim."""
    device = attempt.device
    return {
        "started_at": round(time.time() - process_age_seconds(), 3),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": attempt.world.size,
        "metrics_port": attempt.metrics.port,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    return {
        "clipjob": job.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "cuda": torch.version.cuda or "",
    }
