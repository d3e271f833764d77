"""Saves checkpoints beside the training: a copy in host memory, then files on local disk, then the outbox sends them."""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.checkpoint.outbox import Outbox
from job.checkpoint.publish import Entry, Publisher, Team
from job.checkpoint.state import TrainState, write_files
from job.checkpoint.store import RunStore
from job.errors import AccessError, JobError, StorageError
from job.storage.files import explained

log = logging.getLogger(__name__)


class CheckpointWriter:
    """One save at a time is copied and written to local disk; a failed one raises at the next call. Close it.

    Args:
        scratch: local, for files on their way to a remote run.
        keep, keep_every: see RunStore.prune.
        patience_seconds: how long storage may fail before that ends the job.
        stopping: whether the job has been asked to stop: then patience is short.
        on_saved: called on another thread with (step, seconds since its save began, stall_seconds=, upload_seconds=, size=) once
            a checkpoint is durable.
        on_failed: called on another thread after each try to send one that failed.
        on_waiting: called on any thread with the number of checkpoints that wait because storage fails.
        rank, ranks, team: of several ranks that save together. All must call `save` for the same steps.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        scratch: Path,
        keep: int,
        keep_every: int,
        patience_seconds: float = 7200.0,
        stopping: Callable[[], bool] = lambda: False,
        on_saved: Callable[..., None] = lambda *_args, **_figures: None,
        on_failed: Callable[[], None] = lambda: None,
        on_waiting: Callable[[int], None] = lambda _waiting: None,
        rank: int = 0,
        ranks: int = 1,
        team: Team | None = None,
    ) -> None:
        self._store = store
        self._rank, self._ranks = rank, ranks
        self._saves = 0
        self._publisher = Publisher(store, team=team, is_first=rank == 0)
        self._scratch = scratch
        self._on_saved = on_saved
        self._outbox = Outbox(
            self._publisher,
            keep=keep,
            keep_every=keep_every,
            patience_seconds=patience_seconds,
            stopping=stopping,
            on_sent=self._sent,
            on_lost=self._failed,
            on_failed=on_failed,
            on_waiting=on_waiting,
        )
        self.last_step = -1
        """The step last saved or restored; it need not be durable yet."""
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._failed_in_a_row = 0
        self._abandon = threading.Event()
        self.stall_seconds = 0.0
        """What the last save cost the training thread."""
        self.upload_seconds = 0.0
        """What the last one that is durable took on its way."""

    @property
    def busy(self) -> bool:
        """A save is running, and storage works. While it fails, a newer save may take the place of one that waits."""
        return (self._thread is not None and self._thread.is_alive()) or self._outbox.busy

    def save(self, state: TrainState, history: bytes, *, info: dict[str, Any], needed: str = "") -> None:
        """Copies the state and returns; the rest happens beside. Waits only for files of the save before to be written.

        Args:
            history: lines of this attempt's history up to state.step, durable before the checkpoint is.
            info: kept in the commit.
            needed: "best", "always" or "": see Entry.
        """
        began = time.monotonic()
        self._join()
        self.notice_failure()
        tensors = self._copy_to_host(state.tensors(rank=self._rank, ranks=self._ranks))
        pinned = any(tensor.is_pinned() for content in tensors.values() for tensor in content.values())
        copied = torch.cuda.Event() if pinned else None
        if copied:
            copied.record()  # on the current stream of the job's device, where the copies and the next step queue up
        facts = {} if self._rank else state.facts()
        self._saves += 1
        info = {**info, "at": round(time.time(), 3)}
        entry = Entry(state.step, self._saves, Path(), {}, history, info, state.best_step, needed, began)
        self._abandon.clear()
        self.last_step = state.step
        self.stall_seconds = entry.stall_seconds = time.monotonic() - began
        self._thread = threading.Thread(target=self._write, args=(entry, tensors, copied, facts), name="checkpoint", daemon=True)
        self._thread.start()

    def make_way(self, step: int) -> None:
        """At a signal: older saves that one of this step will replace are given up, unless they are nearly durable."""
        if self.last_step != step and self._thread is not None and self._thread.is_alive():
            self._abandon.set()
        self._join()
        self._outbox.give_up_older(step)

    def close(self) -> None:
        """Waits for running saves; what they failed with is only logged, for the job ends for another reason already."""
        try:
            self._join()
            self._outbox.wait(leaving=True)
        except JobError as error:
            log.warning("the last checkpoint failed", extra={"reason": str(error)})
        finally:
            self._outbox.close()

    def wait(self, *, waiting: Callable[[], None] = lambda: None) -> None:
        """Returns when every save is durable. Raises: what one failed with; StorageError when patience is over.

        Args: waiting: called now and then meanwhile.
        """
        self._join()
        self._raise()
        self._outbox.wait(waiting=waiting)
        self._raise()

    def notice_failure(self) -> bool:
        """Whether files could not be written since the last call, so that the state should be saved again at once.

        Raises: what it failed with, when a second try would fail too: anything but StorageError, or a second one in a row; what
            ended the outbox.
        """
        self._outbox.raise_failure()
        if self._failure is None or (self._thread is not None and self._thread.is_alive()):
            return False
        if not isinstance(self._failure, StorageError) or self._failed_in_a_row > 1:
            self._raise()
        log.warning("a checkpoint failed and is tried once more", extra={"reason": str(self._failure)})
        self._failure, self.last_step = None, -1
        return True

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            with contextlib.suppress(StorageError):
                self._store.check_not_superseded()  # a newer attempt may have removed what this one was writing
            raise failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy_to_host(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Into buffers that are allocated once, pinned for a GPU: the host does not wait, and the next step queues up behind."""
        for file, content in tensors.items():
            buffers = self._buffers.setdefault(file, {})
            for name, tensor in content.items():
                if name not in buffers:
                    on_gpu = tensor.device.type == "cuda"
                    buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
                buffers[name].copy_(tensor.detach(), non_blocking=buffers[name].is_pinned())
        return {file: {name: self._buffers[file][name] for name in content} for file, content in tensors.items()}

    def _write(
        self,
        entry: Entry,
        tensors: dict[str, dict[str, Tensor]],
        copied: "torch.cuda.Event | None",
        facts: dict[str, Any],
    ) -> None:
        folder = None
        try:
            folder = entry.folder = self._store.workspace(entry.step, self._scratch)
            if copied is not None:
                copied.synchronize()
            with explained(str(folder), "writing", writing=True):
                entry.files = write_files(folder, tensors, facts)
                entry.size = sum(path.stat().st_size for path in entry.files.values())
            if not self._abandon.is_set() or entry.needed:
                self._outbox.put(entry)
                folder = None  # the outbox's now
        except BaseException as error:  # noqa: BLE001  handed to the training thread, which raises it
            self._failed(StorageError(str(error)) if isinstance(error, AccessError) else error)
        finally:
            if folder is not None:
                self._publisher.give_up(entry.number)
                shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, error: BaseException) -> None:
        self._failed_in_a_row += 1
        self._failure = error

    def _sent(self, entry: Entry, seconds: float) -> None:
        self.upload_seconds, self._failed_in_a_row = seconds, 0
        self._on_saved(
            entry.step,
            time.monotonic() - entry.began,
            stall_seconds=entry.stall_seconds,
            upload_seconds=seconds,
            size=entry.size,
        )
