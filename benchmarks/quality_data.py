"""Pairs of real images for fine-tuning: a general domain, and one that a model of it is tuned to. Both are groups of the embedded
example; or the example is the one, and clip art the other."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
from PIL import Image

from benchmarks.clip_art import clip_art
from job.data.pack import pack
from job.demo import FOLDER

GENERAL = frozenset(
    {"activities", "animals nature", "food drink", "objects", "people body", "smileys emotion", "symbols", "travel places"}
)
TUNED = frozenset({"extras openmoji", "extras unicode", "flags"})
"""Groups; the last tag of a caption is its group. The few images of other groups are left out."""
GUARD_SHARE = 0.2
FOLDS = 5
"""Each holds out another fifth of the tuned domain; together, every pair once, but for a rest of four at most."""
CLIP_ART = {"all": slice(None), "first": slice(1600), "other": slice(1600, 3200)}
"""Which of about 3300 pairs of clip art."""
SIDE = 160
"""Longest side of the stored images; models of the contest see 64 pixels."""

Pair = tuple[str, str]
"""Image key and caption."""


@dataclass(frozen=True)
class Data:
    """CSVs with the columns path and tags, separated by |, and their images."""

    folder: Path
    images: Path
    """LMDB, of all parts."""
    rows: dict[str, int]
    """Of base, guard-for-alpha, guard, and train and held-out, which are equally large in each fold."""

    def csv(self, part: str, fold: int | None = None) -> Path:
        """Args: part: see rows; or train-files, which names loose image files. fold: of train, train-files and held-out."""
        return self.folder / (f"{part}.csv" if fold is None else f"{part}-{fold}.csv")


def write_data(folder: Path, *, clip_art_folder: Path | None = None, pairs: str = "all") -> Data:
    """Divides the pairs by group and by hash of the key, so that the parts are always the same.

    Transparent images are put on white and stored as RGB: programs differ in what they make of transparency, and all are to see
    the same pixels.

    Args:
        clip_art_folder: see clip_art; with it the tuned domain is clip art, and all groups are general.
        pairs: one of CLIP_ART. The others are for what was learnt from contests on the first.
    """
    lines = (FOLDER / "openmoji" / "data.csv").read_text(encoding="utf-8").splitlines()[1:]
    parts: dict[str, list[Pair]] = {"base": [], "guard-for-alpha": [], "guard": [], "tuned": []}
    for line in lines:
        key, tags = line.split("|")
        part = _part(key, group=tags.rsplit(", ", 1)[-1], tunes=clip_art_folder is None)
        if part:
            parts[part].append((key, tags))
    files, images = folder / "files", folder / "images.lmdb"
    _write_example(files, [key for part in parts.values() for key, _ in part])
    if clip_art_folder is not None:
        captions = clip_art(clip_art_folder)
        found = {f"clip-art/{path.relative_to(clip_art_folder)}": path for path in captions}
        chosen = sorted(found, key=lambda key: _fraction(key, "chosen"))[CLIP_ART[pairs]]
        for key in chosen:
            _write_file(files / key, Image.open(found[key]))
        parts["tuned"] = [(key, captions[found[key]]) for key in chosen]
    pack(files, images)
    tuned = sorted(parts.pop("tuned"), key=lambda pair: _fraction(pair[0], "fold"))
    tuned = tuned[: len(tuned) // FOLDS * FOLDS]
    rows = {name: len(part) for name, part in parts.items()}
    data = Data(folder, images, rows | {"held-out": len(tuned) // FOLDS, "train": len(tuned) - len(tuned) // FOLDS})
    for name, part in parts.items():
        _write_csv(data.csv(name), part)
    for fold in range(FOLDS):
        train = [pair for at, pair in enumerate(tuned) if at % FOLDS != fold]
        _write_csv(data.csv("held-out", fold), tuned[fold::FOLDS])
        _write_csv(data.csv("train", fold), train)
        _write_csv(data.csv("train-files", fold), [(f"{files}/{key}", tags) for key, tags in train])
    return data


def _part(key: str, *, group: str, tunes: bool) -> str:
    """Empty: of no part. Args: tunes: whether groups of TUNED are the tuned domain, and not general as well."""
    if group in TUNED and tunes:
        return "tuned"
    if group not in GENERAL | TUNED:
        return ""
    if _fraction(key, "guard") >= GUARD_SHARE:
        return "base"
    return "guard-for-alpha" if _fraction(key, "half") < 0.5 else "guard"


def _fraction(key: str, purpose: str) -> float:
    """A number in [0, 1) that looks random. Purposes are independent of each other, and of the job's own hash of the bare key."""
    return int.from_bytes(hashlib.sha256(f"{purpose}: {key}".encode()).digest()[:8], "big") / 2.0**64


def _write_example(folder: Path, keys: Sequence[str]) -> None:
    with lmdb.open(str(FOLDER / "openmoji" / "images.lmdb"), readonly=True, lock=False) as environment, environment.begin() as read:
        for key in keys:
            _write_file(folder / key, Image.open(io.BytesIO(read.get(key.encode()))))


def _write_file(path: Path, image: Image.Image) -> None:
    image = image.convert("RGBA")
    image.thumbnail((SIDE, SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(path)


def _write_csv(path: Path, pairs: Sequence[Pair]) -> None:
    path.write_text("path|tags\n" + "".join(f"{key}|{tags}\n" for key, tags in pairs), encoding="utf-8")
