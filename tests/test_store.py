"""The commit protocol: what a kill, a second attempt, a full disk or a flipped bit may cost, on each kind of storage."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.checkpoint import transfer
from job.checkpoint.store import FORMAT, Commit, RunStore, remove_run
from job.errors import AccessError, ConfigError, ResumeError, StorageError, Superseded
from job.storage import files
from job.storage.local import TEMPORARY

CONFIG = {"config": {"lr": 1e-5}, "data": {"csv_sha256": "00"}}


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a new run, of each kind."""
    if request.param == "local":
        return str(tmp_path / "runs" / "run")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return str(request.getfixturevalue("s3_uri"))


@pytest.fixture
def local_run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "clipjob-test", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Commit]:
    """save(store, step) makes a checkpoint of two files, which hold the step."""

    def make(store: RunStore, step: int, *, size: int = 1000) -> Commit:
        folder = tmp_path / uuid.uuid4().hex
        (folder / "parts").mkdir(parents=True)
        sources = {"weights.bin": folder / "weights.bin", "parts/0.bin": folder / "parts" / "0.bin"}
        for name, path in sources.items():
            path.write_bytes(f"{step} {name} ".encode().ljust(size, b"."))
        return store.save(step, sources, info={"evaluated": step == 0, "ledger": {"seconds": step / 2}})

    return make


def started(run: str) -> RunStore:
    """A store with the run's config and an attempt of its own."""
    store = RunStore(run)
    store.create_config(CONFIG)
    store.claim({"host": "a"})
    return store


def restored_step(run: str, folder: Path) -> int:
    restored = RunStore(run).restore(folder)
    assert restored is not None
    for name in restored.commit.files:
        assert (restored.folder / name).read_bytes().startswith(f"{restored.commit.step} {name}".encode())
    return restored.commit.step


def object_of(run: str, commit: Commit, name: str = "weights.bin") -> str:
    return files.join(run, "data", commit.data, name)


def test_a_checkpoint_comes_back_as_it_was_saved(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    assert RunStore(run).restore(tmp_path / "none") is None
    store = started(run)
    commit = save(store, 120)
    assert commit.data.startswith("s000000000120-a000001-")
    assert f"commits/a000001-s{120:012}.json" in files.list_files(run)
    again = RunStore(run)
    assert again.load_config() == CONFIG
    restored = again.restore(tmp_path / "scratch")
    assert restored is not None
    assert restored.commit == commit
    assert restored.rejected == {}
    assert restored.commit.info == {"evaluated": False, "ledger": {"seconds": 60.0}}
    assert restored_step(run, tmp_path / "scratch2") == 120


def test_every_json_names_its_format(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    store = started(run)
    save(store, 1)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "x").write_bytes(b"1")
    store.put_folder("base", tmp_path / "base")
    store.end_attempt({"exit_code": 0})
    store.write_result({"outcome": "complete"})
    documents = [name for name in files.list_files(run) if name.endswith(".json")]
    assert len(documents) == 6
    for name in documents:
        assert json.loads(files.read_bytes(files.join(run, name)))["format"] == FORMAT


def test_the_first_config_rules(run: str) -> None:
    first, second = RunStore(run), RunStore(run)
    assert first.load_config() is None
    assert first.create_config(CONFIG) == CONFIG
    assert second.create_config({"other": 1}) == CONFIG
    assert first.config_hash == second.config_hash != ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"lr": 1}', json.dumps({"format": FORMAT + 1}).encode()])
def test_a_config_that_cannot_be_understood_is_78(local_run: str, content: bytes) -> None:
    files.write_bytes(files.join(local_run, "config.json"), content)
    with pytest.raises(ResumeError, match=r"config\.json can't be used"):
        RunStore(local_run).load_config()


def test_racing_claims_get_numbers_of_their_own(run: str) -> None:
    stores = [RunStore(run) for _ in range(4)]
    start = threading.Barrier(len(stores))

    def claim(store: RunStore) -> int:
        start.wait()
        return store.claim({"host": "same"})

    if run.startswith("memory"):
        numbers = [store.claim({}) for store in stores]
    else:
        with ThreadPoolExecutor(len(stores)) as pool:
            numbers = list(pool.map(claim, stores))
    assert sorted(numbers) == [1, 2, 3, 4]


