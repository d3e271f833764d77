"""Remote files are copied to scratch once per node; a wrong copy is never used, and what a kill leaves there is made use of."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faultproxy import flip, in_reply, running_proxy
from s3server import S3Server, use_s3

from job.data import journal
from job.data.images import open_images
from job.data.staging import Staging, shard_uris
from job.errors import DataError, Stopped, StorageError
from job.storage import files, parallel, s3, transfer
from job.storage.mounts import network_file_system

ROOT = Path(__file__).parents[1]
PART_BYTES = 2**16
WAIT_SECONDS = 60
CONTENT = bytes(range(251)) * 4000  # a bit more than 15 parts
PARTS = -(-len(CONTENT) // PART_BYTES)

CHILD = f"""
import itertools, sys, time
from pathlib import Path
from job.data import journal
from job.data.staging import Staging
from job.storage import s3, transfer

transfer.PART_BYTES = {PART_BYTES}
real, begun, numbers = s3.get_range, [], itertools.count(1)

def get_range(*arguments, **named):
    begun.append(1)
    if next(numbers) > int(sys.argv[3]):
        time.sleep(1000)
    time.sleep(0.05)
    return real(*arguments, **named)

s3.get_range = get_range
staging = Staging(Path(sys.argv[2]))
print(staging.file(sys.argv[1], flag="--csv"), flush=True)
sys.stdin.read()
staging.close()
print(len(begun), flush=True)
"""
"""Stages a URI, waits for the end of its input. Arguments: URI, scratch, how many parts the network lets through."""


@contextlib.contextmanager
def child(uri: str, scratch: Path, *, lets_through: int = 1000) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", CHILD, uri, str(scratch), str(lets_through)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def journalled(scratch: Path) -> int:
    """Parts that a journal below scratch names."""
    return sum(path.read_text().count("\n") for path in scratch.glob("staged/*/journal"))


def entries(scratch: Path) -> list[str]:
    """What is staged, by the files' names."""
    made_by_us = ("lock", "DONE", "journal", "data.part")
    return sorted(path.name for path in scratch.glob("staged/*/*") if path.name not in made_by_us)


def stage(uri: str, scratch: Path, **arguments: Any) -> Path:
    """Stages a file and lets go of it."""
    with Staging(scratch, **arguments) as staging:
        return staging.file(uri, flag="--csv")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(journal, "PROGRESS_SECONDS", 0)


@pytest.fixture
def memory_uri() -> Iterator[str]:
    """An empty folder of a store that is not S3."""
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    files.remove_tree(uri)


@pytest.fixture(params=["s3", "memory"])
def remote_uri(request: pytest.FixtureRequest) -> str:
    uri: str = request.getfixturevalue(f"{request.param}_uri")
    return uri


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the ranges begin that this process asks S3 for."""
    starts: list[int] = []
    real = s3.get_range

    def get_range(uri: str, start: int, length: int, **named: Any) -> None:
        starts.append(start)
        real(uri, start, length, **named)

    monkeypatch.setattr(s3, "get_range", get_range)
    return starts


def before_first_part(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Lets something happen when a download has begun."""
    real, lock, done = transfer.fetch_parts, threading.Lock(), []

    def fetch_parts(*arguments: Any, **named: Any) -> None:
        with lock:
            if not done:
                done.append(action())
        real(*arguments, **named)

    monkeypatch.setattr(transfer, "fetch_parts", fetch_parts)


# --- one copy


def test_a_local_path_is_used_where_it_is(tmp_path: Path) -> None:
    with Staging(tmp_path / "scratch") as staging:
        assert staging.file(str(tmp_path / "a.csv"), flag="--csv") == tmp_path / "a.csv"
        assert staging.file(f"file://{tmp_path}/a.csv", flag="--csv") == tmp_path / "a.csv"
        assert staging.lmdb(str(tmp_path / "a.lmdb"), flag="--lmdb") == [tmp_path / "a.lmdb"]
    assert not (tmp_path / "scratch").exists()


