"""What an attempt does and builds before its first step, in the order in which train.py calls it. A part of train.py by rank."""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch

import job
from job.checkpoint.retention import LAYOUT
from job.checkpoint.state import TrainState
from job.checkpoint.store import FORMAT, RunStore
from job.config import FIELDS, Config, flag
from job.data.batches import Batch, Samples, load_batches
from job.data.captions import Captions, Texts
from job.data.dataset import Dataset
from job.data.order import batches_from, rows_at
from job.data.staging import Staging
from job.errors import ConfigError, DataError, ResumeError, StorageError, TrainingError
from job.evaluate.retrieval import evaluate_retrieval, group_pairs
from job.model.build import ClipModel, prepare_towers, write_base
from job.model.optimizer import make_optimizer
from job.model.towers import lengths_of
from job.runtime.device import autocast_dtype, decode_threads
from job.runtime.stop import StopSignal
from job.storage import files

log = logging.getLogger(__name__)

LOCK = "lock"

Evaluate = Callable[[Callable[[int, int], None]], dict[str, float] | None]


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


def find_base(config: Config, store: RunStore, scratch: Path, staging: Staging) -> tuple[Path, bool]:
    """The folder with the base model, and whether it has to be put into the run yet."""
    found = store.fetch_folder("base", scratch / "base")
    if found is not None:
        return found, False
    if store.commits():
        raise ResumeError(
            f"The run {files.shown(store.uri)} has checkpoints but no complete base/, without which they can't be loaded. "
            "Restore it (a bucket with versions keeps it), or start a new run at another --run."
        )
    if not config.pretrained and not config.init_from and not config.model.endswith(".json"):
        log.warning(
            "training starts from random weights; fine-tuning wants --pretrained, such as openai or laion2b_s34b_b79k",
            extra={"model": config.model},
        )
    made = scratch / "new-base"
    if config.init_from:
        write_base(made, model=str(_fetch_export(config.init_from, scratch, check=store.check)), pretrained="", seed=config.seed)
    else:
        pretrained = config.pretrained
        if "://" in pretrained:
            pretrained = str(staging.file(pretrained, flag="--pretrained"))
        write_base(made, model=config.model, pretrained=pretrained, seed=config.seed)
    return made, True


def _fetch_export(run: str, scratch: Path, *, check: Callable[[], None]) -> Path:
    source = RunStore(run)
    source.check = check
    for name in ("export/best", "export/final"):
        folder = source.fetch_folder(name, scratch / "init")
        if folder is not None:
            return folder
    raise DataError(
        f"--init-from {files.shown(run)} has no exported model: it is not a complete run. Finish that run first, or check the path "
        "(`clipjob inspect` shows what is there)."
    )


def compare_with_run(config: Config, store: RunStore, dataset: Dataset) -> None:
    """Makes sure that this attempt does what the run is about; a new run's config is written here.

    Raises:
        ResumeError: config or data differ from the run's; all differences are named.
        TrainingError: too many attempts ended without a checkpoint.
    """
    mine: dict[str, Any] = {"format": FORMAT, "version": job.__version__, "config": config.to_json(), "data": dataset.fingerprint()}
    stored = store.load_config() or _new_config(store, mine)
    wrong = [
        f"{flag(name)} was {stored['config'][name]!r}, now {value!r}"
        for name, value in mine["config"].items()
        if not FIELDS[name].metadata["may_change"] and stored["config"].get(name, value) != value
    ]
    wrong += [f"{what}: {was}, now {now}" for what, was, now in _changes(stored["data"], mine["data"])]
    if wrong:
        raise ResumeError(
            f"The run {files.shown(store.uri)} can't go on, for it was started with something else: {'; '.join(wrong)}. "
            "Give it the same data and settings, or start a new run at another --run (with --init-from, once this one is complete, "
            "to keep what was learnt)."
        )
    idle = store.idle_attempts()
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
    }
    found: list[tuple[str, Any, Any]] = []
    for name, words in names.items():
        was, new = before.get(name), now[name]
        if was != new and (was, new) not in [(a, b) for _, a, b in found]:  # held-out pairs may be a part of the same file
            found.append((words, was, new))
    return [(words, _brief(was), _brief(new)) for words, was, new in found]


def _brief(value: Any) -> Any:
    return f"{value[:12]}…" if isinstance(value, str) else value


def describe_attempt(device: torch.device, *, metrics_port: int) -> dict[str, Any]:
    """Where and with what an attempt runs, for its claim."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "metrics_port": metrics_port,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {
            "clipjob": job.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
    }


def new_state(config: Config, clip: ClipModel) -> TrainState:
    """The state at step 0; the weights are clip's."""
    prepare_towers(
        clip.module, lock_image=config.lock_image, lock_text=config.lock_text, grad_checkpointing=config.grad_checkpointing
    )
    optimizer = make_optimizer(
        clip.module, lr=config.lr, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2), eps=config.eps
    )
    scaler = torch.amp.GradScaler(clip.shift.device.type) if config.precision == "fp16" else None
    return TrainState(clip.module, optimizer, scaler)


def training_batches(
    config: Config, dataset: Dataset, captions: Captions, clip: ClipModel, stop: StopSignal, *, start: int, steps: int
) -> Generator[Batch]:
    """The batches of steps start … steps-1, or fewer if a signal comes."""
    samples = (
        Samples(positions, dataset.train_rows[rows_at(positions, row_count=len(dataset.train_rows), seed=config.seed)])
        for positions in itertools.islice(batches_from(start, global_batch_size=config.global_batch_size), steps - start)
    )
    return load_batches(
        samples,
        keys=dataset.manifest.keys,
        images=dataset.images,
        captions=captions,
        view=clip.view,
        threads=decode_threads(config.threads),
        seed=config.seed,
        crop_scale=config.crop_scale,
        pin_memory=clip.shift.device.type == "cuda",
        stopping=lambda: stop.requested,
    )


def captions_of(config: Config, texts: Texts, clip: ClipModel) -> Captions:
    return Captions(
        texts,
        clip.tokenizer,
        lengths_of=lengths_of(clip.module),
        mode=config.caption_mode,
        tag_separator=config.tag_separator,
        template=config.template,
        seed=config.seed,
    )


def evaluation(config: Config, dataset: Dataset, captions: Captions, clip: ClipModel, stop: StopSignal) -> Evaluate | None:
    """Evaluates the model as it is when called: metrics, or None when a signal came first. None: nothing is held out."""
    if not len(dataset.held_out_rows):
        return None
    if dataset.held_out is not dataset.manifest:
        captions = captions_of(config, dataset.held_out.captions, clip)
    rows = [int(row) for row in dataset.held_out_rows]
    held_out = group_pairs((dataset.held_out.keys[row], captions.choices(row)) for row in rows)

    def evaluate(progress: Callable[[int, int], None]) -> dict[str, float] | None:
        return evaluate_retrieval(
            clip,
            held_out,
            images=dataset.held_out_images,
            captions=captions,
            batch_size=config.global_batch_size,
            threads=decode_threads(config.threads),
            autocast=autocast_dtype(config.precision),
            stopping=lambda: stop.requested,
            progress=progress,
        )

    return evaluate
