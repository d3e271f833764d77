"""A run's folder or bucket prefix: who may write, which checkpoints exist, and which of them to go on from.

The protocol, in the order that makes a kill harmless at any point:

    1. config.json, then attempts/NNNNNN.json: created only where absent, so every start has a number of its own.
    2. data/<step>-<attempt>-<uuid>/: the objects of one checkpoint, under keys that are never used again.
    3. The list of claims is read again: a higher one means that this attempt has been replaced, and must stop.
    4. commits/<attempt>-<step>.json: created only where absent. From here on the checkpoint exists.
    5. Old checkpoints go in the opposite order: the commit, then its data.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.checkpoint.commit import (
    FORMAT,
    Commit,
    FileRecord,
    Rejection,
    Restored,
    claims,
    commit_entries,
    encode,
    hash_of,
    may_be_committed,
    read,
    read_attempts,
    read_commit,
    read_history,
    readable_commits,
)
from job.checkpoint.retention import abort_uploads, check_is_run, prune, remove_run
from job.checkpoint.transfer import COMPLETE, fetch_folder, put_folder, receive, send
from job.errors import JobError, ResumeError, StorageError, Superseded
from job.storage import files

__all__ = ["FORMAT", "Commit", "FileRecord", "Restored", "RunStore", "abort_uploads", "check_is_run", "remove_run"]

logger = logging.getLogger(__name__)
CLAIM_TRIES = 100


class RunStore:
    """The run as one attempt sees it. Before `claim` it only reads (config, commits); afterwards it may write.

    Threads may share it. Storage failures are StorageError or AccessError.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or "/"
        self.attempt = 0
        """Our number; 0 before `claim`."""
        self.config_hash = ""
        """sha256 of config.json; empty until it is loaded or created."""
        self.check: Callable[[], None] = lambda: None
        """Called often while files move, but for `send`; what it raises ends that."""
        self._rejected: set[str] = set()
        """Commits that `restore` found damaged, perhaps in ways that sizes don't show."""

    # Config, claims and outcome

    def load_config(self) -> dict[str, Any] | None:
        """What the first attempt stored, None for a new run. Raises: ResumeError, when it can't be understood."""
        content = self._read_own("config.json")
        if content is not None:
            self.config_hash = hash_of(content)
        return content

    def create_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Stores the config of a new run. Returns: the run's config, another's if it was faster: compare it."""
        files.create_bytes(self._at("config.json"), encode(config))
        stored = self.load_config()
        if stored is None:
            raise StorageError(f"{files.shown(self._at('config.json'))} was written and is gone. Is someone removing the run?")
        return stored

    def claim(self, info: Mapping[str, Any]) -> int:
        """Takes the next attempt number; every lower one is superseded. Args: info: what helps a person to find this process."""
        for _ in range(CLAIM_TRIES):
            number = max(claims(self.uri), default=0) + 1
            content = {"attempt": number, "token": uuid.uuid4().hex, **info}
            if files.create_bytes(self._at("attempts", f"{number:06}.json"), encode(content)):
                self.attempt = number
                return number
        raise StorageError(f"No attempt number of {files.shown(self.uri)} could be had in {CLAIM_TRIES} tries. Do others start it?")

    def check_not_superseded(self) -> None:
        """Raises: Superseded, when a newer attempt has claimed the run."""
        highest = max(claims(self.uri), default=0)
        if highest > self.attempt > 0:
            raise Superseded(
                f"Attempt {highest} has claimed the run {files.shown(self.uri)} while attempt {self.attempt} was still at work. "
                "This one stops and commits nothing more; the newer one's file in attempts/ says where it runs."
            )

    def end_attempt(self, info: Mapping[str, Any]) -> None:
        """Notes how this attempt ended (exit code, reason)."""
        files.write_bytes(self._own("end.json"), encode({"attempt": self.attempt, **info}))

    def attempts(self) -> list[dict[str, Any]]:
        return read_attempts(self.uri)

    def idle_attempts(self) -> int:
        """How many of the latest claims, our own included, have no commit."""
        busy = max((attempt for attempt, _, _ in commit_entries(self.uri)), default=0)
        return sum(number > busy for number in claims(self.uri))

    def result(self) -> dict[str, Any] | None:
        """The result of a complete run, else None. Raises: ResumeError, when it can't be understood."""
        return self._read_own("result.json")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Marks the run as complete. Raises: Superseded."""
        self.check_not_superseded()
        files.write_bytes(self._at("result.json"), encode(result))

    # Checkpoints

    def commits(self) -> list[Commit]:
        """The readable commits, newest (attempt, step) first; their data is not looked at."""
        return readable_commits(self.uri)

    def save(self, step: int, sources: Mapping[str, Path], *, info: Mapping[str, Any]) -> Commit:
        data, stored = self.send(step, sources)
        return self.commit(step, data=data, stored=stored, info=info)

    def send(
        self,
        step: int,
        sources: Mapping[str, Path],
        *,
        data: str = "",
        check: Callable[[], None] = lambda: None,
        sent: Callable[[int], None] = lambda _bytes: None,
    ) -> tuple[str, dict[str, FileRecord]]:
        """Puts the files of a checkpoint into the run, where they count for nothing yet; of a failure nothing is left.

        Args: sources: name -> local file. They are used up: moved, where the run is on the same disk.
            data: their folder in data/, if other ranks put theirs there too; empty: a new one. Others: see files.upload.
        Returns: their folder in data/, and name -> record. Raises: Superseded.
        """
        place = data or self.new_data(step)
        try:
            return place, send(self._at("data", place), sources, move=True, check=check, sent=sent)
        except Exception as error:
            if not data:
                self._discard(place)
            if isinstance(error, JobError):
                self.check_not_superseded()  # a newer attempt collects our files under our hands: then that is the news
            raise

    def workspace(self, step: int, scratch: Path) -> Path:
        """A new local folder to prepare the files of a checkpoint in: on the run's own disk where that is local, so that
        `save` moves them instead of copying. A later attempt collects it if this one is killed."""
        parent = files.local_path(self._at("data")) if files.is_local(self.uri) else scratch
        folder = parent / self.new_data(step)
        with files.explained(str(folder), "creating"):
            folder.mkdir(parents=True)
        return folder

    def fetch_file(self, step: int, name: str, folder: Path) -> Path:
        """A local path of one file of the newest checkpoint of a step, its hash checked. A remote one is put in folder.

        Raises: ResumeError, when no commit of that step has a sound one.
        """
        for commit in self.commits():
            if commit.step == step:
                with contextlib.suppress(Rejection):
                    record = {name: commit.files[name]}
                    return receive(self._at("data", commit.data), record, folder / commit.data, check=self.check) / name
        raise ResumeError(f"{name} of step {step} in {files.shown(self.uri)} is missing or damaged, and no other commit has it.")

    def new_data(self, step: int) -> str:
        return f"s{step:012}-a{self._claimed():06}-{uuid.uuid4().hex}"

    def commit(self, step: int, *, data: str, stored: Mapping[str, FileRecord], info: Mapping[str, Any]) -> Commit:
        """Makes what was sent a checkpoint. After a failure it may be repeated: perhaps only the reply was lost.
        Raises: Superseded, and nothing is left of it."""
        commit = Commit(self.attempt, step, data, dict(stored), self.config_hash, dict(info))
        try:
            self.check_not_superseded()
            if files.create_bytes(self._at("commits", commit.name), encode(asdict(commit))):
                return commit
            raise Superseded(
                f"{commit.name} in {files.shown(self.uri)} is there already: another process also believes to be attempt "
                f"{self.attempt}. This process stops, and the other's checkpoint stays."
            )
        except Superseded:
            if not may_be_committed(self.uri, commit):
                self._discard(data)  # the newer attempt has perhaps collected leftovers for the last time
            raise

    def restore(self, folder: Path, *, only: str = "") -> Restored | None:
        """The newest checkpoint of which every file has the right size and hash; None when there is no commit.

        Args: folder: local, for the files of a remote run. only: the name of the one commit to look at; empty: all.
        Raises:
            ResumeError: there are commits, and none can be used.
            StorageError: a read failed; that says nothing about the checkpoint, so no older one is taken instead.
        """
        rejected: dict[str, str] = {}
        for name in [name for _, _, name in commit_entries(self.uri) if only in ("", name)]:
            try:
                commit = read_commit(self._at("commits", name))
                if self.config_hash and commit.config_hash != self.config_hash:
                    raise Rejection("it was made under another config.json")
                place = receive(self._at("data", commit.data), commit.files, folder / name.removesuffix(".json"), check=self.check)
            except Rejection as reason:
                rejected[name] = str(reason)
                files.remove_tree(str(folder / name.removesuffix(".json")))
                logger.warning("checkpoint rejected", extra={"commit": name, "reason": str(reason)})
                continue
            self._rejected = set(rejected)
            return Restored(commit, place, rejected)
        if rejected:
            found = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
            raise ResumeError(
                f"None of the {len(rejected)} checkpoints in {files.shown(self.uri)} can be used: {found}. Restore the damaged "
                "objects (a bucket with versions keeps them), or start a new run at another --run."
            )
        return None

    def prune(self, keep: int, *, keep_every: int, best_step: int | None) -> list[str]:
        """Removes what is no longer needed, and what killed attempts left behind.

        Kept: the newest `keep` checkpoints whose files have the right sizes, that of best_step, those at multiples of
        keep_every (0: none), commits that can't be read, and everything while no checkpoint is whole.
        Returns: names of the removed commits. Raises: Superseded.
        """
        self.check_not_superseded()
        return prune(
            self.uri, attempt=self._claimed(), damaged=self._rejected, keep=keep, keep_every=keep_every, best_step=best_step
        )

    # History and folders

    def write_history(self, lines: bytes) -> None:
        """Replaces this attempt's history. Args: lines: one JSON object per line, all of them."""
        files.write_bytes(self._own("history.jsonl"), lines)

    def read_history(self) -> list[dict[str, Any]]:
        return read_history(self.uri)

    def has_folder(self, name: str) -> bool:
        """Whether a folder (base, export/final) is there and complete."""
        return self._read_own(f"{name}/{COMPLETE}") is not None

    def put_folder(self, name: str, local_folder: Path) -> None:
        """Stores a folder so that it counts as there only when it is complete. Raises: Superseded."""
        self.check_not_superseded()
        put_folder(self._at(name), local_folder, before_finishing=self.check_not_superseded, check=self.check)

    def fetch_folder(self, name: str, local: Path) -> Path | None:
        """The local place of a stored folder, all hashes checked: `local`, or where it is if the run is local.

        Returns: None when it was never completed. Raises: ResumeError, when a file is missing or damaged.
        """
        try:
            return fetch_folder(self._at(name), local, check=self.check)
        except Rejection as reason:
            raise self._unusable(name, reason) from None

    # Names and reads

    def _at(self, *parts: str) -> str:
        return files.join(self.uri, *parts)

    def _own(self, suffix: str) -> str:
        return self._at("attempts", f"{self._claimed():06}-{suffix}")

    def _claimed(self) -> int:
        if not self.attempt:
            raise AssertionError("claim an attempt before writing")
        return self.attempt

    def _read_own(self, name: str) -> dict[str, Any] | None:
        try:
            return read(self._at(name))
        except FileNotFoundError:
            return None
        except Rejection as reason:
            raise self._unusable(name, reason) from None

    def _unusable(self, name: str, reason: Rejection) -> ResumeError:
        return ResumeError(
            f"{files.shown(self._at(name))} can't be used: {reason}. Use the version of clipjob that wrote it, restore the damaged "
            "objects (a bucket with versions keeps them), or start a new run at another --run."
        )

    def _discard(self, data: str) -> None:
        """After a failed save. Its space may be what is missing; the failure itself is what the caller hears of."""
        try:
            files.remove_tree(self._at("data", data))
        except JobError as error:
            logger.warning("leftover of a failed save not removed", extra={"data": data, "reason": str(error)})
