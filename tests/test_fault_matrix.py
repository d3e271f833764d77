"""Every fault at every operation on storage: it is recovered, or it is a clear error within its time; never silently wrong.

The faults are made by a proxy between the real functions and a real server. Each case also shows that the fault happened,
that what was stored before is untouched, and that no unfinished upload is left.
"""

import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from faultproxy import (
    FOREVER,
    Exchange,
    Fault,
    Proxy,
    Rule,
    before,
    cut,
    error,
    flip,
    headers,
    in_reply,
    in_request,
    late,
    lose_reply,
    reset,
    running_proxy,
    short,
    short_chunks,
    silent,
    slow,
    stall,
    torn_chunks,
)
from s3server import BUCKET, KEY, SECRET, S3Server, use_s3

from job.data.staging import Staging
from job.errors import AccessError, DataError, JobError, StorageError
from job.storage import files, parallel, remote, s3, transfer

MIB = 2**20
PART_BYTES = 5 * MIB
"""The smallest that S3 takes."""
dice = random.Random(0)
SMALL, OLD, NEW, TOKEN, DOOMED = (dice.randbytes(100_000) for _ in range(5))
LARGE, OTHER = (dice.randbytes(2 * PART_BYTES + 400_000) for _ in range(2))
LISTED = {"deep/b": 2, "öa x": 1}


