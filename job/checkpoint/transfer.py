"""Files on their way into a run and out of it: hashed once, sizes checked on arrival, hashes checked before use."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from job.checkpoint.commit import FileRecord, Rejection, encode, read, records, to_json
from job.errors import StorageError
from job.storage import files

COMPLETE = "files.json"
"""Written last into a folder: names, sizes and hashes of the files beside it."""

_HASHED_AT_ONCE = 2**22


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with files.explained(str(path), "reading"), open(path, "rb", buffering=0) as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def send(
    uri: str,
    sources: Mapping[str, Path],
    *,
    move: bool = False,
    check: Callable[[], None] = lambda: None,
    sent: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, FileRecord]:
    """Uploads files below a URI; each is hashed once, and its size there is checked.

    Args:
        sources: name below uri -> local file.
        move: the sources are no longer needed.
        check, sent: see files.upload.
    """
    stored = {}
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as beside:
        for name, source in sources.items():
            size, digest = source.stat().st_size, beside.submit(sha256_of, source)
            if files.is_local(uri):
                digest.result()  # before the file is moved away
            files.upload(source, files.join(uri, name), move=move, check=check, sent=sent)
            stored[name] = FileRecord(size, digest.result())
    return stored


def receive(uri: str, stored: Mapping[str, FileRecord], folder: Path, *, check: Callable[[], None] = lambda: None) -> Path:
    """Makes stored files available locally, every size and hash checked.

    Args:
        folder: where remote files are put. Local ones are read where they are.
    Returns: the folder that holds them.
    Raises: Rejection, naming the file; StorageError.
    """
    check_sizes(stored, files.list_files(uri))
    local = files.is_local(uri)
    place = files.local_path(uri) if local else folder
    for name, record in stored.items():
        try:
            if local:
                check_hash(name, record, sha256_of(place / name))
            else:
                _download(files.join(uri, name), record, place / name, check)
        except FileNotFoundError:
            raise Rejection(f"{name} was removed while it was being read") from None
    return place


def check_sizes(stored: Mapping[str, FileRecord], listed: Mapping[str, int]) -> None:
    """Raises: Rejection, when a file is missing or has another size."""
    for name, record in stored.items():
        if name not in listed:
            raise Rejection(f"{name} is missing")
        if listed[name] != record.size:
            raise Rejection(f"{name} has {listed[name]} bytes instead of {record.size}")


def check_hash(name: str, record: FileRecord, digest: str) -> None:
    """Raises: Rejection."""
    if digest != record.sha256:
        raise Rejection(f"{name} has changed since it was saved (sha256 {digest[:12]}… instead of {record.sha256[:12]}…)")


def _download(uri: str, record: FileRecord, target: Path, check: Callable[[], None]) -> None:
    """Two tries: bytes that differ between them were damaged on the way, and the stored ones may be good."""
    found = []
    for _ in range(2):
        try:
            files.download(uri, target, check=check)
        except files.Damaged as error:  # the store's own checksum tells as much
            found.append(str(error))
            continue
        found.append(sha256_of(target))
        if found[-1] == record.sha256:
            return
    if found[0] != found[1]:
        raise StorageError(
            f"Reading {files.shown(uri)} twice gave different bytes, and neither as saved. Check the network, then start again."
        )
    check_hash(target.name, record, found[1])


def put_folder(uri: str, local_folder: Path, *, before_finishing: Callable[[], None], check: Callable[[], None]) -> None:
    """Stores a folder, so that it counts as there only once it is complete. One that is complete stays as it is.

    Args: before_finishing: called before the last write; may raise.
    """
    with contextlib.suppress(FileNotFoundError, Rejection):
        read(files.join(uri, COMPLETE))
        return
    sources = {str(path.relative_to(local_folder)): path for path in sorted(local_folder.rglob("*")) if path.is_file()}
    sources.pop(COMPLETE, None)  # of the folder that this one was copied from
    before = files.list_files(uri)
    stored = send(uri, sources, check=check)
    for stale in before.keys() - stored.keys() - {COMPLETE}:
        files.remove(files.join(uri, stale))
    before_finishing()
    files.write_bytes(files.join(uri, COMPLETE), encode({"files": to_json(stored)}))


def fetch_folder(uri: str, local: Path, *, check: Callable[[], None] = lambda: None) -> Path | None:
    """The local place of a stored folder, None when it was never completed. Raises: Rejection, when it is damaged."""
    try:
        content = read(files.join(uri, COMPLETE))
    except FileNotFoundError:
        return None
    try:
        stored = records(content["files"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Rejection(f"{COMPLETE} lacks the names of the files") from None
    return receive(uri, stored, local, check=check)
