"""The data of a run: rows to train on, rows held out, and the images of both."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.data.images import Images
from job.data.manifest import Manifest, split_rows


@dataclass(frozen=True)
class Guard:
    """Pairs that the model must not forget."""

    manifest: Manifest
    images: Images


@dataclass(frozen=True)
class Dataset:
    manifest: Manifest
    images: Images
    train_rows: NDArray[np.int64]
    """Rows of manifest, ascending."""
    held_out: Manifest
    held_out_images: Images
    held_out_rows: NDArray[np.int64]
    """Rows of held_out, ascending; may be empty."""
    guard: Guard | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What a restart must find again, as JSON values."""
        found: dict[str, Any] = {
            "csv_sha256": self.manifest.sha256,
            "lmdb": self.images.fingerprint(),
            "val_csv_sha256": self.held_out.sha256,
            "val_lmdb": self.held_out_images.fingerprint(),
        }
        if self.guard:
            found |= {"guard_csv_sha256": self.guard.manifest.sha256, "guard_lmdb": self.guard.images.fingerprint()}
        return found


def make_dataset(
    manifest: Manifest, images: Images, *, val_manifest: Manifest | None, val_images: Images | None, val_fraction: float
) -> Dataset:
    """Divides the rows: those of val_manifest are held out where it is given, else a fraction of the images by hash of the key."""
    every_row = np.arange(len(manifest), dtype=np.int64)
    if val_manifest is not None:
        held_out_rows = np.arange(len(val_manifest), dtype=np.int64)
        return Dataset(manifest, images, every_row, val_manifest, val_images or images, held_out_rows)
    train_rows, held_out_rows = split_rows(manifest.keys, val_fraction) if val_fraction else (every_row, every_row[:0])
    return Dataset(manifest, images, train_rows, manifest, val_images or images, held_out_rows)