def test_a_remote_file_is_copied_once(remote_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    uri = files.join(remote_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    seen: list[tuple[str, int, int]] = []
    with Staging(tmp_path, progress=lambda *call: seen.append(call)) as staging:
        local = staging.file(uri, flag="--csv")
        assert staging.file(uri, flag="--csv") == local
    assert local.name == "data.csv"
    assert local.read_bytes() == CONTENT
    assert seen[0] == ("data.csv", 0, len(CONTENT))
    assert seen[-1] == ("data.csv", len(CONTENT), len(CONTENT))
    assert sorted(seen) == seen
    inode = local.stat().st_ino
    assert stage(uri, tmp_path) == local
    assert local.stat().st_ino == inode
    events = [record for record in caplog.records if record.name == "job.data.staging"]
    assert [record.getMessage() for record in events] == ["staging", "staged", "staged before"]
    assert (events[0].resumed_bytes, events[0].bytes, events[0].uri) == (0, len(CONTENT), uri)  # type: ignore[attr-defined]
    assert events[1].bytes_per_second > 0  # type: ignore[attr-defined]
    assert sorted(path.name for path in local.parent.iterdir()) == ["DONE", "data.csv", "journal", "lock"]


def test_an_empty_file_is_staged(remote_uri: str, tmp_path: Path) -> None:
    uri = files.join(remote_uri, "empty.csv")
    files.write_bytes(uri, b"")
    assert stage(uri, tmp_path).read_bytes() == b""


@pytest.mark.parametrize("name", ["lock", "DONE", "journal", "data.part", "x" * 250 + ".csv", "ümlaut and blank.csv"])
def test_any_name_of_a_file_will_do(memory_uri: str, tmp_path: Path, name: str) -> None:
    uri = files.join(memory_uri, name)
    files.write_bytes(uri, CONTENT)
    local = stage(uri, tmp_path)
    assert local.read_bytes() == CONTENT
    assert stage(uri, tmp_path) == local


def test_a_missing_remote_file_names_its_setting(s3_uri: str, tmp_path: Path) -> None:
    with Staging(tmp_path) as staging:
        with pytest.raises(DataError, match=f"There is no {s3_uri}/x.csv. Check --csv"):
            staging.file(files.join(s3_uri, "x.csv"), flag="--csv")
        with pytest.raises(DataError, match=f"There is no {s3_uri}/x.lmdb. Check --val-lmdb"):
            staging.lmdb(files.join(s3_uri, "x.lmdb"), flag="--val-lmdb")


def test_four_processes_on_one_node_download_once(s3_uri: str, tmp_path: Path) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(uri, tmp_path)) for _ in range(4)]
        results = [process.communicate("", timeout=WAIT_SECONDS)[0].split() for process in processes]
    assert len({path for path, _ in results}) == 1
    assert Path(results[0][0]).read_bytes() == CONTENT
    assert sorted(int(asked) for _, asked in results) == [0, 0, 0, PARTS]


# --- kills, stops, damage


def test_after_a_kill_only_what_is_missing_is_fetched(s3_uri: str, tmp_path: Path, asked: list[int]) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    with child(uri, tmp_path, lets_through=6) as process:
        until(lambda: journalled(tmp_path) == 6)
        process.send_signal(signal.SIGKILL)
    there = {int(line.split()[0]) for path in tmp_path.glob("staged/*/journal") for line in path.read_text().splitlines()}
    assert stage(uri, tmp_path).read_bytes() == CONTENT
    assert len(there) == 6
    assert sorted(asked) == [start for start in range(0, len(CONTENT), PART_BYTES) if start not in there]


