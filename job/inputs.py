"""What goes into a job: LMDBs staged beside while CSVs are read and the model is built, then everything opened and checked.

A part of train.py by rank.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from job.attempt import scratch_root
from job.config import Config
from job.data.captions import find_tag_separator, full_lengths
from job.data.check import check_data, quick_check
from job.data.check_report import Report
from job.data.dataset import Dataset, Guard, make_dataset
from job.data.images import Images, open_images
from job.data.manifest import Manifest, read_manifest, read_manifest_like
from job.data.pixels import decode
from job.data.staging import Staging
from job.errors import DataError
from job.fields import AUTO
from job.model.build import parameter_count, tokenizer_for

log = logging.getLogger(__name__)

T = TypeVar("T")

SWITCH_SECONDS = 1e-4
"""Python's own 5 ms let a thread that computes (tokenising) slow down those that receive to some tens of MB/s."""


@contextlib.contextmanager
def staging_area(
    config: Config, *, check: Callable[[], None], progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Staging]:
    """Where remote files come to lie. Leaving it ends what is still on its way.

    Args: check: called often; what it raises ends staging. progress: see Staging.
    """
    left = threading.Event()

    def go_on() -> None:
        check()
        if left.is_set():
            raise DataError("Staging was given up, for the job has ended.")

    staging = Staging(scratch_root(config.scratch), limit_bytes=config.scratch_limit_bytes, check=go_on, progress=progress)
    try:
        yield staging
    finally:
        left.set()
        staging.close()


