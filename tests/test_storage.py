"""What the checkpoint protocol relies on: atomic, create-only, durable, the same on every kind of URI, and clear errors."""

import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faultproxy
import pytest
from s3server import BUCKET, KEY, SECRET, use_s3

from job.errors import AccessError, StorageError
from job.storage import files, local, remote


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


@pytest.mark.parametrize(
    "fault", [faultproxy.hide("If-None-Match"), faultproxy.error(501, "NotImplemented")], ids=["ignores it", "refuses it"]
)
def test_a_store_without_conditional_writes_is_checked_first_with_one_warning(
    moto_endpoint: str, monkeypatch: pytest.MonkeyPatch, fault: faultproxy.Fault, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with faultproxy.running_proxy(moto_endpoint) as proxy, caplog.at_level(logging.WARNING):
        use_s3(monkeypatch, proxy.endpoint)
        rule = proxy.add(fault, header="^If-None-Match:", times=faultproxy.FOREVER)
        for name in ("a", "b"):
            assert files.create_bytes(f"{prefix}/{name}", b"mine")
            assert not files.create_bytes(f"{prefix}/{name}", b"theirs")
            assert files.read_bytes(f"{prefix}/{name}") == b"mine"
        remote.close()
    assert rule.happened
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


def test_a_server_gone_silent_ends_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """aiobotocore by itself waits for ever for a server that accepts an upload and says nothing."""
    import socket

    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        use_s3(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="unreachable"):
            files.write_bytes(f"s3://{BUCKET}/x", bytes(2**20))
        remote.close()


def test_local_work_does_not_import_fsspec(tmp_path: Path) -> None:
    program = (
        "import sys; from job.storage import files\n"
        f"files.write_bytes({str(tmp_path / 'x')!r}, b'1'); files.list_files({str(tmp_path)!r})\n"
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
