"""Where the LMDBs are that --lmdb names: one place, several, a pattern, or a folder of shards."""

import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from job.errors import DataError
from job.storage import files

SUFFIXES = (".lmdb", ".mdb")
"""Of shards in a folder."""
DATA = "data.mdb"


def shard_uris(uri: str, *, flag: str = "--lmdb") -> list[str]:
    """The places of one or more LMDBs: local folders or files as they are, remote ones as the URI of the data file.

    Args:
        uri: a folder with data.mdb or a file; several of these with commas between; a pattern with * in its last part; or a
            folder without data.mdb that holds shards named *.lmdb or *.mdb. An existing local path is never divided at commas.
        flag: the setting that named it, for messages.
    Returns: at least one, in the order given, those of a pattern or folder sorted. What is nowhere stays as it was given.
    Raises: DataError, when a pattern matches nothing; what storage raises.
    """
    if files.is_local(uri) and (path := files.local_path(uri)).exists():
        return _in_folder(path) if path.is_dir() and not (path / DATA).exists() else [uri]
    if "," in uri:
        places = [place for text in uri.split(",") if text.strip() for place in shard_uris(text.strip(), flag=flag)]
        if not places:
            raise DataError(f"{uri!r} names no LMDB. Check {flag}.")
        return places
    parent, _, pattern = uri.rstrip("/").rpartition("/")
    if "*" in pattern:
        found = _matching(parent, pattern, local=files.is_local(uri))
        if not found:
            raise DataError(f"No LMDB matches {files.shown(uri)}. Check {flag}.")
        return found
    return [uri] if files.is_local(uri) else _remote(uri)


def _matching(parent: str, pattern: str, *, local: bool) -> list[str]:
    if not local:
        found = _shards_among(files.list_files(parent), lambda name: fnmatchcase(name, pattern))
        return [files.join(parent, name) for name in found]
    folder = files.local_path(parent) if parent else Path()
    return _local_shards(folder, lambda name: fnmatchcase(name, pattern))


def _in_folder(folder: Path) -> list[str]:
    return _local_shards(folder, lambda name: name.endswith(SUFFIXES)) or [str(folder)]


def _local_shards(folder: Path, matches: Callable[[str], bool]) -> list[str]:
    names = os.listdir(folder) if folder.is_dir() else []
    inside = [f"{name}/{DATA}" if (folder / name).is_dir() else name for name in names]
    return [str(folder / name.removesuffix(f"/{DATA}")) for name in _shards_among(inside, matches) if (folder / name).is_file()]


def _remote(uri: str) -> list[str]:
    uri = uri.rstrip("/")  # with a slash, some stores show an empty object where there is a folder
    for place in (files.join(uri, DATA), uri):
        try:
            files.stat(place)
        except FileNotFoundError:
            continue
        return [place]
    try:
        found = _shards_among(files.list_files(uri), lambda name: name.endswith(SUFFIXES))
    except FileNotFoundError:  # some stores call an absent folder that
        found = []
    return [files.join(uri, name) for name in found] or [uri]


def _shards_among(names: Iterable[str], matches: Callable[[str], bool]) -> list[str]:
    """Data files of LMDBs directly below a folder, sorted; not LMDB's lock files."""
    found = []
    for name in sorted(names):
        first, _, rest = name.partition("/")
        if matches(first) and rest in ("", DATA) and first != "lock.mdb" and not first.endswith("-lock"):
            found.append(name)
    return found