class Beside(Generic[T]):
    """A call on a thread of its own, a daemon: the end of the job does not wait for it. While in its context, this thread lets
    the other one work often."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="staging")
        self._thread.start()
        self._switch_seconds = sys.getswitchinterval()

    def __enter__(self) -> Self:
        sys.setswitchinterval(SWITCH_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._switch_seconds)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Waits. Raises: what the call raised."""
        self._thread.join()
        self.raise_failure()
        return self._value

    def raise_failure(self) -> None:
        """Raises: what the call raised, if it has ended."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001  raised by `result`
            self._failure = error


@dataclass(frozen=True)
class Lmdbs:
    """Local paths, one or several shards each."""

    images: list[Path]
    held_out: list[Path]
    """Empty: the held-out images are among the others."""
    guard: list[Path]
    """Empty: there is no guard."""


def stage_lmdbs(config: Config, staging: Staging) -> Lmdbs:
    """Brings the LMDBs here. Raises: DataError, StorageError."""
    held_out = staging.lmdb(config.val_lmdb, flag="--val-lmdb") if config.val_lmdb else []
    guard = staging.lmdb(config.guard_lmdb, flag="--guard-lmdb") if config.guard_lmdb else []
    return Lmdbs(staging.lmdb(config.lmdb, flag="--lmdb"), held_out, guard)


@dataclass(frozen=True)
class Tables:
    """The CSVs, read."""

    manifest: Manifest
    held_out: Manifest | None
    """Of --val-csv."""
    guard: Manifest | None
    """Of --guard-csv."""


def read_tables(config: Config, staging: Staging) -> tuple[Config, Tables]:
    """Reads the CSVs. Returns: the config with what `auto` found in them, and the CSVs. Raises: DataError."""
    manifest = read_manifest(
        staging.file(config.csv, flag="--csv"),
        separator=config.csv_separator,
        image_column=config.image_column,
        caption_column=config.caption_column,
        key_prefix=config.key_prefix,
    )
    held_out = None
    if config.val_csv:
        path = staging.file(config.val_csv, flag="--val-csv")
        held_out = read_manifest_like(
            path,
            separator=manifest.separator,
            image_column=manifest.image_column,
            caption_column=manifest.caption_column,
            key_prefix=config.key_prefix,
        )
    guard = read_manifest(staging.file(config.guard_csv, flag="--guard-csv")) if config.guard_csv else None
    separator = config.tag_separator
    if separator == AUTO and (config.caption_mode == "sample" or config.soft_targets):
        spread = np.linspace(0, len(manifest) - 1, num=min(len(manifest), 1000), dtype=np.int64)
        separator = find_tag_separator([manifest.captions[int(row)] for row in spread])
        log.info("tag separator found", extra={"separator": separator})
    found: dict[str, Any] = {
        "csv_separator": "tab" if manifest.separator == "\t" else manifest.separator,
        "image_column": manifest.image_column,
        "caption_column": manifest.caption_column,
    }
    log.info("csv", extra={**found, "rows": len(manifest)})
    return replace(config, tag_separator=separator, **found), Tables(manifest, held_out, guard)


def open_dataset(config: Config, tables: Tables, lmdbs: Lmdbs, *, check: bool = True) -> Dataset:
    """Opens the LMDBs and divides the rows.

    Args: check: run the cheap part of the preflight.
    Raises: DataError, for what would make the job fail.
    """
    images = open_images(lmdbs.images)
    val_images = open_images(lmdbs.held_out) if lmdbs.held_out else None
    manifest = tables.manifest
    dataset = make_dataset(manifest, images, val_manifest=tables.held_out, val_images=val_images, val_fraction=config.val_fraction)
    if tables.guard:
        dataset = replace(dataset, guard=Guard(tables.guard, open_images(lmdbs.guard)))
    if check:
        _check_quickly(config, dataset)
    log.info(
        "data",
        extra={
            "rows": len(manifest),
            "images": len(images),
            "train": len(dataset.train_rows),
            "held_out": len(dataset.held_out_rows),
            **({"guard": len(tables.guard)} if tables.guard else {}),
        },
    )
    return dataset


def read_data(config: Config, staging: Staging, *, check: bool = True) -> tuple[Config, Dataset]:
    """All of the above, one after the other."""
    config, tables = read_tables(config, staging)
    return config, open_dataset(config, tables, stage_lmdbs(config, staging), check=check)


def _check_quickly(config: Config, dataset: Dataset) -> None:
    """Raises: DataError."""
    batch_size, limit = config.global_batch_size, config.max_bad_samples
    for problem in quick_check(
        dataset.manifest, dataset.images, training=dataset.train_rows, global_batch_size=batch_size, max_bad_samples=limit
    ):
        log.warning(problem.text, extra={"problem": problem.name})
    if dataset.guard:
        _check_others("--guard-csv", config.guard_csv, dataset.guard.manifest, dataset.guard.images, limit=limit)
    if not config.val_csv:
        return
    held_out_keys = set(dataset.held_out.keys)
    if shared := len(held_out_keys & {key for key in dataset.manifest.keys if key in held_out_keys}):
        log.warning(
            "images of --val-csv are also in --csv, so scores will be too good",
            extra={"problem": "held-out-images-in-training", "images": shared},
        )
    _check_others("--val-csv", config.val_csv, dataset.held_out, dataset.held_out_images, limit=limit)


def _check_others(flag: str, csv: str, manifest: Manifest, images: Images, *, limit: float) -> None:
    """The same for pairs that nobody trains on. Raises: DataError."""
    rows = np.arange(len(manifest), dtype=np.int64)
    try:
        for problem in quick_check(manifest, images, training=rows, global_batch_size=1, max_bad_samples=limit):
            log.warning("%s: %s", flag, problem.text)
    except DataError as error:
        raise DataError(f"{flag} {csv}: {error}") from None


def check_job(config: Config, *, all_images: bool) -> Report:
    """The whole preflight of `clipjob check`: what is wrong with the data, and what the job will take."""
    with staging_area(config, check=lambda: None) as staging:
        return _check_data(*read_data(config, staging, check=False), all_images=all_images)


def _check_data(config: Config, dataset: Dataset, *, all_images: bool) -> Report:
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
