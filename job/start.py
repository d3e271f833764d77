"""What an attempt does before its first step, in the order in which train.py calls it. A part of train.py by rank."""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

import job
from job.checkpoint.retention import LAYOUT
from job.checkpoint.store import FORMAT, RunStore
from job.config import AUTO, FIELDS, Config, flag
from job.data.captions import find_tag_separator, full_lengths
from job.data.check import check_data, quick_check
from job.data.check_report import Report
from job.data.dataset import Dataset, make_dataset
from job.data.images import open_images
from job.data.manifest import Manifest, read_manifest
from job.data.pixels import decode
from job.data.staging import stage_file, stage_lmdb
from job.errors import ConfigError, DataError, ResumeError, StorageError, TrainingError
from job.model.build import parameter_count, tokenizer_for, write_base
from job.storage import files

log = logging.getLogger(__name__)

LOCK = "lock"


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


def read_data(config: Config, *, check: bool = True) -> tuple[Config, Dataset]:
    """Opens the data. Returns: the config with what `auto` found in the CSV, and the data.

    Args: check: run the cheap part of the preflight.

    Raises: DataError, for what would make the job fail.
    """
    staged = scratch_root(config.scratch)
    manifest = read_manifest(
        stage_file(config.csv, staged, flag="--csv"),
        separator=config.csv_separator,
        image_column=config.image_column,
        caption_column=config.caption_column,
        key_prefix=config.key_prefix,
    )
    images = open_images(stage_lmdb(config.lmdb, staged, flag="--lmdb"))
    val_manifest = val_images = None
    if config.val_csv:
        val_manifest = _read_held_out(
            stage_file(config.val_csv, staged, flag="--val-csv"), like=manifest, key_prefix=config.key_prefix
        )
    if config.val_lmdb:
        val_images = open_images(stage_lmdb(config.val_lmdb, staged, flag="--val-lmdb"))
    dataset = make_dataset(manifest, images, val_manifest=val_manifest, val_images=val_images, val_fraction=config.val_fraction)
    if check:
        batch_size, limit = config.global_batch_size, config.max_bad_samples
        for problem in quick_check(
            manifest, images, training=dataset.train_rows, global_batch_size=batch_size, max_bad_samples=limit
        ):
            log.warning(problem.text, extra={"problem": problem.name})
        if val_manifest is not None:
            rows = dataset.held_out_rows
            held_out_keys = set(val_manifest.keys)
            if shared := len(held_out_keys & {key for key in manifest.keys if key in held_out_keys}):
                log.warning(
                    "images of --val-csv are also in --csv, so scores will be too good",
                    extra={"problem": "held-out-images-in-training", "images": shared},
                )
            try:
                for problem in quick_check(
                    val_manifest, dataset.held_out_images, training=rows, global_batch_size=1, max_bad_samples=limit
                ):
                    log.warning("--val-csv: %s", problem.text)
            except DataError as error:
                raise DataError(f"--val-csv {config.val_csv}: {error}") from None
    separator = config.tag_separator
    if separator == AUTO and config.caption_mode == "sample":
        spread = np.linspace(0, len(manifest) - 1, num=min(len(manifest), 1000), dtype=np.int64)
        separator = find_tag_separator([manifest.captions[int(row)] for row in spread])
        log.info("tag separator found", extra={"separator": separator})
    found: dict[str, Any] = {
        "csv_separator": "tab" if manifest.separator == "\t" else manifest.separator,
        "image_column": manifest.image_column,
        "caption_column": manifest.caption_column,
    }
    log.info(
        "data",
        extra={
            **found,
            "rows": len(manifest),
            "images": len(images),
            "train": len(dataset.train_rows),
            "held_out": len(dataset.held_out_rows),
        },
    )
    return replace(config, tag_separator=separator, **found), dataset


def _read_held_out(path: Path, *, like: Manifest, key_prefix: str) -> Manifest:
    """The CSV of held-out pairs: read as the training CSV was if its first line has the same two columns, else by itself."""
    first_line = ""
    with contextlib.suppress(OSError), path.open(encoding="utf-8-sig", errors="replace") as file:
        first_line = file.readline()  # what can't be read, read_manifest explains
    names = {name.strip(' "\r\n') for name in first_line.split(like.separator)}
    if not {like.image_column, like.caption_column} <= names:
        return read_manifest(path, key_prefix=key_prefix)
    columns = {"image_column": like.image_column, "caption_column": like.caption_column}
    return read_manifest(path, separator=like.separator, key_prefix=key_prefix, **columns)


def find_base(config: Config, store: RunStore, scratch: Path) -> tuple[Path, bool]:
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
        write_base(made, model=str(_fetch_export(config.init_from, scratch)), pretrained="", seed=config.seed)
    else:
        pretrained = config.pretrained
        if "://" in pretrained:
            pretrained = str(stage_file(pretrained, scratch_root(config.scratch), flag="--pretrained"))
        write_base(made, model=config.model, pretrained=pretrained, seed=config.seed)
    return made, True


def _fetch_export(run: str, scratch: Path) -> Path:
    source = RunStore(run)
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


def describe_attempt(device: torch.device) -> dict[str, Any]:
    """Where and with what an attempt runs, for its claim."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {
            "clipjob": job.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
    }


def check_job(config: Config, *, all_images: bool) -> Report:
    """The whole preflight of `clipjob check`: what is wrong with the data, and what the job will take."""
    config, dataset = read_data(config, check=False)
    tokenizer, context_length = tokenizer_for(config.model)
    parameters = parameter_count(config.model)
    return check_data(
        dataset.manifest,
        dataset.images,
        token_lengths=lambda texts: full_lengths(tokenizer, texts),
        decode=decode,
        context_length=context_length,
        global_batch_size=config.global_batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        val_fraction=0.0 if config.val_csv else config.val_fraction,
        max_bad_samples=config.max_bad_samples,
        weight_bytes=4 * parameters,
        optimizer_bytes=8 * parameters,
        keep_checkpoints=config.keep_checkpoints,
        keep_every=config.keep_every,
        run=config.run,
        threads=config.threads,
        all_images=all_images,
    )