@dataclass(frozen=True)
class Place:
    """A prefix that is reached through the proxy by the job and around it by the test."""

    proxy: Proxy
    client: Any
    uri: str
    folder: Path

    @property
    def prefix(self) -> str:
        return self.uri.removeprefix(f"s3://{BUCKET}/") + "/"

    def at(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def store(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=content, ChecksumAlgorithm="CRC64NVME")

    def content(self, name: str) -> bytes | None:
        """Of an object as it is in the store."""
        try:
            return bytes(self.client.get_object(Bucket=BUCKET, Key=self.prefix + name)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return None

    def uploads(self) -> list[str]:
        """Keys of the unfinished uploads."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix)
        return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.fixture(scope="module")
def direct(s3_server: S3Server) -> Iterator[Any]:
    """A client of the server without the proxy between."""
    client = boto3.client(
        "s3", endpoint_url=s3_server.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    yield client
    client.close()


@pytest.fixture
def place(s3_server: S3Server, direct: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """With limits so short that the end of all patience comes within seconds."""
    for module, limits in {
        remote: {"CONNECT_SECONDS": 1, "READ_SECONDS": 0.8, "REQUEST_SECONDS": 2, "CONFLICT_TRIES": 3},
        s3: {"CONNECT_SECONDS": 1, "READ_SECONDS": 0.8},
        parallel: {"TRIES": 4, "LONGEST_PAUSE_SECONDS": 0.2, "PATIENCE_SECONDS": 0.5},
        transfer: {"PART_BYTES": PART_BYTES},
    }.items():
        for name, value in limits.items():
            monkeypatch.setattr(module, name, value)
    with running_proxy(s3_server.endpoint) as proxy:
        use_s3(monkeypatch, proxy.endpoint)
        yield Place(proxy, direct, f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path)
        remote.close()


# Operations: what is there before, what is done, and what is there after a success and, in the worst case, after an error


@dataclass(frozen=True)
class Operation:
    act: Callable[[Place], object]
    """Does it through the job's own functions, and checks what they return."""
    match: str
    """Its request, for the proxy."""
    object: str = ""
    """The object that it is about."""
    content: bytes | None = None
    """Of that object before."""
    success: bytes | None = None
    """The same after a success; after an error it is either."""


def read(place: Place) -> None:
    assert files.read_bytes(place.at("small")) == SMALL


def list_(place: Place) -> None:
    for name, size in LISTED.items():
        place.store(f"listed/{name}", bytes(size))
    assert files.list_files(place.at("listed")) == LISTED


def look_up(place: Place) -> None:
    assert files.stat(place.at("small")).size == len(SMALL)


def create(place: Place) -> None:
    assert files.create_bytes(place.at("claim"), TOKEN)


def write(place: Place) -> None:
    files.write_bytes(place.at("written"), NEW)


def _upload(place: Place, content: bytes) -> None:
    source = place.folder / "source"
    source.write_bytes(content)
    files.upload(source, place.at("sent"))


def upload_small(place: Place) -> None:
    _upload(place, SMALL)


def upload_large(place: Place) -> None:
    _upload(place, LARGE)


def fetch(place: Place) -> None:
    target = place.folder / "target"
    try:
        files.download(place.at("large"), target)
    except JobError:
        assert not target.exists()
        raise
    assert target.read_bytes() == LARGE


def stage(place: Place) -> None:
    with Staging(place.folder / "scratch") as staging:
        assert staging.file(place.at("large"), flag="--csv").read_bytes() == LARGE


def delete(place: Place) -> None:
    files.remove(place.at("doomed"))


READ = Operation(read, "^GET .*/small", "small", SMALL, SMALL)
LIST = Operation(list_, "^GET .*list-type=2")
LOOK_UP = Operation(look_up, "^HEAD .*/small", "small", SMALL, SMALL)
CREATE = Operation(create, "^PUT .*/claim", "claim", None, TOKEN)
WRITE = Operation(write, "^PUT .*/written", "written", OLD, NEW)
UPLOAD_SMALL = Operation(upload_small, "^PUT .*/sent", "sent", None, SMALL)
PART = Operation(upload_large, "^PUT .*/sent.*partNumber=2", "sent", None, LARGE)
BEGIN = Operation(upload_large, "^POST .*/sent.*uploads", "sent", None, LARGE)
FINISH = Operation(upload_large, "^POST .*/sent.*uploadId=", "sent", None, LARGE)
FETCH = Operation(fetch, "^GET .*/large", "large", LARGE, LARGE)
STAGE = Operation(stage, "^GET .*/large", "large", LARGE, LARGE)
DELETE = Operation(delete, "^DELETE .*/doomed", "doomed", DOOMED, None)


# Cases


@dataclass(frozen=True)
class Case:
    operation: Operation
    fault: Fault
    times: float = 1
    error: type[JobError] | None = None
    """None: recovered."""
    says: str = ""
    """Regular expression for the error."""
    first: int = 1
    probability: float = 1.0
    match: str = ""
    """Instead of the operation's own."""
    seconds: float = 20
    """It must end within this time."""
    part_bytes: int = PART_BYTES
    left_to_the_next: bool = False
    """An upload can't be aborted now, for storage is gone for good; the next attempt does it."""


SLOW_DOWN, INTERNAL = error(503, "SlowDown"), error(500, "InternalError")
EXPIRED, DENIED = error(403, "ExpiredToken", "The provided token has expired."), error(403, "AccessDenied")
CONFLICT = error(409, "ConditionalRequestConflict")
HALF_WAY_RESET = cut(0.5, reset=True)
SLOW = slow(100_000)
DOWN = {"times": FOREVER, "error": StorageError, "says": "failing"}
REFUSED = {"times": FOREVER, "error": AccessError, "says": "not permitted|token"}

CASES: dict[str, Case] = {
    "read, 503 twice": Case(READ, SLOW_DOWN, times=2),
    "read, 500 twice": Case(READ, INTERNAL, times=2),
    "read, 503 for ever": Case(READ, SLOW_DOWN, **DOWN),
    "read, reset": Case(READ, reset),
    "read, reset in the body": Case(READ, in_reply(HALF_WAY_RESET)),
    "read, cut": Case(READ, in_reply(cut(0.5))),
    "read, stall": Case(READ, in_reply(stall(0.5))),
    "read, silent once": Case(READ, silent),
    "read, silent for ever": Case(READ, silent, **DOWN),
    "read, lying length": Case(READ, short(1000)),
    "read, chunks that end early": Case(READ, short_chunks(1000)),
    "read, torn chunks": Case(READ, torn_chunks(0.5)),
    "read, bit flip": Case(READ, in_reply(flip(0.5))),
    "read, slow": Case(READ, in_reply(SLOW)),
    "read, expired token": Case(READ, EXPIRED, **REFUSED),
    "read, denied": Case(READ, DENIED, **REFUSED),
    "list, 503 twice": Case(LIST, SLOW_DOWN, times=2),
    "list, reset": Case(LIST, reset),
    "list, cut": Case(LIST, in_reply(cut(0.5))),
    "list, chunks that end early": Case(LIST, short_chunks(100)),
    "list, lying length": Case(LIST, short(100)),
    "list, silent for ever": Case(LIST, silent, **DOWN),
    "list, denied": Case(LIST, DENIED, **REFUSED),
    "look up, 503 twice": Case(LOOK_UP, SLOW_DOWN, times=2),
    "look up, silent for ever": Case(LOOK_UP, silent, **DOWN),
    "create, 503 twice": Case(CREATE, SLOW_DOWN, times=2),
    "create, 409 once": Case(CREATE, CONFLICT),
    "create, 409 for ever": Case(CREATE, CONFLICT, **DOWN),
    "create, lost reply": Case(CREATE, lose_reply),
    "create, lost reply to the second": Case(CREATE, lose_reply, first=2),
    "create, reset in the body": Case(CREATE, in_request(HALF_WAY_RESET)),
    "create, bit flip": Case(CREATE, in_request(flip(0.5))),
    "create, silent for ever": Case(CREATE, silent, **DOWN),
    "create, denied": Case(CREATE, DENIED, **REFUSED),
    "write, 503 twice": Case(WRITE, SLOW_DOWN, times=2),
    "write, lost reply": Case(WRITE, lose_reply),
    "write, cut": Case(WRITE, in_request(cut(0.5))),
    "write, stall": Case(WRITE, in_request(stall(0.5))),
    "write, bit flip": Case(WRITE, in_request(flip(0.5))),
    "write, slow": Case(WRITE, in_request(SLOW)),
    "write, silent for ever": Case(WRITE, silent, **DOWN),
    "small upload, 503 for ever": Case(UPLOAD_SMALL, SLOW_DOWN, **DOWN),
    "small upload, lost reply": Case(UPLOAD_SMALL, lose_reply),
    "small upload, reset in the body": Case(UPLOAD_SMALL, in_request(HALF_WAY_RESET)),
    "small upload, bit flip": Case(UPLOAD_SMALL, in_request(flip(0.5))),
    "small upload, denied": Case(UPLOAD_SMALL, DENIED, **REFUSED),
    "part, 503 twice": Case(PART, SLOW_DOWN, times=2),
    "part, 503 now and then": Case(PART, SLOW_DOWN, match="^P.*/sent", times=FOREVER, probability=0.4),
    "part, reset": Case(PART, reset),
    "part, reset in the body": Case(PART, in_request(HALF_WAY_RESET)),
    "part, cut": Case(PART, in_request(cut(0.5))),
    "part, stall": Case(PART, in_request(stall(0.5))),
    "part, silent once": Case(PART, silent),
    "part, silent for ever": Case(PART, silent, **DOWN),
    "part, 503 for ever": Case(PART, SLOW_DOWN, **DOWN),
    "part, lost reply": Case(PART, lose_reply),
    "part, bit flip": Case(PART, in_request(flip(0.5))),
    "part, slow": Case(PART, in_request(SLOW), match="^PUT .*/sent.*partNumber=3"),
    "part, denied": Case(PART, DENIED, **REFUSED),
    "part, expired token for everything": Case(PART, EXPIRED, match="/sent", first=3, left_to_the_next=True, **REFUSED),
    "part, storage down for good": Case(PART, SLOW_DOWN, match="/sent", first=3, left_to_the_next=True, **DOWN),
    "begin of an upload, 503 twice": Case(BEGIN, SLOW_DOWN, times=2),
    "begin of an upload, lost reply": Case(BEGIN, lose_reply),
    "end of an upload, 503 twice": Case(FINISH, SLOW_DOWN, times=2),
    "end of an upload, lost reply": Case(FINISH, lose_reply),
    "end of an upload, 200 with an error": Case(FINISH, error(200, "InternalError")),
    "end of an upload, 200 with an error for ever": Case(FINISH, error(200, "InternalError"), **DOWN),
    "end of an upload, cut reply": Case(FINISH, in_reply(cut(0.5))),
    "end of an upload, silent for ever": Case(FINISH, silent, **DOWN),
    "fetch, 503 twice": Case(FETCH, SLOW_DOWN, times=2),
    "fetch, 503 now and then": Case(FETCH, SLOW_DOWN, times=FOREVER, probability=0.4, match="/large"),
    "fetch, 503 for ever": Case(FETCH, SLOW_DOWN, **DOWN),
    "fetch, reset": Case(FETCH, reset),
    "fetch, reset in the body": Case(FETCH, in_reply(HALF_WAY_RESET), times=3),
    "fetch, cut": Case(FETCH, in_reply(cut(0.5))),
    "fetch, cut for ever": Case(FETCH, in_reply(cut(0.9)), **DOWN),
    "fetch, stall": Case(FETCH, in_reply(stall(0.5))),
    "fetch, short stall": Case(FETCH, in_reply(stall(0.5, seconds=0.3)), times=3),
    "fetch, silent once": Case(FETCH, silent),
    "fetch, silent for ever": Case(FETCH, silent, **DOWN),
    "fetch, lying length": Case(FETCH, short(1000)),
    "fetch, chunks that end early": Case(FETCH, short_chunks(1000)),
    "fetch, torn chunks": Case(FETCH, torn_chunks(0.5)),
    "fetch, bit flip": Case(FETCH, in_reply(flip(0.5)), error=StorageError, says="checksum|crc64"),
    "fetch, other range": Case(FETCH, headers(content_range="bytes 0-5242879/99999999")),
    "fetch, other etag": Case(FETCH, headers(etag='"other"'), error=files.Replaced, says="replaced"),
    "fetch, slow": Case(FETCH, in_reply(SLOW), times=4, part_bytes=MIB // 4),
    "fetch, denied": Case(FETCH, DENIED, **REFUSED),
    "fetch, expired token midway": Case(FETCH, EXPIRED, first=3, **REFUSED),
    "stage, 503 now and then": Case(STAGE, SLOW_DOWN, times=FOREVER, probability=0.3, match="/large"),
    "stage, reset in the body": Case(STAGE, in_reply(HALF_WAY_RESET), times=3),
    "stage, stall": Case(STAGE, in_reply(stall(0.5))),
    "stage, silent for ever": Case(STAGE, silent, **DOWN),
    "stage, lying length": Case(STAGE, short(1000)),
    "stage, chunks that end early": Case(STAGE, short_chunks(1000)),
    "stage, bit flip": Case(STAGE, in_reply(flip(0.5))),
    "stage, bit flips for ever": Case(STAGE, in_reply(flip(0.5)), times=FOREVER, error=DataError, says="checksum, twice"),
    "stage, expired token midway": Case(STAGE, EXPIRED, first=3, **REFUSED),
    "delete, 503 twice": Case(DELETE, SLOW_DOWN, times=2),
    "delete, lost reply": Case(DELETE, lose_reply),
    "delete, silent for ever": Case(DELETE, silent, **DOWN),
    "delete, denied": Case(DELETE, DENIED, **REFUSED),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_fault_is_recovered_or_a_clear_error_in_time(case: Case, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = case.operation
    monkeypatch.setattr(transfer, "PART_BYTES", case.part_bytes)
    place.store("neighbour", OLD)
    if operation.content is not None:
        place.store(operation.object, operation.content)
    rule = place.proxy.add(
        case.fault, case.match or operation.match, first=case.first, times=case.times, probability=case.probability
    )
    began = time.monotonic()
    if case.error is None:
        operation.act(place)
    else:
        with pytest.raises(case.error, match=case.says) as caught:
            operation.act(place)
        assert place.uri in str(caught.value)
        assert SECRET not in str(caught.value)
    assert time.monotonic() - began < case.seconds
    assert rule.happened >= 1
    if case.times != FOREVER:
        assert rule.happened == case.times
    if operation.object:
        possible = (operation.success,) if case.error is None else (operation.success, operation.content)
        assert place.content(operation.object) in possible
    assert place.content("neighbour") == OLD
    if case.left_to_the_next:
        assert place.uploads(), "the case shows nothing: the upload was aborted"
        place.proxy.clear()
        assert files.abort_uploads(place.uri) == 1
    assert place.uploads() == []


def test_a_lost_claim_stays_ours_and_no_others(place: Place) -> None:
    rule = place.proxy.add(lose_reply, "^PUT .*/claim", times=2)
    assert files.create_bytes(place.at("claim"), TOKEN)
    assert rule.happened == 2
    assert not files.create_bytes(place.at("claim"), NEW)
    assert place.content("claim") == TOKEN


def test_anothers_claim_is_not_taken_for_ours_after_a_lost_reply(place: Place) -> None:
    """Another process creates the object just before our write gets there, and the reply that says so is lost."""
    assert files.create_bytes(place.at("first"), TOKEN)  # from here on the store is known to refuse

    def outrun(exchange: Exchange) -> None:
        place.store("claim", OLD)
        lose_reply(exchange)

    rule = place.proxy.add(outrun, "^PUT .*/claim")
    assert not files.create_bytes(place.at("claim"), TOKEN)
    assert rule.happened == 1
    assert place.content("claim") == OLD


@dataclass(frozen=True)
class Late:
    """A request that arrives when the test says so, long after its client has given up and tried again."""

    rule: Rule
    arrives: threading.Event

    def arrive(self) -> None:
        assert self.rule.hit == 1
        assert self.rule.happened == 0
        self.arrives.set()
        deadline = time.monotonic() + 30
        while not self.rule.happened:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _delay(place: Place, match: str) -> Late:
    arrives = threading.Event()
    return Late(place.proxy.add(late(arrives), match), arrives)


def test_a_part_that_arrives_after_the_end_changes_nothing(place: Place) -> None:
    delayed = _delay(place, PART.match)
    upload_large(place)
    delayed.arrive()
    assert place.content("sent") == LARGE
    assert place.uploads() == []


def test_a_part_that_arrives_after_the_abort_leaves_no_upload(place: Place) -> None:
    delayed = _delay(place, PART.match)
    place.proxy.add(SLOW_DOWN, "partNumber=1", times=FOREVER)
    with pytest.raises(StorageError):
        upload_large(place)
    delayed.arrive()
    assert place.uploads() == []
    assert place.content("sent") is None


def test_a_claim_that_arrives_late_is_refused(place: Place) -> None:
    assert files.create_bytes(place.at("first"), TOKEN)  # from here on the store is known to refuse
    delayed = _delay(place, CREATE.match)
    assert files.create_bytes(place.at("claim"), TOKEN)
    place.store("claim", NEW)  # so that a write can be seen
    delayed.arrive()
    assert place.content("claim") == NEW


@pytest.mark.parametrize("moment", [1, 3])
def test_an_object_replaced_while_it_is_read_is_named_and_no_file_is_made(place: Place, moment: int) -> None:
    place.store("large", LARGE)
    rule = place.proxy.add(before(lambda: place.store("large", OTHER)), "^GET .*/large", first=moment)
    with pytest.raises(files.Replaced, match=rf"{place.uri}/large was replaced"):
        files.download(place.at("large"), place.folder / "target")
    assert rule.happened == 1
    assert list(place.folder.iterdir()) == []
    files.download(place.at("large"), place.folder / "target")
    assert (place.folder / "target").read_bytes() == OTHER


def test_an_object_removed_while_it_is_read_is_named(place: Place) -> None:
    place.store("large", LARGE)
    gone = before(lambda: place.client.delete_object(Bucket=BUCKET, Key=place.prefix + "large"))
    rule = place.proxy.add(gone, "^GET .*/large", first=2)
    with pytest.raises(files.Replaced, match=rf"{place.uri}/large was replaced or removed"):
        files.download(place.at("large"), place.folder / "target")
    assert rule.happened == 1
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize("moment", [1, 3])
def test_an_object_replaced_while_it_is_staged_is_an_error_and_then_a_copy_of_its_own(place: Place, moment: int) -> None:
    place.store("large", OTHER)
    rule = place.proxy.add(before(lambda: place.store("large", LARGE)), "^GET .*/large", first=moment)
    with pytest.raises(DataError, match=rf"{place.uri}/large was replaced"):
        stage(place)
    assert rule.happened == 1
    stage(place)


def test_staging_goes_on_where_a_failed_attempt_ended(place: Place) -> None:
    place.store("large", LARGE)
    rule = place.proxy.add(SLOW_DOWN, "^GET .*/large", header=f"Range: bytes={PART_BYTES}-", times=FOREVER)
    with pytest.raises(StorageError, match="failing"):
        stage(place)
    assert rule.happened >= 2
    place.proxy.clear()
    before_this = place.proxy.count("^GET .*/large")
    stage(place)
    assert place.proxy.count("^GET .*/large") - before_this < 3, "parts that were there came again"


def test_what_a_kill_leaves_of_an_upload_the_next_attempt_aborts_and_nothing_else(place: Place) -> None:
    sibling = place.client.create_multipart_upload(Bucket=BUCKET, Key=place.prefix.rstrip("/") + "-sibling/x")["UploadId"]
    (place.folder / "source").write_bytes(LARGE)
    rule = place.proxy.add(silent, "^PUT .*partNumber=2", times=FOREVER)
    program = (
        "import sys; from pathlib import Path; from job.storage import files, transfer\n"
        f"transfer.PART_BYTES = {PART_BYTES}\n"
        "files.upload(Path(sys.argv[1]), sys.argv[2])"
    )
    with subprocess.Popen([sys.executable, "-c", program, place.folder / "source", place.at("sent")]) as process:
        deadline = time.monotonic() + 60
        while not rule.happened and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert rule.happened
    assert place.uploads() == [place.prefix + "sent"]
    assert files.abort_uploads(place.uri) == 1
    assert place.uploads() == []
    assert place.content("sent") is None
    place.client.abort_multipart_upload(Bucket=BUCKET, Key=place.prefix.rstrip("/") + "-sibling/x", UploadId=sibling)
