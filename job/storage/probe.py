"""Whether a store can do what a run needs: each operation is tried, below the run's URI, with objects of a unique name."""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from awscrt.checksums import crc64nvme

from job.errors import JobError, StorageError
from job.storage import files, s3
from job.storage.codes import DAMAGED
from job.storage.explain import explained, response_code, shown
from job.storage.options import for_operation
from job.storage.parallel import retried
from job.storage.remote import is_s3, open_uri, refuses_to_overwrite

logger = logging.getLogger(__name__)

PLACE = ".probe-"
"""With something unique behind it, the folder below the run's URI where objects of a probe lie for some moments."""
CONTENT = b"clipjob probes what this store can do; this object may be removed"


@dataclass(frozen=True)
class Finding:
    operation: str
    """A slug that scripts may rely on, such as create-only."""
    state: Literal["ok", "failed", "unsupported"]
    text: str = ""
    """Why it failed, or what follows where it is not supported."""
    error: JobError | None = field(default=None, compare=False)
    """Of what failed."""
    fatal: bool = False
    """A run can't work without it."""


class _Lacking(Exception):
    """The store does not do it, and the job works all the same. Its text: what follows."""


def check_storage(uri: str) -> None:
    """Makes sure that a run can live at a URI, in about seven requests; warns of what is only degraded.

    Of a local path its first write tells as much, and a bad setting that is found later should leave nothing there.

    Raises: AccessError, StorageError, ConfigError.
    """
    if files.is_local(uri):
        return
    for finding in probe(uri, thorough=False):
        if finding.error and finding.fatal:
            raise finding.error
        if finding.state != "ok" and finding.operation != "create-only":  # create_bytes has warned of that already
            logger.warning(finding.text, extra={"operation": finding.operation, "uri": shown(uri)})


def probe(uri: str, *, thorough: bool = True) -> list[Finding]:
    """Tries the operations that a run needs, and removes what it wrote.

    Args: thorough: False leaves out those that the others nearly imply.
    Returns: a finding for each operation that was tried. Where nothing can be written, little else can be.
    """
    tried = _Probe(uri, files.join(uri, PLACE + uuid.uuid4().hex))
    missing = _missing_folders(tried.place) if files.is_local(uri) else []
    try:
        tried.all(thorough=thorough)
    finally:
        tried.clean_up()
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return tried.findings


def _missing_folders(place: str) -> list[Path]:
    """The folders that a probe of a local path will make, deepest first."""
    folder = files.local_path(place).absolute()
    return [missing for missing in (folder, *folder.parents) if not missing.exists()]


