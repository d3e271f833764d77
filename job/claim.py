"""Who may go on with a run, and from where: its config and data are compared, it is claimed, its newest checkpoint is taken."""

import logging
import time
from pathlib import Path
from typing import Any

import job
from job.attempt import Attempt, describe_attempt
from job.checkpoint.beacon import read_beacon
from job.checkpoint.commit import read_commit, read_end
from job.checkpoint.retention import LAYOUT
from job.checkpoint.store import FORMAT, Restored, RunStore, abort_uploads
from job.config import FIELDS, Config
from job.data.dataset import Dataset
from job.errors import AccessError, JobError, ResumeError, Stopped, StorageError, TrainingError
from job.fields import flag
from job.runtime.log import always_with
from job.settings import shown
from job.storage import files

log = logging.getLogger(__name__)


def claim_run(config: Config, attempt: Attempt, dataset: Dataset) -> None:
    """Makes sure that this attempt does what the run is about, and claims the run; rank 0 does it for all.

    Raises: what compare_with_run raises.
    """
    store, world = attempt.store, attempt.world
    if world.is_first:
        compare_with_run(config, store, dataset)
        store.claim(describe_attempt(attempt))
        abort_uploads(store.uri)
    store.attempt = world.share("attempt", lambda: store.attempt)
    always_with(run=config.run, attempt=store.attempt, rank=world.rank)
    if not world.is_first:
        compare_with_run(config, store, dataset)


def compare_with_run(config: Config, store: RunStore, dataset: Dataset) -> None:
    """Makes sure that this attempt does what the run is about; a new run's config is written here.

    Raises:
        ResumeError: config or data differ from the run's; all differences are named.
        TrainingError: too many attempts ended without a checkpoint.
    """
    mine: dict[str, Any] = {"format": FORMAT, "version": job.__version__, "config": config.to_json(), "data": dataset.fingerprint()}
    stored = store.load_config() or _new_config(store, mine)
    known = stored["config"]
    wrong = [
        f"{flag(name)} was {shown(name, known.get(name, value))}, now {shown(name, value)}"
        for name, value in mine["config"].items()
        if not FIELDS[name].metadata["may_change"] and known.get(name, value) != value
    ]
    wrong += [f"{what}: {was}, now {now}" for what, was, now in _changes(stored["data"], mine["data"])]
    if wrong:
        raise ResumeError(
            f"The run {files.shown(store.uri)} can't go on, for it was started with something else: {'; '.join(wrong)}. "
            "Give it the same data and settings, or start a new run at another --run (with --init-from, once this one is complete, "
            "to keep what was learnt)."
        )
    idle = 0 if store.attempt else store.idle_attempts()  # our own claim is none
    if config.max_idle_attempts and idle >= config.max_idle_attempts:
        raise TrainingError(
            f"The last {idle} attempts at {files.shown(store.uri)} ended without a checkpoint; another would likely do the same. "
            "Look at the reasons in `clipjob inspect`, then start again with a higher --max-idle-attempts (0: no limit)."
        )


def _new_config(store: RunStore, config: dict[str, Any]) -> dict[str, Any]:
    """Stores the config of a new run, unless what is there already would be overwritten by it. Raises: ResumeError."""
    found = files.list_files(store.uri)
    taken = sorted({name.split("/")[0] for name in found} & set(LAYOUT))
    if taken and "config.json" not in found:  # there by now: another attempt was faster
        raise ResumeError(
            f"{files.shown(store.uri)} has no config.json, but holds {', '.join(taken)}, names that a run would write to. Choose "
            "another --run, or put the config.json back if this was a run."
        )
    return store.create_config(config)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = {
        "csv_sha256": "the CSV's sha256",
        "lmdb": "the LMDB",
        "val_csv_sha256": "the held-out CSV's sha256",
        "val_lmdb": "the held-out LMDB",
        "guard_csv_sha256": "the guard CSV's sha256",
        "guard_lmdb": "the guard LMDB",
    }
    found: list[tuple[str, Any, Any]] = []
    for name, words in names.items():
        was, new = before.get(name), now.get(name)
        if was != new and (was, new) not in [(a, b) for _, a, b in found]:  # held-out pairs may be a part of the same file
            found.append((words, was, new))
    return [(words, _brief(was), _brief(new)) for words, was, new in found]


def _brief(value: Any) -> Any:
    return "none" if value is None else f"{value[:12]}…" if isinstance(value, str) else value


def restore(attempt: Attempt) -> Restored | None:
    """The newest checkpoint that verifies, as rank 0 finds it; each node fetches it once. Returns: None for a new run."""
    store, world, folder = attempt.store, attempt.world, attempt.scratch / "restored"
    found = store.restore(folder) if world.is_first else None
    name = world.share("restored", lambda: found.commit.name if found else "")
    if not name:
        return None

    def fetch() -> str:
        again = found or store.restore(folder, only=name)
        if again is None:
            raise ResumeError(
                f"{name}, from which rank 0 goes on, can't be seen from here. Is {files.shown(store.uri)} shared by all nodes?"
            )
        return str(again.folder)

    place = Path(world.share_on_node("restored", fetch))
    return found or Restored(read_commit(files.join(store.uri, "commits", name)), place, {})


def count_earlier_attempts(attempt: Attempt, restored: Restored | None) -> None:
    """Adds their time and what was lost to rank 0's ledger; what can't be read of it costs nobody a run."""
    if not attempt.world.is_first:
        return
    if restored and "at" in restored.commit.info:
        attempt.metrics.restored(restored.commit.step, at=restored.commit.info["at"])
    store, step, since, committed = attempt.store, 0, 1, {}
    if restored:
        step, since, committed = restored.commit.step, restored.commit.attempt, restored.commit.info.get("ledger", {})
    try:
        beacon = read_beacon(store.uri, before=store.attempt, since=since)
        preempted = store.attempt > 1 and read_end(store.uri, store.attempt - 1).get("exit_code") == Stopped.exit_code
        attempt.ledger.go_on(committed, step=step, beacon=beacon, restarts=store.attempt - 1, preempted=preempted)
    except (StorageError, AccessError) as error:
        log.warning("what earlier attempts took could not be read", extra={"reason": str(error)})


def note_end(store: RunStore, exit_code: int, reason: str) -> None:
    """For people who look at the run later; the outcome itself does not hang on it."""
    try:
        store.end_attempt({"exit_code": exit_code, "reason": reason, "ended_at": round(time.time(), 3)})
    except JobError as error:
        log.warning("how this attempt ended could not be noted", extra={"reason": str(error)})