def test_a_superseded_attempt_cannot_commit_prune_export_or_finish(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    zombie = started(run)
    save(zombie, 1)
    newer = started(run)
    before = files.list_files(files.join(run, "commits"))
    (tmp_path / "export").mkdir()
    for forbidden in (
        lambda: save(zombie, 2),
        lambda: zombie.prune(2, keep_every=0, best_step=None),
        lambda: zombie.put_folder("export/final", tmp_path / "export"),
        lambda: zombie.write_result({}),
        zombie.check_not_superseded,
    ):
        with pytest.raises(Superseded, match="Attempt 2 has claimed"):
            forbidden()
    assert files.list_files(files.join(run, "commits")) == before
    assert newer.result() is None
    newer.prune(2, keep_every=0, best_step=None)
    assert len({name.split("/")[0] for name in files.list_files(files.join(run, "data"))}) == 1


def test_a_zombies_late_commit_loses_to_the_newer_attempt(
    local_run: str, tmp_path: Path, save: Callable[..., Commit], monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie, newer = started(local_run), started(local_run)
    save(newer, 10)
    monkeypatch.setattr(zombie, "check_not_superseded", lambda: None)  # it looked just before the claim
    save(zombie, 99)
    assert restored_step(local_run, tmp_path / "s") == 10


def test_one_name_is_committed_once(local_run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    store, twin = started(local_run), RunStore(local_run)
    twin.attempt = store.attempt
    save(store, 5)
    with pytest.raises(Superseded, match="there already"):
        save(twin, 5)
    assert restored_step(local_run, tmp_path / "s") == 5


def _cut(uri: str) -> None:
    files.write_bytes(uri, files.read_bytes(uri)[:-1])


def _flip(uri: str) -> None:
    content = bytearray(files.read_bytes(uri))
    content[len(content) // 2] ^= 1
    files.write_bytes(uri, bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"), [(_cut, "999 bytes instead of 1000"), (_flip, "has changed"), (files.remove, "is missing")]
)
def test_a_damaged_file_sends_restore_one_back_and_says_why(
    run: str, tmp_path: Path, save: Callable[..., Commit], damage: Callable[[str], None], reason: str
) -> None:
    store = started(run)
    save(store, 1)
    newest = save(store, 2)
    damage(object_of(run, newest))
    restored = RunStore(run).restore(tmp_path / "scratch")
    assert restored is not None
    assert restored.commit.step == 1
    assert list(restored.rejected) == [newest.name]
    assert reason in restored.rejected[newest.name]
    assert "weights.bin" in restored.rejected[newest.name]


def _edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps(json.loads(raw) | changes).encode()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda raw: raw[: len(raw) // 2], "not readable"),
        (lambda raw: b"\xff\x00", "not readable"),
        (lambda raw: b"", "not readable"),
        (lambda raw: b"null", "no format version"),
        (_edited(format=FORMAT + 1), "newer than 1"),
        (_edited(step=7), "another name"),
        (_edited(step="000000000002"), "another name"),
        (_edited(data="../../etc"), "another name"),
        (_edited(files={"../x": {"size": 1, "sha256": "0"}}), "outside"),
        (_edited(files=None), "wrong type"),
        (_edited(surprise=1), "unknown"),
        (_edited(config_hash="0"), "another config.json"),
    ],
)
def test_a_commit_that_cannot_be_trusted_sends_restore_one_back_and_says_why(
    local_run: str, tmp_path: Path, save: Callable[..., Commit], edit: Callable[[bytes], bytes], reason: str
) -> None:
    store = started(local_run)
    save(store, 1)
    newest = save(store, 2)
    uri = files.join(local_run, "commits", newest.name)
    files.write_bytes(uri, edit(files.read_bytes(uri)))
    restored = store.restore(tmp_path / "scratch")
    assert restored is not None
    assert restored.commit.step == 1
    assert reason in restored.rejected[newest.name]


def test_commits_of_which_none_verifies_are_78(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    store = started(run)
    for step in (1, 2):
        files.remove(object_of(run, save(store, step)))
    with pytest.raises(ResumeError, match=r"a000001-s000000000002\.json: weights\.bin is missing; a000001-s000000000001\.json"):
        store.restore(tmp_path / "scratch")


def test_a_storage_failure_is_never_a_rejection(
    local_run: str, tmp_path: Path, save: Callable[..., Commit], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = started(local_run)
    save(store, 1)
    save(store, 2)

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "open", broken, raising=False)
        with pytest.raises(StorageError, match="Input/output error"):
            store.restore(tmp_path / "scratch")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        with pytest.raises(StorageError, match="Input/output error"):
            store.restore(tmp_path / "scratch")


@pytest.mark.parametrize("damaged_reads", [1, 2])
def test_bytes_damaged_on_the_way_are_read_again_not_blamed_on_the_checkpoint(
    tmp_path: Path, save: Callable[..., Commit], monkeypatch: pytest.MonkeyPatch, damaged_reads: int
) -> None:
    run = f"memory://{uuid.uuid4().hex}"
    save(started(run), 1)
    real, count = files.download, 0

    def noisy(uri: str, local: Path, **named: Any) -> None:
        nonlocal count
        real(uri, local, **named)
        count += 1
        if count <= damaged_reads:
            local.write_bytes(local.read_bytes()[:-1] + bytes([count]))

    monkeypatch.setattr(files, "download", noisy)
    if damaged_reads == 1:
        assert restored_step(run, tmp_path / "scratch") == 1
    else:
        with pytest.raises(StorageError, match="twice gave different bytes"):
            RunStore(run).restore(tmp_path / "scratch")


@pytest.mark.parametrize("moment", ["data", "commit"])
def test_a_kill_before_the_commit_leaves_the_old_checkpoint_and_the_next_attempt_cleans_up(
    local_run: str, tmp_path: Path, save: Callable[..., Commit], moment: str
) -> None:
    old = save(started(local_run), 1)
    program = f"""
        import os, sys
        from pathlib import Path
        from job.checkpoint.store import RunStore
        from job.storage import files
        from job.storage import local
        store = RunStore({local_run!r})
        store.claim({{}})
        source = Path({str(tmp_path)!r}, "source")
        source.write_bytes(b"2" * 100)
        if {moment!r} == "data":
            local.rename = lambda *_: False  # as on another disk
            local._sync = lambda path: path.is_dir() or os.kill(os.getpid(), 9)
        else:
            files.create_bytes = lambda *_: os.kill(os.getpid(), 9)
        store.save(2, {{"weights.bin": source}}, info={{}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = [path for path in Path(local_run, "data").rglob("*") if path.is_file() and old.data not in str(path)]
    assert len(left) == 1
    assert left[0].name.endswith(TEMPORARY) == (moment == "data")
    assert restored_step(local_run, tmp_path / "s") == 1
    next_store = started(local_run)
    next_store.prune(2, keep_every=0, best_step=None)
    assert not left[0].exists()
    assert restored_step(local_run, tmp_path / "s2") == 1


def test_leftovers_of_older_attempts_go_and_those_of_ours_stay(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    first = started(run)
    kept = save(first, 1)
    source = tmp_path / "source"
    for store in (first, second := started(run)):
        source.write_bytes(b"1")
        transfer.send(files.join(run, "data", store.new_data(9)), {"x": source})
    second.prune(2, keep_every=0, best_step=None)
    folders = {name.split("/")[0] for name in files.list_files(files.join(run, "data"))}
    assert len(folders) == 2
    assert kept.data in folders
    assert any("-a000002-" in folder for folder in folders)


def test_retention_keeps_the_newest_the_best_and_every_nth(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    store = started(run)
    for step in range(0, 80, 10):
        save(store, step)
        store.prune(2, keep_every=40, best_step=20 if step >= 20 else 0)
    assert [commit.step for commit in store.commits()] == [70, 60, 40, 20]
    data = {name.split("/")[0] for name in files.list_files(files.join(run, "data"))}
    assert data == {commit.data for commit in store.commits()}


def test_retention_never_counts_what_cannot_be_restored(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    first = started(run)
    good = save(first, 1)
    _flip(object_of(run, save(first, 2)))  # only the hash tells
    _cut(object_of(run, save(first, 3)))
    second = started(run)
    restored = second.restore(tmp_path / "scratch")
    assert restored is not None
    assert restored.commit == good
    save(second, 4)
    second.prune(2, keep_every=0, best_step=None)
    assert [commit.step for commit in second.commits()] == [4, 1]


def test_nothing_goes_while_no_checkpoint_is_whole(local_run: str, save: Callable[..., Commit]) -> None:
    store = started(local_run)
    for step in (1, 2, 3):
        files.remove(object_of(local_run, save(store, step)))
    assert store.prune(2, keep_every=0, best_step=None) == []
    assert len(store.commits()) == 3


def test_commits_of_a_newer_version_and_their_data_stay(local_run: str, save: Callable[..., Commit]) -> None:
    first = started(local_run)
    newer = save(first, 9)
    uri = files.join(local_run, "commits", newer.name)
    files.write_bytes(uri, _edited(format=FORMAT + 1)(files.read_bytes(uri)))
    second = started(local_run)
    for step in (1, 2, 3):
        save(second, step)
    second.prune(2, keep_every=0, best_step=None)
    assert [commit.step for commit in second.commits()] == [3, 2]
    assert files.stat(uri)
    assert files.stat(object_of(local_run, newer))


def test_a_full_disk_is_69_and_loses_nothing(small_disk: Path, tmp_path: Path, save: Callable[..., Commit]) -> None:
    run = str(small_disk / "run")
    store = started(run)
    save(store, 1, size=100_000)
    before = files.list_files(run)
    with pytest.raises(StorageError, match="full"):
        save(store, 2, size=1_500_000)
    assert files.list_files(run) == before, "the failed save gave its space back"
    assert restored_step(run, tmp_path / "s") == 1
    save(store, 3, size=100_000)
    assert restored_step(run, tmp_path / "s2") == 3


def test_a_read_only_run_is_77(small_disk: Path, save: Callable[..., Commit]) -> None:
    store = started(str(small_disk / "run"))
    save(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (lambda: save(store, 2), lambda: RunStore(str(small_disk / "run")).claim({})):
        with pytest.raises(AccessError, match="read-only"):
            attempt()


def test_history_of_a_newer_attempt_wins_where_steps_repeat(run: str) -> None:
    first = started(run)
    first.write_history(b'{"step": 1, "loss": 9}\n')
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 1.0}, {"kind": "evaluation", "step": 1, "r": 5}, {"step": 2, "loss": 2.0}]
    first.write_history("".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"step": 3, "lo')
    second = started(run)
    assert second.read_history() == rows
    second.write_history(b'{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 3}\n')
    assert RunStore(run).read_history() == [*rows[:2], {"step": 2, "loss": 2.5}, {"step": 3, "loss": 3}]


def test_attempts_tell_where_they_ran_and_how_they_ended(run: str) -> None:
    first = started(run)
    first.end_attempt({"exit_code": 75, "reason": "SIGTERM"})
    RunStore(run).claim({"host": "b"})
    one, two = RunStore(run).attempts()
    assert (one["attempt"], one["host"], one["end"]["exit_code"]) == (1, "a", 75)
    assert (two["attempt"], two["host"], two["end"]) == (2, "b", None)


def test_idle_attempts_are_counted_since_the_last_commit(run: str, save: Callable[..., Commit]) -> None:
    assert RunStore(run).idle_attempts() == 0
    started(run)
    assert started(run).idle_attempts() == 2
    save(started(run), 1)
    assert RunStore(run).idle_attempts() == 0
    assert started(run).idle_attempts() == 1


def test_the_result_comes_back(run: str) -> None:
    store = started(run)
    assert store.result() is None
    store.write_result({"outcome": "complete", "step": 3})
    assert RunStore(run).result() == {"outcome": "complete", "step": 3}


def test_a_folder_counts_once_it_is_complete(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = started(run)
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / "weights").write_bytes(b"w1")
    (base / "sub" / "tokens").write_bytes(b"t1")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.put_folder("base", base)
    assert not store.has_folder("base")
    assert store.fetch_folder("base", tmp_path / "no") is None
    store.put_folder("base", base)
    assert store.has_folder("base")
    place = RunStore(run).fetch_folder("base", tmp_path / "fetched")
    assert place is not None
    assert (place / "sub" / "tokens").read_bytes() == b"t1"
    assert (base / "weights").exists()
    (base / "sub" / "tokens").unlink()
    (base / "weights").write_bytes(b"w2")
    store.put_folder("base", base)
    assert set(files.list_files(files.join(run, "base"))) == {"weights", "sub/tokens", transfer.COMPLETE}  # the first one stays
    _flip(files.join(run, "base", "weights"))
    with pytest.raises(ResumeError, match="base can't be used: weights has changed"):
        store.fetch_folder("base", tmp_path / "fetched2")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_removing_a_run_removes_it_and_nothing_else(run: str, save: Callable[..., Commit]) -> None:
    store = started(run)
    save(store, 1)
    store.write_result({})
    files.write_bytes(files.join(run, "notes.txt"), b"mine")
    files.write_bytes(run + "-other/config.json", b"{}")
    assert remove_run(run) == 6
    assert files.list_files(run) == {"notes.txt": 4}
    assert files.stat(run + "-other/config.json")


@pytest.mark.parametrize("content", [None, b"{}", b'{"hidden_size": 512}'])
def test_what_is_not_a_run_is_not_removed(run: str, content: bytes | None) -> None:
    if content is not None:
        files.write_bytes(files.join(run, "config.json"), content)
        files.write_bytes(files.join(run, "data", "precious"), b"1")
    before = files.list_files(run)
    with pytest.raises(ConfigError, match="not a run"):
        remove_run(run)
    assert files.list_files(run) == before


def test_a_saved_file_is_hashed_once(run: str, save: Callable[..., Commit], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = transfer.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(transfer, "sha256_of", counted)
    save(started(run), 1)
    assert sorted(hashed) == ["0.bin", "weights.bin"]


def test_one_file_of_a_step_is_fetched_and_checked(run: str, tmp_path: Path, save: Callable[..., Commit]) -> None:
    save(started(run), 7)
    second = started(run)
    newest = save(second, 7)
    assert second.fetch_file(7, "weights.bin", tmp_path / "a").read_bytes().startswith(b"7 weights.bin")
    _flip(object_of(run, newest))
    assert second.fetch_file(7, "weights.bin", tmp_path / "b").read_bytes().startswith(b"7 weights.bin")
    with pytest.raises(ResumeError, match="step 8"):
        second.fetch_file(8, "weights.bin", tmp_path / "c")


def test_files_prepared_in_the_workspace_are_moved_and_those_of_a_killed_attempt_collected(local_run: str, tmp_path: Path) -> None:
    first = started(local_run)
    (first.workspace(1, tmp_path) / "weights.bin").write_bytes(b"1")
    second = started(local_run)
    source = second.workspace(1, tmp_path) / "weights.bin"
    source.write_bytes(b"2")
    number = source.stat().st_ino
    commit = second.save(1, {"weights.bin": source}, info={})
    assert Path(object_of(local_run, commit)).stat().st_ino == number
    second.prune(2, keep_every=0, best_step=None)
    assert list(files.list_files(files.join(local_run, "data"))) == [f"{commit.data}/weights.bin"]


def test_rejections_are_logged(
    local_run: str, tmp_path: Path, save: Callable[..., Commit], caplog: pytest.LogCaptureFixture
) -> None:
    store = started(local_run)
    save(store, 1)
    os.unlink(object_of(local_run, newest := save(store, 2)))
    with caplog.at_level(logging.WARNING):
        store.restore(tmp_path / "scratch")
    assert [vars(record)["commit"] for record in caplog.records] == [newest.name]
