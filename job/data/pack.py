"""`clipjob pack`: loose images -> one LMDB. A pack that was killed goes on where it stopped; a finished one is never touched.

<output>.partial/    pack.json (the job), pack.lock, data.mdb: committed every second or 64 MB
<output>/            pack.json, data.mdb: appears by one rename, after everything is on the disk
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from job.data.images import MAX_KEY_BYTES
from job.data.manifest import AUTO, read_manifest
from job.data.pack_images import EXTENSIONS, caption_of, encode_image
from job.data.pack_lmdb import BadImages, fill
from job.errors import ConfigError, DataError, StorageError
from job.storage import local as disk


@dataclass(frozen=True)
class PackResult:
    images: int
    """In the LMDB, whichever attempt packed them."""
    added: int
    """Packed by this attempt."""
    bad: BadImages
    """(key, reason) of images that could not be read or decoded, and are left out."""
    source_bytes: int
    """Size of the files that this attempt packed."""
    output_bytes: int


def pack(
    source: Path,
    output: Path,
    *,
    folder: Path | None = None,
    resize: int = 0,
    quality: int = 85,
    form: str = "jpeg",
    threads: int = 0,
    csv_output: Path | None = None,
    max_bad_samples: float = 0.01,
    separator: str = AUTO,
    image_column: str = AUTO,
    caption_column: str = AUTO,
    stopping: Callable[[], bool] = lambda: False,
) -> PackResult:
    """Packs the images of a folder, or those that a CSV lists, into the LMDB folder output.

    A key is the path below the folder, with slashes; or the CSV's own, which is looked for below folder. The same call again
    continues a killed one; after a finished one it does nothing.

    Args:
        source: a folder, searched recursively for image files, or a CSV.
        folder: where the keys of a CSV begin; default: the folder of the CSV.
        resize: images with a longer short side are shrunk to it; 0: none is.
        form: jpeg: what is not shrunk is stored as it is. ppm: all are stored as pixels, many times larger and faster to load.
        csv_output: a CSV to write, path|tags: captions from text files beside the images, else from folder names.
        max_bad_samples: share of unreadable images above which nothing is finished.
        stopping: asked after every commit.
    Raises:
        ConfigError: the output exists and is another one, or options contradict each other.
        DataError: no images, a key that LMDB can't hold, too many unreadable images.
        StorageError: the disk is full or refuses to be written.
        Stopped: stopping() said so; what was packed is kept.
    """
    files = _listed(source, folder, separator=separator, image_column=image_column, caption_column=caption_column)
    if csv_output and not source.is_dir():
        raise ConfigError(f"{source} is a CSV already, so there is none to write. Leave the output CSV out, or name a folder.")
    keys = sorted(files, key=str.encode)  # in LMDB's own order pages fill up instead of splitting
    job = {
        "source": str(source.absolute()),
        "folder": str(folder and folder.absolute()),
        "resize": resize,
        "quality": quality,
        "format": form,
        "keys_sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
    }
    partial = output.with_name(output.name + ".partial")
    try:
        if output.exists():
            result = _finished(output, job)
            if csv_output and not csv_output.exists():
                _write_csv(csv_output, files, left_out=result.bad)
            return result
        with _claimed(partial, job, csv_output=csv_output):
            added, bad, source_bytes = fill(
                partial,
                keys,
                lambda key: (files[key].stat().st_size, encode_image(files[key], resize=resize, quality=quality, form=form)),
                threads=threads or min(16, os.cpu_count() or 1),
                max_bad_samples=max_bad_samples,
                stopping=stopping,
            )
            if csv_output:
                _write_csv(csv_output, files, left_out=bad)
            _write_text(partial / "pack.json", json.dumps(job | {"left_out": bad}))
            disk.sync_folder(partial)
            partial.rename(output)
            disk.sync_folder(output.parent)
            (output / "pack.lock").unlink()
            return PackResult(len(keys) - len(bad), added, bad, source_bytes, (output / "data.mdb").stat().st_size)
    except (OSError, lmdb.Error) as error:
        raise StorageError(
            f"Packing into {partial} failed: {error}. Free some space, or check its permissions; then run the same command again, "
            "and it goes on where it stopped."
        ) from error


def _listed(source: Path, folder: Path | None, *, separator: str, image_column: str, caption_column: str) -> dict[str, Path]:
    """File of each key. Raises: DataError, if there are none, or one that LMDB can't hold."""
    if not source.exists():
        raise DataError(f"There is no {source}. Name a folder of images or a CSV that lists them.")
    if source.is_dir():
        files = dict(_image_files(source))
    else:
        manifest = read_manifest(source, separator=separator, image_column=image_column, caption_column=caption_column)
        files = {key: (folder or source.parent) / key.replace("\\", "/") for key in manifest.keys}
    if not files:
        raise DataError(f"No images in {source}: no file ends in one of {', '.join(sorted(EXTENSIONS))}. Check the source folder.")
    for key in files:
        encoded = os.fsencode(key)
        if len(encoded) > MAX_KEY_BYTES:
            raise DataError(f"The key {key!r} has more than {MAX_KEY_BYTES} bytes, LMDB's limit. Shorten the names of its folders.")
        if encoded != key.encode(errors="replace"):
            raise DataError(f"The file name {key!r} is not UTF-8, so no CSV could name it. Rename the file.")
    return files