class _Probe:
    """The findings so far, and what has to be removed."""

    def __init__(self, uri: str, place: str) -> None:
        self.uri, self.place = uri, place
        self.findings: list[Finding] = []
        self.written: list[str] = []
        self.uploads: list[tuple[str, str, str]] = []

    def all(self, *, thorough: bool) -> None:
        first, attempt = ("write", self.write) if thorough else ("create-only", self.create_once)
        wrote = self.tries(first, attempt)
        if not wrote and (not thorough or isinstance(self.findings[-1].error, StorageError)):
            return  # out of reach or full: everything else would wait as long for the same answer
        if wrote and thorough:
            self.tries("create-only", self.create)
            self.tries("read", self.read)
            self.tries("read-range", self.read_range)
        self.tries("list", lambda: self.list(expected=wrote))
        if wrote and is_s3(self.uri):
            self.tries("checksum", lambda: self.checksum(thorough=thorough))
            if thorough and self.tries("multipart", self.multipart):
                self.tries("list-uploads", self.list_uploads, fatal=False)
                self.tries("abort-upload", self.abort_upload, fatal=False)
        if wrote:
            self.tries("delete", self.delete, fatal=False)

    def tries(self, operation: str, attempt: Callable[[], None], *, fatal: bool = True) -> bool:
        """Adds what came of it. Returns: whether the job can go on."""
        try:
            with _gone_is_an_error(self.uri, operation):
                attempt()
        except _Lacking as lacking:
            self.findings.append(Finding(operation, "unsupported", str(lacking)))
        except JobError as error:
            text = f"{error} {_CONSEQUENCES.get(operation, '')}".strip()
            self.findings.append(Finding(operation, "failed", text, error, fatal))
            return not fatal
        else:
            self.findings.append(Finding(operation, "ok"))
        return True

    def at(self, name: str) -> str:
        uri = files.join(self.place, name)
        if uri not in self.written:
            self.written.append(uri)  # before it is tried: a reply may get lost
        return uri

    def write(self) -> None:
        files.write_bytes(self.at("written"), CONTENT)

    def create_once(self) -> None:
        """`create_bytes` writes its first object in a bucket twice, to see whether the second is refused."""
        self._created(files.create_bytes(uri := self.at("created"), CONTENT), uri)

    def create(self) -> None:
        uri = self.at("created")
        self._created(files.create_bytes(uri, CONTENT) and not files.create_bytes(uri, CONTENT[::-1]), uri)

    def _created(self, right: bool, uri: str) -> None:
        if not right:
            raise StorageError(f"Creating {shown(uri)} failed: the store does not keep to what it answers. Use another store.")
        if not files.is_local(uri) and not refuses_to_overwrite(uri):
            raise _Lacking(
                f"The store of {shown(self.uri)} does not refuse to overwrite (If-None-Match): two attempts that start in the same "
                "second may both go on. Let the scheduler start one at a time, or use a store that knows conditional writes."
            )

    def read(self) -> None:
        self._expect(files.read_bytes(self.at("written")), CONTENT)

    def read_range(self) -> None:
        uri, middle = self.at("written"), slice(8, 24)
        with explained(uri, "reading a part of"):
            if files.is_local(uri):
                found = files.local_path(uri).read_bytes()[middle]
            else:
                filesystem, path = open_uri(uri)
                found = bytes(filesystem.cat_file(path, start=middle.start, end=middle.stop))
        self._expect(found, CONTENT[middle])

    def list(self, *, expected: bool) -> None:
        if not files.list_files(self.place) and expected:
            raise _Lacking(
                f"The store of {shown(self.uri)} lists an object some time after it was written. A checkpoint may be found late."
            )

    def checksum(self, *, thorough: bool) -> None:
        """An object with its right checksum must be taken, with a wrong one refused."""
        uri = self.at("checked")
        with explained(uri, "writing (with a checksum)", writing=True):
            if thorough:
                retried(lambda: s3.put(uri, memoryview(CONTENT), check=lambda: None))
            if retried(lambda: _refuses_wrong_checksum(uri)):
                return
        raise _Lacking(
            f"The store of {shown(self.uri)} does not compare checksums: bytes that change on the way to it are noticed only when "
            "a checkpoint is read."
        )

    def multipart(self) -> None:
        uri = self.at("parts")
        with explained(uri, "starting a multipart upload of", writing=True):
            place, upload = s3.address(uri), retried(lambda: s3.start_upload(uri))
            self.uploads.append((place["Bucket"], place["Key"], upload))
            part, checksum = memoryview(CONTENT), crc64nvme(CONTENT, 0)
            retried(lambda: s3.put_part(uri, upload, 1, part, checksum=checksum, check=lambda: None))

    def list_uploads(self) -> None:
        with explained(self.uri, "listing unfinished uploads below"):
            if self.uploads[-1] not in retried(lambda: list(s3.open_uploads(self.place))):
                raise _Lacking(f"The store of {shown(self.uri)} does not list unfinished uploads. {_LIFECYCLE}")

    def abort_upload(self) -> None:
        with explained(self.uri, "aborting a multipart upload below"):
            retried(lambda: s3.abort_upload(*self.uploads[-1]))
            self.uploads.pop()

    def delete(self) -> None:
        for uri in list(self.written):
            files.remove(uri)
            self.written.remove(uri)

    def clean_up(self) -> None:
        """Best effort: what fails here has failed, and been told, before."""
        for upload in self.uploads:
            with contextlib.suppress(Exception):
                s3.abort_upload(*upload)
        for uri in self.written:
            with contextlib.suppress(JobError):
                files.remove(uri)

    def _expect(self, found: bytes, expected: bytes) -> None:
        if found != expected:
            raise StorageError(
                f"Reading below {shown(self.uri)} failed: other bytes came ({found[:40]!r}) than were written ({expected[:40]!r}). "
                "Check the network and what lies between here and the store."
            )


def _refuses_wrong_checksum(uri: str) -> bool:
    try:
        s3.client().put_object(Body=CONTENT, ChecksumCRC64NVME=s3.encoded(0, 8), **s3.address(uri), **for_operation("put_object"))
    except Exception as error:
        if response_code(error) in DAMAGED:
            return True
        raise
    return False


_LIFECYCLE = "Let a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) remove what killed attempts leave."
_CONSEQUENCES = {
    "delete": "The run would work, but its old checkpoints would pile up; what this check wrote stays there too.",
    "list-uploads": f"The run would work, but not find what killed attempts leave. {_LIFECYCLE}",
    "abort-upload": f"The run would work, but not remove what killed attempts leave. {_LIFECYCLE}",
}


@contextlib.contextmanager
def _gone_is_an_error(uri: str, operation: str) -> Iterator[None]:
    """What was just written must be there."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"Probing {operation} below {shown(uri)} failed: an object that was just written is not there. Use another store, or "
            "check whether someone removes objects here."
        ) from error
