"""What the checkpoint protocol relies on: atomic, create-only, durable, the same on every kind of URI, and clear errors."""

import contextlib
import http.client
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from s3server import BUCKET, KEY, SECRET, S3Server, use_s3

from job.errors import AccessError, ConfigError, JobError, StorageError
from job.storage import explain, files, local, remote


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "local":
        return str(tmp_path / "place")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/place"
    return str(request.getfixturevalue("s3_uri"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk in memory: mounted("size=2m")."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "clipjob-test", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


class Between(ThreadingHTTPServer):
    """Stands between a client and a server and does one thing wrong.

    lose: answers the first create-only PUT by hanging up, once the server has done it. strip: hides the condition, as
    stores do that know none. refuse: 501 to every condition.
    """

    daemon_threads = True

    def __init__(self, backend: str, fault: str) -> None:
        self.backend, self.fault, self.lost = backend.removeprefix("http://"), fault, 0
        super().__init__(("127.0.0.1", 0), _Forward)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up as they like."""


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Between

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        conditional = "If-None-Match" in self.headers
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if self.server.fault == "strip":
            headers.pop("If-None-Match", None)
        backend = http.client.HTTPConnection(self.server.backend, timeout=30)
        if conditional and self.server.fault == "refuse":
            status, answer, content = 501, {}, b"<Error><Code>NotImplemented</Code><Message>no conditions</Message></Error>"
        else:
            backend.request(self.command, self.path, body or None, headers)
            response = backend.getresponse()
            status, answer, content = response.status, dict(response.getheaders()), response.read()
        backend.close()
        if conditional and self.server.fault == "lose" and not self.server.lost:
            self.server.lost += 1
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in answer.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header(
            "Content-Length", answer.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward  # noqa: N815


@pytest.fixture(scope="module")
def moto_endpoint() -> Iterator[str]:
    import boto3  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield endpoint
    server.stop()


@pytest.fixture
def faulty(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Between]]:
    """faulty("lose") leads this process to a server with that fault."""
    with contextlib.ExitStack() as stack:

        def start(fault: str) -> Between:
            server = stack.enter_context(Between(moto_endpoint, fault))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            use_s3(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
            return server

        yield start
        remote.close()


def test_what_is_written_is_read_back_and_replaced_as_a_whole(place: str) -> None:
    uri = files.join(place, "a", "b.json")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(uri)
    files.write_bytes(uri, b"one")
    files.write_bytes(uri, b"twoo")
    assert files.read_bytes(uri) == b"twoo"
    assert files.list_files(place) == {"a/b.json": 4}


def test_create_leaves_what_is_there(place: str) -> None:
    uri = files.join(place, "claim")
    assert files.create_bytes(uri, b"mine")
    assert not files.create_bytes(uri, b"theirs")
    assert files.create_bytes(uri, b"mine"), "the same bytes are our own earlier write"
    assert files.read_bytes(uri) == b"mine"


def test_files_travel_both_ways_unchanged(place: str, tmp_path: Path) -> None:
    content = os.urandom(40 * 2**20)  # more than two parts
    source = tmp_path / "source"
    source.write_bytes(content)
    uri = files.join(place, "deep", "er", "file")
    files.upload(source, uri)
    assert files.stat(uri).size == len(content)
    files.download(uri, tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_bytes() == content
    assert source.exists()
    assert os.listdir(tmp_path / "new") == ["target"]


def test_listing_names_objects_below_and_nothing_else(place: str) -> None:
    assert files.list_files(place) == {}
    for name in ("x", "sub/y", "sub/deeper/z"):
        files.write_bytes(files.join(place, name), name.encode())
    files.write_bytes(place + "-sibling", b"other")
    assert files.list_files(place) == {"sub/deeper/z": 12, "sub/y": 5, "x": 1}
    assert files.list_files(files.join(place, "sub")) == {"deeper/z": 8 + 4, "y": 5}


def test_removing_is_complete_and_absent_is_fine(place: str) -> None:
    for name in ("x", "sub/y", "sub/z"):
        files.write_bytes(files.join(place, name), b"1")
    files.remove(files.join(place, "x"))
    files.remove(files.join(place, "x"))
    files.remove_tree(files.join(place, "sub"))
    files.remove_tree(files.join(place, "sub"))
    assert files.list_files(place) == {}


def test_token_changes_with_the_content(place: str) -> None:
    uri = files.join(place, "x")
    files.write_bytes(uri, b"one")
    before = files.stat(uri)
    assert files.stat(uri) == before
    files.write_bytes(uri, b"two")
    assert files.stat(uri).token != before.token
    with pytest.raises(FileNotFoundError):
        files.stat(place)


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_of_racing_creators_one_wins(place: str) -> None:
    for _ in range(3):
        uri = files.join(place, uuid.uuid4().hex)
        start = threading.Barrier(8)

        def create(number: int, uri: str = uri, start: threading.Barrier = start) -> bool:
            start.wait()
            return files.create_bytes(uri, f"writer {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert sum(won) == 1
        assert files.read_bytes(uri) == f"writer {won.index(True)}".encode()


def test_a_lost_reply_is_not_taken_for_another_writer(faulty: Callable[[str], Between]) -> None:
    server = faulty("lose")
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    assert files.create_bytes(uri, b"token 1")
    assert server.lost == 1
    assert not files.create_bytes(uri, b"token 2")


@pytest.mark.parametrize("fault", ["strip", "refuse"])
def test_a_store_without_conditional_writes_is_checked_first_with_one_warning(
    faulty: Callable[[str], Between], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    faulty(fault)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            assert files.create_bytes(f"{prefix}/{name}", b"mine")
            assert not files.create_bytes(f"{prefix}/{name}", b"theirs")
            assert files.read_bytes(f"{prefix}/{name}") == b"mine"
    assert len([record for record in caplog.records if "does not refuse to overwrite" in record.message]) == 1


def test_create_works_where_links_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert files.create_bytes(str(tmp_path / "x"), b"mine")
    assert not files.create_bytes(str(tmp_path / "x"), b"theirs")
    assert os.listdir(tmp_path) == ["x"]


def test_a_move_renames_on_the_same_disk(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    number = source.stat().st_ino
    files.upload(source, str(tmp_path / "run" / "x"), move=True)
    assert (tmp_path / "run" / "x").stat().st_ino == number
    assert not source.exists()


def test_a_move_to_another_disk_copies(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    target = mounted("size=2m") / "x"
    files.upload(source, str(target), move=True)
    assert target.read_bytes() == b"1"


def test_half_written_files_are_not_listed_and_old_ones_are_collected(tmp_path: Path) -> None:
    old, new = tmp_path / f".x.1{local.TEMPORARY}", tmp_path / f".y.1{local.TEMPORARY}"
    for path in (old, tmp_path / "claim", new):
        path.write_bytes(b"1")
    os.utime(old, (1, 1))
    os.utime(new, (2**31, 2**31))
    assert files.list_files(str(tmp_path)) == {"claim": 1}
    assert files.remove_temporaries(str(tmp_path), before=str(tmp_path / "claim")) == 1
    assert sorted(os.listdir(tmp_path)) == [new.name, "claim"]


def test_a_full_disk_is_69_and_leaves_what_was_there(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=2m")
    uri = str(disk / "x")
    files.write_bytes(uri, b"good")
    source = tmp_path / "big"
    source.write_bytes(bytes(3 * 2**20))
    for attempt in (
        lambda: files.write_bytes(uri, source.read_bytes()),
        lambda: files.create_bytes(str(disk / "y"), source.read_bytes()),
        lambda: files.upload(source, uri),
        lambda: files.download(str(source), disk / "x"),
    ):
        with pytest.raises(StorageError, match=r"full.*No space left"):
            attempt()
        assert files.read_bytes(uri) == b"good"
        assert os.listdir(disk) == ["x"]
    assert files.free_bytes(uri) == files.free_bytes(str(disk / "not" / "yet"))


def test_a_read_only_folder_is_77(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=2m")
    (disk / "x").write_bytes(b"1")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert files.read_bytes(str(disk / "x")) == b"1"
    for attempt in (
        lambda: files.write_bytes(str(disk / "x"), b"2"),
        lambda: files.create_bytes(str(disk / "new" / "y"), b"2"),
        lambda: files.remove(str(disk / "x")),
    ):
        with pytest.raises(AccessError, match=r"not permitted.*Read-only.*writable"):
            attempt()


def test_a_file_in_the_place_of_a_folder_is_77(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(AccessError, match="Choose another path"):
        files.write_bytes(str(tmp_path / "x" / "y"), b"1")


def _every_operation(uri: str, tmp_path: Path) -> list[Callable[[], object]]:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    return [
        lambda: files.read_bytes(uri),
        lambda: files.write_bytes(uri, b"1"),
        lambda: files.create_bytes(uri, b"1"),
        lambda: files.upload(source, uri),
        lambda: files.download(uri, tmp_path / "target"),
        lambda: files.list_files(uri),
        lambda: files.stat(uri),
    ]


@pytest.mark.parametrize(("key", "secret"), [(KEY, "wrong"), ("nobody", SECRET)])
def test_a_wrong_key_is_77(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, secret: str) -> None:
    use_s3(monkeypatch, s3_server.endpoint, key=key, secret=secret)
    for operation in _every_operation(f"s3://{BUCKET}/x", tmp_path):
        with pytest.raises(AccessError, match=rf"s3://{BUCKET}/x.*policy") as caught:
            operation()
        assert secret not in str(caught.value)
    remote.close()


def test_no_credentials_are_77(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, s3_server.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for operation in _every_operation(f"s3://{BUCKET}/x", tmp_path):
        with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
            operation()
    remote.close()


def test_a_missing_bucket_is_77(s3_uri: str, tmp_path: Path) -> None:
    for operation in _every_operation(s3_uri.replace(BUCKET, "no-such-bucket", 1), tmp_path):
        with pytest.raises(AccessError, match="no such bucket"):
            operation()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "htp://127.0.0.1"])
def test_an_endpoint_without_a_scheme_is_77(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    use_s3(monkeypatch, endpoint)
    with pytest.raises(AccessError, match="AWS_ENDPOINT_URL"):
        files.read_bytes(f"s3://{BUCKET}/x")
    remote.close()


def test_a_dead_endpoint_is_69_within_a_minute_and_keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, "http://user:hunter2@127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(StorageError, match="unreachable") as caught:
        files.write_bytes(f"s3://{BUCKET}/x", b"1")
    assert time.monotonic() - began < 60
    assert "hunter2" not in str(caught.value)
    remote.close()


def test_a_server_gone_silent_ends_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """aiobotocore by itself waits for ever for a server that accepts an upload and says nothing."""
    import socket

    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        use_s3(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="unreachable"):
            files.write_bytes(f"s3://{BUCKET}/x", bytes(2**20))
        remote.close()


def test_an_unknown_kind_of_uri_is_2() -> None:
    with pytest.raises(ConfigError, match="nonsense://x"):
        files.read_bytes("nonsense://x/y")


def test_messages_never_show_passwords_or_signatures() -> None:
    text = explain.shown("GET https://user:p@ss@host/x?X-Amz-Signature=abc&X-Amz-Credential=def&a=1 failed")
    assert text == "GET https://***@host/x?X-Amz-Signature=***&X-Amz-Credential=***&a=1 failed"


def test_bugs_of_ours_stay_what_they_are() -> None:
    with pytest.raises(TypeError), explain.explained("x", "reading"):
        raise TypeError("ours")
    with pytest.raises(JobError, match="as it was"), explain.explained("x", "reading"):
        raise StorageError("as it was")


def test_local_work_does_not_import_fsspec(tmp_path: Path) -> None:
    program = (
        "import sys; from job.storage import files\n"
        f"files.write_bytes({str(tmp_path / 'x')!r}, b'1'); files.list_files({str(tmp_path)!r})\n"
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
