"""Which local paths lie on a network file system: there a memory map can end the process (SIGBUS), and reading is slow."""

import os
import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "panfs",
    "pvfs2",
    "smb3",
    "smbfs",
    "wekafs",
}
_NETWORK_FUSE = re.compile(
    r"alluxio|afp|beegfs|blobfuse|ceph|curlftpfs|cvmfs|dav|gcsfuse|geesefs|gluster|goofys|hdfs|iris|juicefs|lustre|mfs|moosefs"
    r"|mount-?s3|mountpoint-s3|objectivefs|oss|rclone|riofs|s3|seaweed|weed|smb|ssh"
)
"""In the subtype (fuse.sshfs), or in the source where a program gives none. Others, such as ntfs-3g, are taken for local."""


def network_file_system(path: str | Path, *, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the network file system that a path lies on, such as nfs4 or fuse.sshfs; empty, when it is on a local one.

    Args:
        path: may be absent yet; then the folder counts that it will be in.
        mountinfo: a file as /proc/self/mountinfo. Where there is none, every path is taken for local.
    """
    place = os.path.realpath(path)
    while not os.path.exists(place) and place != "/":
        place = os.path.dirname(place)
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        number = os.stat(place).st_dev
    except OSError:
        return ""
    device = f"{os.major(number)}:{os.minor(number)}"
    best: tuple[bool, int] = (False, -1)
    found = ""
    for line in lines:
        front, separator, back = line.partition(" - ")
        fields, kinds = front.split(" "), back.split(" ")
        if not separator or len(fields) < 5 or len(kinds) < 2:
            continue
        mounted = _plain(fields[4])
        if place != mounted and not place.startswith(mounted.rstrip("/") + "/"):
            continue
        # A deeper mount may be hidden by a later one above it, so the device decides. Btrfs gives numbers that are not in the
        # list; then the longest path does. Of two at one place the later one is on top.
        if (rank := (fields[2] == device, len(mounted))) >= best:
            best, found = rank, _network_type(kinds[0], _plain(kinds[1]))
    return found


def _network_type(kind: str, source: str) -> str:
    """The type, when it is a network's, else an empty text."""
    if kind in _NETWORK:
        return kind
    if kind == "fuse":
        return f"fuse.{source}" if _NETWORK_FUSE.search(source.lower()) else ""
    return kind if kind.startswith("fuse.") and _NETWORK_FUSE.search(kind.removeprefix("fuse.").lower()) else ""


def _plain(text: str) -> str:
    r"""A field of mountinfo, which writes blanks as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