def interrupted(uri: str, scratch: Path, *, parts: int) -> Path:
    """The folder of a download that a signal has ended when so many parts were there."""
    real, numbers, signalled = s3.get_range, itertools.count(1), threading.Event()

    def get_range(*arguments: Any, **named: Any) -> None:
        if next(numbers) > parts:
            until(lambda: journalled(scratch) >= parts)
            signalled.set()
            raise ConnectionError
        real(*arguments, **named)

    def check() -> None:
        if signalled.is_set():
            raise Stopped("a signal came")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "get_range", get_range)
        with pytest.raises(Stopped):
            stage(uri, scratch, check=check)
    assert entries(scratch) == []
    return next(scratch.glob("staged/*"))


def test_a_stop_leaves_what_has_come(s3_uri: str, tmp_path: Path, asked: list[int]) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    interrupted(uri, tmp_path, parts=3)
    assert journalled(tmp_path) == 3
    asked.clear()
    assert stage(uri, tmp_path).read_bytes() == CONTENT
    assert len(asked) == PARTS - 3


def test_a_torn_journal_and_damaged_parts_cost_only_these_parts(s3_uri: str, tmp_path: Path, asked: list[int]) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    folder = interrupted(uri, tmp_path, parts=4)
    written = (folder / "journal").read_text().splitlines()
    with (folder / "data.part").open("r+b") as file:
        file.seek(int(written[1].split()[0]) + 5)
        file.write(b"damage")
    with (folder / "journal").open("a") as file:
        file.write(f"{written[0].split()[0]} 655")  # cut in the middle of the length
    asked.clear()
    assert stage(uri, tmp_path).read_bytes() == CONTENT
    assert len(asked) == PARTS - (len(written) - 1)


@pytest.mark.parametrize("harm", ["no journal", "nonsense in the journal", "no data", "short data", "long data"])
def test_whatever_is_left_of_a_download_the_copy_is_right(s3_uri: str, tmp_path: Path, harm: str) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    folder = interrupted(uri, tmp_path, parts=4)
    if harm == "no journal":
        (folder / "journal").unlink()
    elif harm == "nonsense in the journal":
        (folder / "journal").write_bytes(b"\xff\n0 65536 zz\n0 99999999 ab\n-1 5 a\n")
    elif harm == "no data":
        (folder / "data.part").unlink()
    else:
        os.truncate(folder / "data.part", 1000 if harm == "short data" else 2 * len(CONTENT))
    assert stage(uri, tmp_path).read_bytes() == CONTENT


