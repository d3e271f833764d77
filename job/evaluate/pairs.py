"""Images and texts to score a model with: the held-out part of a run, or any CSV with its LMDB."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.data.captions import Captions, find_tag_separator, split_tags
from job.data.check import quick_check
from job.data.images import Images, open_images
from job.data.manifest import AUTO, Manifest, read_manifest, read_manifest_like, split_rows
from job.data.staging import Staging
from job.errors import ConfigError, DataError
from job.evaluate.encode import HeldOut, group_pairs
from job.model.build import ClipModel
from job.model.text import lengths_of

log = logging.getLogger(__name__)

MAX_BAD_SAMPLES = 0.01
"""Highest share of images that may be missing or broken: scores of the rest would be of other data."""


@dataclass(frozen=True)
class Reading:
    """How rows are read; names and defaults as in Config."""

    csv_separator: str = AUTO
    image_column: str = AUTO
    caption_column: str = AUTO
    key_prefix: str = ""
    caption_mode: str = "whole"
    tag_separator: str = AUTO
    template: str = "{}"


@dataclass(frozen=True)
class Pairs:
    name: str
    """Of the data, for records."""
    manifest: Manifest
    images: Images
    rows: NDArray[np.int64]
    reading: Reading
    """With a tag separator that is not auto."""

    def keys(self) -> list[str]:
        """The image of each row."""
        return [self.manifest.keys[int(row)] for row in self.rows]

    def tags(self) -> list[list[str]]:
        """Of each row."""
        return [split_tags(self.manifest.captions[int(row)], self.reading.tag_separator) for row in self.rows]


def reading_of(settings: Mapping[str, Any]) -> Reading:
    """How a run reads its CSV."""
    return Reading(**{name: settings[name] for name in Reading.__dataclass_fields__ if name in settings})


def open_pairs(csv: str, lmdb: str, *, staging: Staging, reading: Reading, flags: tuple[str, str] = ("--csv", "--lmdb")) -> Pairs:
    """All rows of a CSV. Args: csv, lmdb: path or URI. flags: what named them. Raises: DataError, StorageError."""
    manifest = read_manifest(
        staging.file(csv, flag=flags[0]),
        separator=reading.csv_separator,
        image_column=reading.image_column,
        caption_column=reading.caption_column,
        key_prefix=reading.key_prefix,
    )
    rows = np.arange(len(manifest), dtype=np.int64)
    return _opened(Path(csv).stem, manifest, rows, staging.lmdb(lmdb, flag=flags[1]), reading=reading, csv=csv)


def held_out_pairs(stored: Mapping[str, Any], *, staging: Staging) -> Pairs:
    """The held-out part of a run. Args: stored: its config.json. Raises: ConfigError, if it has none; DataError, StorageError."""
    settings, reading = stored["config"], reading_of(stored["config"])
    columns = {"image_column": reading.image_column, "caption_column": reading.caption_column, "key_prefix": reading.key_prefix}
    lmdb, flag = (settings["val_lmdb"], "--val-lmdb") if settings["val_lmdb"] else (settings["lmdb"], "--lmdb")
    if csv := settings["val_csv"]:
        manifest = read_manifest_like(staging.file(csv, flag="--val-csv"), separator=reading.csv_separator, **columns)
        rows = np.arange(len(manifest), dtype=np.int64)
    else:
        csv = settings["csv"]
        manifest = read_manifest(staging.file(csv, flag="--csv"), separator=reading.csv_separator, **columns)
        rows = split_rows(manifest.keys, settings["val_fraction"])[1]
    if not len(rows):
        raise ConfigError(
            "The run has held nothing out (--val-fraction 0), so there is nothing to score it on. Name other data: --help says how."
        )
    if manifest.sha256 != stored["data"].get("val_csv_sha256"):
        log.warning("the CSV has changed since the run was started, so scores can't be compared with its own", extra={"csv": csv})
    pairs = _opened(Path(csv).stem, manifest, rows, staging.lmdb(lmdb, flag=flag), reading=reading, csv=csv)
    return replace(pairs, name=f"{pairs.name}-held-out")


def captions_of(pairs: Pairs, clip: ClipModel) -> Captions:
    reading = pairs.reading
    return Captions(
        pairs.manifest.captions,
        clip.tokenizer,
        lengths_of=lengths_of(clip.module),
        mode=reading.caption_mode,
        tag_separator=reading.tag_separator,
        template=reading.template,
        seed=0,
    )


def held_out_of(pairs: Pairs, captions: Captions) -> HeldOut:
    """Its distinct images and texts, as training's evaluation sees them."""
    return group_pairs((pairs.manifest.keys[int(row)], captions.choices(int(row))) for row in pairs.rows)


def check_left_out(*, decoded: int, of: int) -> None:
    """Raises: DataError, when more images than MAX_BAD_SAMPLES are missing or broken."""
    if of - decoded > MAX_BAD_SAMPLES * of:
        raise DataError(
            f"{of - decoded} of {of} images are missing or can't be decoded, more than {MAX_BAD_SAMPLES:.0%}. "
            "`clipjob check --all` lists them; mend the LMDB."
        )


def _opened(name: str, manifest: Manifest, rows: NDArray[np.int64], lmdb: list[Path], *, reading: Reading, csv: str) -> Pairs:
    images = open_images(lmdb)
    try:
        for problem in quick_check(manifest, images, training=rows, global_batch_size=1, max_bad_samples=MAX_BAD_SAMPLES):
            log.warning(problem.text, extra={"problem": problem.name})
    except DataError as error:
        raise DataError(f"{csv}: {error}") from None
    if reading.tag_separator == AUTO:
        spread = rows[np.linspace(0, len(rows) - 1, num=min(len(rows), 1000), dtype=np.int64)]
        reading = replace(reading, tag_separator=find_tag_separator([manifest.captions[int(row)] for row in spread]))
    return Pairs(name, manifest, images, rows, reading)