def _image_files(source: Path) -> Iterator[tuple[str, Path]]:
    seen = set()
    for root, folders, names in os.walk(source, followlinks=True):
        if os.path.realpath(root) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                file = Path(root, name)
                yield file.relative_to(source).as_posix(), file


def _finished(output: Path, job: dict[str, Any]) -> PackResult:
    """The result of an earlier, finished pack of the same job. Raises: ConfigError, if the output is anything else."""
    try:
        before = json.loads((output / "pack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{output} exists, and clipjob pack did not make it. Remove it, or choose another output.") from None
    if different := _different(job, before):
        raise ConfigError(f"{output} exists, packed with another {_words(different)}. Remove it, or choose another output.")
    bad = tuple((key, why) for key, why in before["left_out"])
    file = output / "data.mdb"
    with lmdb.open(str(file), subdir=False, readonly=True, create=False, lock=False) as environment:
        images = environment.stat()["entries"]
    return PackResult(images, 0, bad, 0, file.stat().st_size)


@contextlib.contextmanager
def _claimed(partial: Path, job: dict[str, Any], *, csv_output: Path | None) -> Iterator[None]:
    """Holds the partial output for this process, made if need be. Raises: ConfigError, if it is another job's, or in use."""
    if csv_output and csv_output.exists() and not partial.exists():
        raise ConfigError(f"{csv_output} exists. Remove it, or choose another name for the CSV.")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "pack.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process, even after kill -9
        except BlockingIOError:
            raise ConfigError(f"Another clipjob pack is writing {partial}. Wait for it, or choose another output.") from None
        file = partial / "pack.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            # The listing may differ: files may come and go between two attempts.
            if different := [name for name in _different(job, before) if name != "keys_sha256"]:
                raise ConfigError(
                    f"{partial} is an unfinished pack with another {_words(different)}. Repeat its own command to finish it, "
                    "or remove it."
                )
        _write_text(file, json.dumps(job))
        yield


def _write_csv(path: Path, files: dict[str, Path], *, left_out: BadImages) -> None:
    bad = {key for key, _ in left_out}
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="|", lineterminator="\n")
    writer.writerow(("path", "tags"))
    writer.writerows((key, caption_of(file, key)) for key, file in sorted(files.items()) if key not in bad)
    _write_text(path, text.getvalue())


def _write_text(path: Path, text: str) -> None:
    """All of the text or nothing, on the disk when this returns."""
    disk.place(path, lambda temporary: disk.write(temporary, text.encode()))


def _different(job: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What differs from a stored job; one without a format is of a version that had jpeg alone."""
    return [name for name, value in job.items() if ({"format": "jpeg"} | before).get(name) != value]


def _words(names: list[str]) -> str:
    return ", ".join({"keys_sha256": "list of images"}.get(name, name) for name in names)