def test_after_a_restart_of_the_machine_what_is_there_is_looked_at_again(
    s3_uri: str, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    staged = stage(uri, tmp_path)
    with staged.open("r+b") as file:  # pages that never reached the disk read as zeros
        file.seek(PART_BYTES)
        file.write(bytes(PART_BYTES))
    other = tmp_path / "boot_id"
    other.write_text("another\n")
    monkeypatch.setattr("job.data.cache.BOOT_ID", other)
    asked.clear()
    assert stage(uri, tmp_path).read_bytes() == CONTENT
    assert asked == [PART_BYTES]
    asked.clear()
    stage(uri, tmp_path)
    assert asked == []


def test_a_kill_between_the_rename_and_the_mark_costs_nothing(s3_uri: str, tmp_path: Path, asked: list[int]) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.data.staging.mark_done", fail)
        with pytest.raises(KeyboardInterrupt):
            stage(uri, tmp_path)
    assert entries(tmp_path) == ["data.csv"]
    asked.clear()
    assert stage(uri, tmp_path).read_bytes() == CONTENT
    assert asked == []


def test_a_staged_file_that_was_cut_is_fetched_again(s3_uri: str, tmp_path: Path) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    with Staging(tmp_path) as staging:
        local = staging.file(uri, flag="--csv")
        os.truncate(local, 1000)
        assert staging.file(uri, flag="--csv").read_bytes() == CONTENT
    os.truncate(local, 1000)
    assert stage(uri, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("times", [1, 1000])
def test_bits_flipped_on_the_way_are_found_by_the_stores_checksum(
    s3_server: S3Server, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    uri = files.join(s3_uri, "data.csv")
    (tmp_path / "source").write_bytes(CONTENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PART_BYTES", 2**24)
        files.upload(tmp_path / "source", uri)
    with running_proxy(s3_server.endpoint) as proxy:
        use_s3(monkeypatch, proxy.endpoint)
        rule = proxy.add(in_reply(flip(0.5)), "GET .*data.csv", times=times)
        if times == 1:
            assert stage(uri, tmp_path).read_bytes() == CONTENT
            assert rule.happened == 1
        else:
            with pytest.raises(DataError, match="does not agree with its own checksum"):
                stage(uri, tmp_path)
            assert rule.happened == 2 * PARTS
            assert entries(tmp_path) == []
        s3.close()


# --- replaced


def test_a_replaced_object_is_a_new_copy(remote_uri: str, tmp_path: Path) -> None:
    uri = files.join(remote_uri, "data.csv")
    files.write_bytes(uri, b"old")
    old = stage(uri, tmp_path)
    files.write_bytes(uri, b"new content")
    assert stage(uri, tmp_path).read_bytes() == b"new content"
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("change", ["same length", "shorter", "longer", "removed"])
def test_an_object_replaced_while_it_is_copied_is_an_error(
    remote_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(parallel, "TRIES", 1)
    uri = files.join(remote_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    after = {"same length": CONTENT[::-1], "shorter": CONTENT[:1000], "longer": CONTENT * 2}
    replace = (lambda: files.write_bytes(uri, after[change])) if change in after else (lambda: files.remove(uri))
    with pytest.MonkeyPatch.context() as patch:
        before_first_part(patch, replace)
        with pytest.raises(DataError, match=r"data.csv was replaced while it was copied"):
            stage(uri, tmp_path)
    assert not list(tmp_path.glob("staged/*"))
    if change in after:
        assert stage(uri, tmp_path).read_bytes() == after[change]


def test_an_object_replaced_after_the_last_part_is_an_error(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    monkeypatch.setattr(files, "verify", lambda *_: files.write_bytes(uri, b"x"))
    with pytest.raises(DataError, match="was replaced while it was copied"):
        stage(uri, tmp_path)
    assert entries(tmp_path) == []


# --- room


def put(uri: str, name: str, size: int) -> str:
    place = files.join(uri, name)
    files.write_bytes(place, os.urandom(size))
    return place


def age(local: Path, seconds: float) -> None:
    """As if it had been used last so long ago."""
    before = time.time() - seconds
    os.utime(local.parent / "DONE", (before, before))


def test_the_longest_unused_make_room_and_a_use_counts(memory_uri: str, tmp_path: Path) -> None:
    uris = [put(memory_uri, name, 100_000) for name in "abc"]
    for number, uri in enumerate(uris):
        age(stage(uri, tmp_path), 1000 - number)
    stage(uris[0], tmp_path)
    stage(put(memory_uri, "d", 100_000), tmp_path, limit_bytes=350_000)
    assert entries(tmp_path) == ["a", "c", "d"]
    stage(put(memory_uri, "e", 300_000), tmp_path, limit_bytes=350_000)
    assert entries(tmp_path) == ["e"]


def test_a_stale_version_goes_first(memory_uri: str, tmp_path: Path) -> None:
    age(stage(put(memory_uri, "a", 100_000), tmp_path), 1000)
    stage(put(memory_uri, "b", 100_000), tmp_path)
    local = stage(put(memory_uri, "b", 100_000), tmp_path, limit_bytes=250_000)
    assert entries(tmp_path) == ["a", "b"]
    assert local.is_file()


def test_an_unfinished_download_of_a_dead_process_makes_room_too(memory_uri: str, s3_uri: str, tmp_path: Path) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    folder = interrupted(uri, tmp_path, parts=2)
    stage(put(memory_uri, "a", 100_000), tmp_path, limit_bytes=len(CONTENT))
    assert not folder.exists()


def test_what_is_in_use_is_never_evicted(memory_uri: str, tmp_path: Path) -> None:
    with Staging(tmp_path) as user:
        age(user.file(put(memory_uri, "a", 100_000), flag="--csv"), 1000)
        stage(put(memory_uri, "b", 100_000), tmp_path)
        stage(put(memory_uri, "c", 100_000), tmp_path, limit_bytes=250_000)
        assert entries(tmp_path) == ["a", "c"]
        with pytest.raises(StorageError, match=r"200000 bytes.*--scratch-limit allows 250000 .* 100\d+ are taken by files in use"):
            stage(put(memory_uri, "d", 200_000), tmp_path, limit_bytes=250_000)
    stage(files.join(memory_uri, "d"), tmp_path, limit_bytes=250_000)
    assert entries(tmp_path) == ["d"]


def test_a_file_above_the_limit_evicts_nothing(memory_uri: str, tmp_path: Path) -> None:
    stage(put(memory_uri, "a", 100_000), tmp_path)
    with pytest.raises(StorageError, match=r"b has 200000 bytes.*--scratch-limit allows 150000"):
        stage(put(memory_uri, "b", 200_000), tmp_path, limit_bytes=150_000)
    assert entries(tmp_path) == ["a"]


def test_a_full_disk_is_found_before_the_first_byte_and_old_copies_make_room(
    memory_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = stage(put(memory_uri, "old", 100_000), tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda _: 150_000 if old.exists() else 250_000)
    with pytest.raises(StorageError, match=r"big has 600000 bytes.*has 2\d+ bytes free.*600000 are missing.*--scratch"):
        stage(put(memory_uri, "big", 600_000), tmp_path)
    assert old.exists()  # it would not have been enough
    assert stage(put(memory_uri, "new", 100_000), tmp_path).is_file()  # 100,000 and as much in reserve
    assert entries(tmp_path) == ["new"]


def test_downloads_of_others_are_reckoned_with(memory_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "staged" / "other-version"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock, (folder / "data.part").open("w") as part:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.truncate(500_000)
        monkeypatch.setattr(files, "free_bytes", lambda _: 400_000)
        with pytest.raises(StorageError, match="500000 of others on their way"):
            stage(put(memory_uri, "a", 100_000), tmp_path)
        lock.close()
        assert stage(files.join(memory_uri, "a"), tmp_path).is_file()  # the other one died
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_quota_that_fills_up_on_the_way_names_scratch(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(parallel, "TRIES", 1)
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    real, lock, written = os.pwrite, threading.Lock(), []

    def pwrite(handle: int, data: Any, at: int) -> int:
        with lock:
            written.append(at)
            if len(written) > 5:
                raise OSError(number, os.strerror(number))
        return real(handle, data, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(StorageError, match=f"quota of {tmp_path} is full.*--scratch"):
            stage(uri, tmp_path)
    assert stage(uri, tmp_path).read_bytes() == CONTENT


# --- locks


def test_purge_removes_what_was_used_but_not_what_others_use(memory_uri: str, s3_uri: str, tmp_path: Path) -> None:
    mine, shared = put(memory_uri, "mine", 1000), put(s3_uri, "shared", 1000)
    with Staging(tmp_path) as staging:
        stage(put(memory_uri, "another", 1000), tmp_path)
        staging.file(mine, flag="--csv")
        stage(put(memory_uri, "mine", 2000), tmp_path)  # a newer version
        staging.file(shared, flag="--csv")
        with child(shared, tmp_path) as other:
            assert other.stdout is not None
            path = Path(other.stdout.readline().strip())
            staging.purge()
            assert entries(tmp_path) == ["another", "shared"]
            assert path.is_file()
            other.communicate("", timeout=WAIT_SECONDS)
    with Staging(tmp_path) as staging:
        staging.file(shared, flag="--csv")
        staging.purge()
    assert entries(tmp_path) == ["another"]
    with Staging(tmp_path) as staging:
        staging.file(files.join(memory_uri, "another"), flag="--csv")
        staging.purge()
        staging.purge()
    assert not (tmp_path / "staged").exists()


def test_who_waits_for_another_process_can_be_stopped(memory_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    uri = put(memory_uri, "a", 1000)
    local = stage(uri, tmp_path)
    (local.parent / "DONE").unlink()
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 4:
            raise Stopped("a signal came")

    with (local.parent / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Stopped):
            stage(uri, tmp_path, check=check)
    assert [record.getMessage() for record in caplog.records].count("another process on this node is staging it") == 1
    assert stage(uri, tmp_path).is_file()


def test_a_lock_that_was_removed_with_its_entry_does_not_count(memory_uri: str, tmp_path: Path) -> None:
    uri = put(memory_uri, "a", 1000)
    local = stage(uri, tmp_path)
    with (local.parent / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("a", "DONE", "lock"):
            (local.parent / name).unlink()
        assert stage(uri, tmp_path).is_file()


def test_many_threads_share_one_copy(s3_uri: str, tmp_path: Path, asked: list[int]) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, CONTENT)
    found: list[Path] = []
    with Staging(tmp_path) as staging:
        threads = [threading.Thread(target=lambda: found.append(staging.file(uri, flag="--csv"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(asked) == PARTS


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_a_process_stages_for_itself(
    memory_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    left = tmp_path / "staged" / f"private-{socket.gethostname()}-99999999-source-version"
    left.mkdir(parents=True)
    (left / "data.part").touch()
    elsewhere = tmp_path / "staged" / "private-another-node-1-source-version"
    elsewhere.mkdir()
    with Staging(tmp_path) as staging:
        paths = [staging.file(put(memory_uri, name, 1000), flag="--csv") for name in "ab"]
        assert staging.file(files.join(memory_uri, "a"), flag="--csv") == paths[0]
        assert [path.stat().st_size for path in paths] == [1000, 1000]
        assert all(f"-{os.getpid()}-" in path.parent.name for path in paths)
        assert not left.exists()
    assert [record.levelname for record in caplog.records if "flock" in record.getMessage()] == ["WARNING"]
    assert elsewhere.exists()
    assert not any(path.exists() for path in paths)


# --- network file systems

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:5 master:2 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/local\\040disk rw - xfs /dev/sdb rw
32 22 0:42 / /lustre rw - lustre mds@tcp:/scratch rw
33 22 0:43 / /s3 rw - fuse.s3fs s3fs rw
34 22 0:44 / /ssh rw - fuse.sshfs me@host:/ rw
35 22 0:45 / /usb rw - fuseblk /dev/sdc1 rw
36 22 0:46 / /ntfs rw - fuse.ntfs-3g /dev/sdd1 rw
37 22 0:47 / /bucket rw - fuse mountpoint-s3 rw
38 22 0:48 / /auto rw - autofs systemd-1 rw
39 22 0:49 / /auto rw - cifs //server/share rw
40 22 0:50 / /weka rw - wekafs cluster/fs rw
41 22 0:51 / /gluster rw - fuse.glusterfs host:/volume rw
short line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/x.lmdb", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/x", ""),
        ("/home/local disk/x", ""),
        ("/lustre/x", "lustre"),
        ("/s3/x", "fuse.s3fs"),
        ("/ssh/x", "fuse.sshfs"),
        ("/usb/x", ""),
        ("/ntfs/x", ""),
        ("/bucket/x", "fuse.mountpoint-s3"),
        ("/auto/x", "cifs"),
        ("/weka/x", "wekafs"),
        ("/gluster/x", "fuse.glusterfs"),
        ("/tmp/x", ""),
    ],
)
def test_network_file_systems_are_recognised(tmp_path: Path, path: str, kind: str) -> None:
    place = tmp_path / "root" / path.lstrip("/")
    place.mkdir(parents=True)
    root = str(tmp_path / "root").replace(" ", "\\040")
    lines = [line.split(" ") for line in MOUNTS.splitlines()]
    for fields in lines:
        if len(fields) > 4:
            fields[2], fields[4] = "9:9", (root + fields[4]).rstrip("/")
    (tmp_path / "mountinfo").write_text("\n".join(" ".join(fields) for fields in lines))
    assert network_file_system(place, mountinfo=tmp_path / "mountinfo") == kind
    assert network_file_system(place, mountinfo=tmp_path / "absent") == ""


def test_a_mount_that_a_later_one_hides_does_not_count(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    (tmp_path / "mountinfo").write_text(
        f"1 0 0:9 / {tmp_path} rw - nfs server:/ rw\n2 0 {device} / {tmp_path.parent} rw - ext4 /dev/sda rw\n"
    )
    assert network_file_system(tmp_path / "x", mountinfo=tmp_path / "mountinfo") == ""


def mountinfo(tmp_path: Path, *network: Path) -> Path:
    """A list of mounts in which these folders are on NFS."""
    file = tmp_path / "mountinfo"
    file.write_text("".join(f"{number} 0 0:99 / {path} rw - nfs4 server:/x rw\n" for number, path in enumerate(network)))
    return file


@pytest.mark.parametrize("subdir", [True, False])
def test_an_lmdb_on_a_network_file_system_is_copied_to_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subdir: bool
) -> None:
    (tmp_path / "nfs").mkdir()
    made = tiny.write_lmdb(tmp_path / "nfs" / "made.lmdb", {"a.jpg": tiny.picture(1)})
    tiny.write_csv(tmp_path / "nfs" / "x.csv", [("a.jpg", "a")])
    place = made if subdir else made / "data.mdb"
    real, stale = os.pread, [errno.ESTALE]

    def pread(handle: int, size: int, at: int) -> bytes:
        if stale:
            raise OSError(stale.pop(), "Stale file handle")
        return real(handle, size, at)

    monkeypatch.setattr(os, "pread", pread)
    with Staging(tmp_path / "scratch", mountinfo=mountinfo(tmp_path, tmp_path / "nfs")) as staging:
        assert staging.file(str(tmp_path / "nfs" / "x.csv"), flag="--csv") == tmp_path / "nfs" / "x.csv"
        [local] = staging.lmdb(str(place), flag="--lmdb")
        assert local.is_relative_to(tmp_path / "scratch")
        images = open_images(local)
        assert images.get("a.jpg") == tiny.picture(1)
        images.close()
        assert staging.lmdb(str(place), flag="--lmdb") == [local]
        assert staging.lmdb(str(tmp_path / "nfs" / "absent"), flag="--lmdb") == [tmp_path / "nfs" / "absent"]
    assert not stale


def test_an_lmdb_on_a_network_file_system_replaced_while_it_is_copied_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nfs").mkdir()
    made = tiny.write_lmdb(tmp_path / "nfs" / "made.lmdb", {"a.jpg": tiny.picture(1)})
    before_first_part(monkeypatch, lambda: os.utime(made / "data.mdb", (1, 1)))
    with (
        Staging(tmp_path / "scratch", mountinfo=mountinfo(tmp_path, tmp_path / "nfs")) as staging,
        pytest.raises(DataError, match="was replaced while it was copied"),
    ):
        staging.lmdb(str(made), flag="--lmdb")


def test_scratch_on_a_network_file_system_is_named_in_a_warning(
    memory_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny.write_lmdb(tmp_path / "made.lmdb", {"a.jpg": tiny.picture(1)})
    with Staging(tmp_path / "scratch", mountinfo=mountinfo(tmp_path, tmp_path)) as staging:
        for _ in range(2):
            assert staging.lmdb(str(made), flag="--lmdb") == [made]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "used where it is" in warning
    assert "--scratch" in warning
    caplog.clear()
    with Staging(tmp_path / "scratch", mountinfo=mountinfo(tmp_path, tmp_path)) as staging:
        for name in "ab":
            assert staging.file(put(memory_uri, name, 1000), flag="--csv").is_file()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "scratch is on a network file system" in warning


# --- LMDBs in one place or several


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_an_lmdb_is_found_as_a_folder_and_as_a_file(s3_uri: str, tmp_path: Path, layout: str) -> None:
    made = tiny.write_lmdb(tmp_path / "made.lmdb", {"a.jpg": tiny.picture(1)})
    uri = files.join(s3_uri, f"{layout[0]}.lmdb")
    files.write_bytes(files.join(uri, "data.mdb") if layout == "folder" else uri, (made / "data.mdb").read_bytes())
    with Staging(tmp_path / "scratch") as staging:
        images = open_images(staging.lmdb(uri, flag="--lmdb"))
        assert images.get("a.jpg") == tiny.picture(1)
        images.close()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with two shards, one a folder and one a file, and things that are none."""
    folder = tmp_path / "set"
    folder.mkdir()
    tiny.write_lmdb(folder / "b.lmdb", {"b.jpg": tiny.picture(2), "both.jpg": tiny.picture(3)})
    one = tiny.write_lmdb(tmp_path / "one.lmdb", {"a.jpg": tiny.picture(1), "both.jpg": tiny.picture(4)})
    (one / "data.mdb").rename(folder / "a.mdb")
    (folder / "a.mdb-lock").touch()
    (folder / "readme.txt").touch()
    (folder / "empty.lmdb").mkdir()
    return folder


def put_shards(shards: Path, uri: str) -> None:
    for name in files.list_files(str(shards)):
        files.write_bytes(files.join(uri, name), (shards / name).read_bytes())


@pytest.mark.parametrize("where", ["local", "s3", "memory"])
@pytest.mark.parametrize("spelling", ["{0}/a.mdb,{0}/b.lmdb", " {0}/a.mdb , {0}/b.lmdb,", "{0}", "{0}/", "{0}/*b", "{0}/[ab].*m*"])
def test_shards_are_found_however_they_are_named(
    request: pytest.FixtureRequest, shards: Path, tmp_path: Path, where: str, spelling: str
) -> None:
    root = str(shards)
    if where != "local":
        root = files.join(request.getfixturevalue(f"{where}_uri"), "set")
        put_shards(shards, root)
    with Staging(tmp_path / "scratch") as staging:
        paths = staging.lmdb(spelling.format(root), flag="--lmdb")
        images = open_images(paths)
        assert images.get("a.jpg") == tiny.picture(1)
        assert images.get("b.jpg") == tiny.picture(2)
        assert images.get("both.jpg") == tiny.picture(4)
        images.close()
    assert len(paths) == 2


def test_one_place_is_one_place(s3_uri: str, tmp_path: Path) -> None:
    comma = tiny.write_lmdb(tmp_path / "a,b*.lmdb", {"a": b"x"})
    assert shard_uris(str(comma)) == [str(comma)]
    assert shard_uris(str(tmp_path / "absent")) == [str(tmp_path / "absent")]
    assert shard_uris(files.join(s3_uri, "absent")) == [files.join(s3_uri, "absent")]
    files.write_bytes(files.join(s3_uri, "x.lmdb/data.mdb"), b"x")
    assert shard_uris(files.join(s3_uri, "x.lmdb/")) == [files.join(s3_uri, "x.lmdb/data.mdb")]


@pytest.mark.parametrize("place", ["{local}/*.lmdb", "{remote}/*.lmdb", "{local}/absent/*", " , "])
def test_a_pattern_that_matches_nothing_names_its_setting(s3_uri: str, tmp_path: Path, place: str) -> None:
    with Staging(tmp_path / "scratch") as staging, pytest.raises(DataError, match="Check --val-lmdb"):
        staging.lmdb(place.format(local=tmp_path, remote=s3_uri), flag="--val-lmdb")


def test_what_is_staged_says_where_it_is_from_without_secrets(memory_uri: str, tmp_path: Path) -> None:
    local = stage(put(memory_uri, "a", 1000), tmp_path)
    about = json.loads((local.parent / "DONE").read_text())
    assert about["uri"] == files.join(memory_uri, "a")
    assert about["size"] == 1000
    assert {"token", "staged"} <= about.keys()
