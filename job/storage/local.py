"""The local side of storage: files that appear complete or not at all, and stay after a crash."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".clipjob-part"
"""Ends the name of a file that is still being written. Never listed; a kill may leave one behind."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def place(target: Path, fill: Callable[[Path], None], *, put: Callable[[Path, Path], None] = os.replace) -> None:
    """Fills a temporary file beside the target, makes it durable and puts it in place. A failure leaves nothing."""
    _make_folder(target.parent)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}"
    try:
        fill(temporary)
        _sync(temporary)
        put(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # after a rename there is nothing
    sync_folder(target.parent)


def create(target: Path, data: bytes) -> bool:
    """Writes a file only where none is. True: there now are these bytes."""
    try:
        place(target, lambda temporary: write(temporary, data), put=_link)
    except FileExistsError:
        return target.read_bytes() == data
    return True


def _link(temporary: Path, target: Path) -> None:
    """Gives the file its name unless the name is taken; where links don't exist, writes it under an exclusive open."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(target, "xb") as file:
            try:
                file.write(temporary.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                target.unlink()
                raise


def rename(source: Path, target: Path) -> bool:
    """Moves a file durably. False where source and target are on different disks."""
    _make_folder(target.parent)
    _sync(source)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    sync_folder(target.parent)
    return True


def write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def walk(folder: Path, *, temporary: bool = False) -> dict[str, int]:
    """Path below the folder -> bytes, of finished files or of temporary ones."""
    found: dict[str, int] = {}

    def tell(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # gone since, or never there
            raise error

    for parent, folders, names in os.walk(folder, onerror=tell):
        folders[:] = [name for name in folders if name != "lost+found"]  # a disk's own, which only root may list
        for name in names:
            path = Path(parent, name)
            if name.endswith(TEMPORARY) == temporary:
                with contextlib.suppress(FileNotFoundError):
                    found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            sync_folder(folder.parent)


def _sync(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Waits until a folder's names are on the disk, where that is possible: some file systems can't, and a folder that
    may be written but not read can't be opened."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
