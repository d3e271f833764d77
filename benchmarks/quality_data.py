"""The embedded example's pairs, divided for fine-tuning: a general domain, and one that a model of it is tuned to."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
from PIL import Image

from job.data.pack import pack
from job.demo import FOLDER

GENERAL = frozenset(
    {"activities", "animals nature", "food drink", "objects", "people body", "smileys emotion", "symbols", "travel places"}
)
TUNED = frozenset({"extras openmoji", "extras unicode", "flags"})
"""Groups; the last tag of a caption is its group. The few images of other groups are left out."""
GUARD_SHARE, HELD_OUT_SHARE = 0.1, 0.2
PARTS = ("base", "guard-for-alpha", "guard", "train", "held-out")

Pair = tuple[str, str]
"""Image key and caption."""


@dataclass(frozen=True)
class Data:
    """CSVs with the columns path and tags, separated by |, and their images."""

    folder: Path
    images: Path
    """LMDB, of all parts."""
    rows: dict[str, int]
    """Of each part."""

    def csv(self, part: str) -> Path:
        """Args: part: one of PARTS, or train-files, which names loose image files."""
        return self.folder / f"{part}.csv"


def write_data(folder: Path) -> Data:
    """Divides the pairs by group and by hash of the key, so that the parts are always the same.

    Transparent images are put on white and stored as RGB: programs differ in what they make of transparency, and all are to see
    the same pixels.
    """
    lines = (FOLDER / "openmoji" / "data.csv").read_text(encoding="utf-8").splitlines()[1:]
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for line in lines:
        key, tags = line.split("|")
        part = _part(key, group=tags.rsplit(", ", 1)[-1])
        if part:
            parts[part].append((key, tags))
    files, images = folder / "files", folder / "images.lmdb"
    _write_files(files, [key for pairs in parts.values() for key, _ in pairs])
    pack(files, images)
    data = Data(folder, images, {part: len(pairs) for part, pairs in parts.items()})
    for part, pairs in parts.items():
        _write_csv(data.csv(part), pairs)
    _write_csv(data.csv("train-files"), [(f"{files}/{key}", tags) for key, tags in parts["train"]])
    return data


def _part(key: str, *, group: str) -> str:
    """Empty: of no part."""
    if group in TUNED:
        return "held-out" if _fraction(key, "held out") < HELD_OUT_SHARE else "train"
    if group not in GENERAL:
        return ""
    if _fraction(key, "guard") >= GUARD_SHARE:
        return "base"
    return "guard-for-alpha" if _fraction(key, "half") < 0.5 else "guard"


def _fraction(key: str, purpose: str) -> float:
    """A number in [0, 1) that looks random. Purposes are independent of each other, and of the job's own hash of the bare key."""
    return int.from_bytes(hashlib.sha256(f"{purpose}: {key}".encode()).digest()[:8], "big") / 2.0**64


def _write_files(folder: Path, keys: Sequence[str]) -> None:
    with lmdb.open(str(FOLDER / "openmoji" / "images.lmdb"), readonly=True, lock=False) as environment, environment.begin() as read:
        for key in keys:
            image = Image.open(io.BytesIO(read.get(key.encode()))).convert("RGBA")
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(path)


def _write_csv(path: Path, pairs: Sequence[Pair]) -> None:
    path.write_text("path|tags\n" + "".join(f"{key}|{tags}\n" for key, tags in pairs), encoding="utf-8")
