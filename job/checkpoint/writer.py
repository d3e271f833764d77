"""Saves checkpoints beside the training: a copy in host memory, then files, hashes and uploads on a thread of its own."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.checkpoint.state import WEIGHTS, TrainState, write_files
from job.checkpoint.store import RunStore
from job.errors import AccessError, JobError, StorageError
from job.storage.files import explained

log = logging.getLogger(__name__)


class CheckpointWriter:
    """One save at a time; a failed one raises at the next call. Close it to wait for the last.

    Args:
        scratch: local, for files on their way to a remote run.
        keep, keep_every: see RunStore.prune.
    """

    def __init__(self, store: RunStore, *, scratch: Path, keep: int, keep_every: int) -> None:
        self._store = store
        self._scratch = scratch
        self._keep = keep
        self._keep_every = keep_every
        self.on_saved: Callable[[int, float], None] = lambda _step, _seconds: None
        """Called on the writer's thread with (step, seconds) once a checkpoint is durable."""
        self.last_step = -1
        """The step last saved or restored; while `busy` it is not yet durable."""
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._failed_in_a_row = 0
        self._needed = False
        self._abandon = threading.Event()
        self._abandoned = False
        self._uploading = False
        self.stall_seconds = 0.0
        """What the last save cost the training thread."""
        self.upload_seconds = 0.0

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: TrainState, history: bytes, *, info: dict[str, Any], needed: bool = False) -> None:
        """Copies the state and returns; the rest happens beside. Waits first for a save that is still running.

        Args:
            history: lines of this attempt's history up to state.step, durable before the checkpoint is.
            info: kept in the commit.
            needed: no later save can replace this one, as that of the best step.
        """
        began = time.monotonic()
        self._join()
        self.notice_failure()
        self._needed = needed
        tensors = self._copy_to_host(state.tensors())
        copied = torch.cuda.Event() if any(tensor.is_pinned() for tensor in tensors[WEIGHTS].values()) else None
        if copied:
            copied.record()  # on the current stream of the job's device, where the copies and the next step queue up
        facts, best_step = state.facts(), state.best_step
        self._abandon.clear()
        work = (state.step, tensors, copied, facts, history, info, best_step)
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
        self._thread.start()
        self.last_step = state.step
        self.stall_seconds = time.monotonic() - began

    def abandon_or_wait(self) -> None:
        """At a signal: a save that has not begun to upload is given up, for a newer one will follow; another is awaited.
        So is one that is needed: without the best step's weights the run could never be exported."""
        if self.busy and not self._uploading and not self._needed:
            self._abandon.set()
        self._join()
        self.notice_failure()
        if self._abandoned:
            self.last_step, self._abandoned = -1, False

    def close(self) -> None:
        """Waits for a running save; what it failed with is only logged, for the job ends for another reason already."""
        try:
            self.wait()
        except JobError as error:
            log.warning("the last checkpoint failed", extra={"reason": str(error)})

    def wait(self) -> None:
        """Returns when no save is running. Raises: what the last one failed with."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def notice_failure(self) -> bool:
        """Whether a save has failed since the last call, so that the state should be saved again at once.

        Raises: what it failed with, when a second try would fail too: anything but StorageError, or a second one in a row.
        """
        if self._failure is None or self.busy:
            return False
        if not isinstance(self._failure, StorageError) or self._failed_in_a_row > 1:
            self.wait()
        log.warning("a checkpoint failed and is tried once more", extra={"reason": str(self._failure)})
        self._failure, self.last_step = None, -1
        return True

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

    def _run(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        copied: "torch.cuda.Event | None",
        facts: dict[str, Any],
        history: bytes,
        info: dict[str, Any],
        best_step: int,
    ) -> None:
        began = time.monotonic()
        folder = None
        try:
            folder = self._store.workspace(step, self._scratch)
            if copied is not None:
                copied.synchronize()
            with explained(str(folder), "writing", writing=True):
                files = write_files(folder, tensors, facts)
            self._abandoned = self._abandon.is_set()
            if self._abandoned:
                return
            self._uploading = True
            self._store.write_history(history)
            self._store.save(step, files, info=info)
            self.upload_seconds = time.monotonic() - began
            self.on_saved(step, self.upload_seconds)
            self._prune(best_step)
            self._failed_in_a_row = 0
        except AccessError as error:  # we had access when the attempt was claimed: a token that ran out, not a wrong setting
            self._failed_in_a_row += 1
            self._failure = StorageError(str(error))
        except BaseException as error:  # noqa: BLE001  handed to the training thread, which raises it
            self._failed_in_a_row += 1
            self._failure = error
        finally:
            self._uploading = False
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, best_step: int) -> None:
        """Too many checkpoints are no reason to end a job."""
        try:
            self._store.prune(keep=self._keep, keep_every=self._keep_every, best_step=best_step)
        except (StorageError, AccessError) as error:
            log.warning("old checkpoints were not removed", extra={"reason": str(error)})
