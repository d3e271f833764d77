"""Checkpoints beside the training: nobody waits for storage, what counts is kept while it fails, the job ends in time."""

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.checkpoint import outbox, writer
from job.checkpoint.outbox import Outbox
from job.checkpoint.publish import Entry, Publisher
from job.checkpoint.state import TrainState, write_files
from job.checkpoint.store import RunStore
from job.checkpoint.writer import CheckpointWriter
from job.errors import AccessError, StorageError, Superseded
from job.storage import files

PATIENCE_SECONDS = 30.0


class Store:
    """Stands where a store would be slow or fail at a chosen moment. `down` is what it fails with, None while it works."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.down: Exception | None = None
        self.saved: list[int] = []
        self.tried: list[int] = []
        self.entered, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.arrived = 0

    def check_not_superseded(self) -> None:
        """Nobody else is here."""

    def workspace(self, step: int, _scratch: Path) -> Path:
        folder = self.folder / f"{step}-{time.monotonic_ns()}"
        folder.mkdir()
        return folder

    def write_history(self, _lines: bytes) -> None:
        pass

    def send(
        self, step: int, _files: Any, *, data: str, check: Callable[[], None], sent: Callable[[int], None]
    ) -> tuple[str, dict[str, Any]]:
        self.tried.append(step)
        if self.arrived:
            sent(self.arrived)
        self.entered.set()
        while not self.open.wait(0.01):
            check()
        check()
        if self.down:
            raise self.down
        return f"data-{step}", {}

    def commit(self, step: int, *, data: str, stored: Any, info: Any) -> None:
        self.saved.append(step)

    def prune(self, **_: Any) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "EXIT_PATIENCE_SECONDS", 0.5)


def state_at(step: int) -> TrainState:
    model = torch.nn.Linear(2, 2)
    return TrainState(model, torch.optim.AdamW(model.parameters()), None, step=step, best_step=step)


def writer_of(store: Store, **arguments: Any) -> CheckpointWriter:
    chosen = {"patience_seconds": PATIENCE_SECONDS, **arguments}
    return CheckpointWriter(store, scratch=store.folder, keep=2, keep_every=0, **chosen)  # type: ignore[arg-type]


def save(saves: CheckpointWriter, step: int, needed: str = "") -> None:
    saves.save(state_at(step), b"", info={}, needed=needed)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 20 seconds"
        time.sleep(0.005)


def test_a_save_waits_for_no_upload(store: Store) -> None:
    store.open.clear()
    saves = writer_of(store)
    save(saves, 1)
    assert store.entered.wait(10)
    for step in (2, 3):
        save(saves, step)  # would never return
    assert saves.busy
    assert store.saved == []
    until(lambda: sorted(path.name.split("-")[0] for path in store.folder.iterdir()) == ["1", "3"])
    store.open.set()
    saves.wait()
    assert store.saved == [1, 3], "2 waited behind 1 until 3 could take its place"
    assert not saves.busy
    saves.close()


def test_while_storage_fails_only_the_newest_the_best_and_the_kept_wait_and_go_out_in_order(store: Store) -> None:
    waiting: list[int] = []
    saves = writer_of(store, on_waiting=waiting.append)
    store.down = StorageError("no route")
    save(saves, 1, "always")
    until(lambda: waiting and waiting[-1] == 1)
    until(lambda: not saves.busy)  # a due save may take the place of one that waits
    for step, needed in ((2, ""), (3, "best"), (4, ""), (5, "best"), (6, ""), (7, "")):
        save(saves, step, needed)
    until(lambda: sorted(path.name.split("-")[0] for path in store.folder.iterdir()) == ["1", "5", "7"])  # no more than those wait
    until(lambda: waiting[-1] == 3)
    store.down = None
    saves.wait()
    assert store.saved == [1, 5, 7]
    assert waiting[-1] == 0
    assert list(store.folder.iterdir()) == []
    saves.close()


def test_storage_that_fails_longer_than_patience_ends_the_job_with_69(store: Store) -> None:
    store.down = StorageError("no route")
    saves = writer_of(store, patience_seconds=0.2)
    save(saves, 1)

    def noticed() -> bool:
        try:
            saves.notice_failure()
        except StorageError as error:
            return "no route" in str(error) and "step 1" in str(error)
        return False

    until(noticed)
    saves.close()


def test_after_a_signal_patience_is_short(store: Store) -> None:
    store.down = AccessError("the token has expired")  # we had access before: it may come back, so this is no 77
    saves = writer_of(store, stopping=lambda: True)
    save(saves, 1)
    began = time.monotonic()
    with pytest.raises(StorageError, match="expired"):
        saves.wait()
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    saves.close()


def test_a_store_that_answers_nothing_does_not_hold_up_the_exit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "EXIT_SILENCE_SECONDS", 0.3)
    store.open.clear()
    saves = writer_of(store, stopping=lambda: True)
    save(saves, 1)
    with pytest.raises(StorageError, match="step 1"):
        saves.wait()
    saves.close()


def test_a_newer_attempt_ends_the_job_at_once(store: Store) -> None:
    store.down = Superseded("attempt 2 owns the run")
    saves = writer_of(store)
    save(saves, 1)
    with pytest.raises(Superseded):
        saves.wait()
    assert store.tried == [1]
    saves.close()


@pytest.mark.parametrize(("arrived", "needed", "kept"), [(0, "", False), (10**9, "", True), (0, "best", True), (0, "always", True)])
def test_a_signal_gives_up_an_upload_that_a_newer_one_replaces_unless_half_has_arrived(
    store: Store, arrived: int, needed: str, kept: bool
) -> None:
    store.open.clear()
    store.arrived = arrived
    saves = writer_of(store)
    save(saves, 1, needed)
    assert store.entered.wait(10)
    saves.make_way(2)
    save(saves, 2)
    store.open.set()
    saves.wait()
    assert store.saved == ([1, 2] if kept else [2])
    saves.close()


def test_a_signal_gives_up_nothing_of_the_step_that_is_to_be_saved(store: Store) -> None:
    store.open.clear()
    saves = writer_of(store)
    save(saves, 2)
    assert store.entered.wait(10)
    saves.make_way(2)
    assert saves.last_step == 2
    store.open.set()
    saves.wait()
    assert store.saved == [2]
    saves.close()


@pytest.mark.parametrize("needed", ["best", ""])
def test_a_signal_while_files_are_written_keeps_the_best_one(store: Store, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> dict[str, Path]:
        begun.set()
        assert go_on.wait(timeout=30)
        return write_files(*arguments)

    monkeypatch.setattr(writer, "write_files", slowly)
    saves = writer_of(store)
    save(saves, 1, needed)
    assert begun.wait(timeout=30)
    threading.Timer(0.1, go_on.set).start()
    saves.make_way(2)
    saves.wait()
    assert store.saved == ([1] if needed else [])
    saves.close()


def test_a_full_disk_is_tried_once_more_and_then_raised(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, Path]:
        raise StorageError("the disk is full")

    monkeypatch.setattr(writer, "write_files", full)
    saves = writer_of(store)
    save(saves, 1)
    until(lambda: not saves.busy)
    assert saves.notice_failure()
    assert saves.last_step == -1
    save(saves, 1)
    until(lambda: not saves.busy)
    with pytest.raises(StorageError, match="full"):
        saves.notice_failure()
    saves.close()
    assert list(store.folder.iterdir()) == []


def test_what_could_not_be_sent_leaves_nothing_on_scratch(store: Store) -> None:
    store.down = StorageError("no route")
    saves = writer_of(store)
    save(saves, 1)
    until(lambda: store.tried)
    saves.close()
    assert list(store.folder.iterdir()) == []


def test_an_outbox_that_was_given_up_uploads_nothing_more(store: Store, tmp_path: Path) -> None:
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    box = Outbox(
        Publisher(store),  # type: ignore[arg-type]
        keep=2,
        keep_every=0,
        patience_seconds=1,
        stopping=lambda: False,
        on_sent=nothing,
        on_lost=nothing,
        on_failed=nothing,
        on_waiting=nothing,
    )
    store.open.clear()
    folder = tmp_path / "entry"
    folder.mkdir()
    box.put(Entry(1, 1, folder, {}, b"", {}, -1, "always"))
    assert store.entered.wait(10)
    box.close()
    store.open.set()
    until(lambda: not folder.exists())
    assert store.saved == []


def test_an_upload_that_moves_again_after_an_outage_is_not_dropped(store: Store) -> None:
    saves = writer_of(store)
    store.down = StorageError("no route")
    save(saves, 1)
    until(lambda: store.tried and not saves.busy)
    store.down, store.arrived = None, 10**9
    store.open.clear()
    tries = len(store.tried)
    until(lambda: len(store.tried) > tries)
    assert saves.busy, "no interval save is begun while one is on its way"
    save(saves, 2, "best")
    store.open.set()
    saves.wait()
    assert store.saved == [1, 2]
    saves.close()


def test_local_disk_is_bounded_while_storage_is_slow(store: Store) -> None:
    store.open.clear()
    saves = writer_of(store)
    save(saves, 1, "best")
    assert store.entered.wait(10)
    for step in range(2, 9):
        save(saves, step, "best")
    until(lambda: sorted(path.name.split("-")[0] for path in store.folder.iterdir()) == ["1", "8"])
    store.open.set()
    saves.wait()
    assert store.saved == [1, 8]
    saves.close()


def test_after_the_end_nothing_holds_up_the_exit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> dict[str, Path]:
        begun.set()
        assert go_on.wait(10)
        return write_files(*arguments)

    saves = writer_of(store)
    store.open.clear()
    save(saves, 1)
    assert store.entered.wait(10)
    monkeypatch.setattr(writer, "write_files", slowly)
    save(saves, 2)
    assert begun.wait(10)
    store.down = Superseded("attempt 2 owns the run")
    store.open.set()
    until(lambda: saves._outbox._ended)
    go_on.set()
    began = time.monotonic()
    saves.close()
    assert time.monotonic() - began < outbox.EXIT_SILENCE_SECONDS / 2
    assert list(store.folder.iterdir()) == []


def test_bytes_that_move_at_the_exit_are_waited_for(store: Store) -> None:
    leaving: list[bool] = []
    saves = writer_of(store, stopping=lambda: bool(leaving))
    store.down = StorageError("no route")
    save(saves, 1)
    until(lambda: store.tried and not saves.busy)
    tries = len(store.tried)
    store.open.clear()
    store.down, store.arrived = None, 10**9
    until(lambda: len(store.tried) > tries)
    leaving.append(True)
    threading.Timer(outbox.EXIT_PATIENCE_SECONDS / 2, store.open.set).start()
    saves.wait()
    assert store.saved == [1]
    saves.close()


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    made = RunStore(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")
    made.create_config({"format": 1, "config": {}})
    made.claim({})
    return made


@pytest.mark.parametrize("written", [True, False])
def test_a_commit_that_failed_or_lost_its_reply_is_repeated(
    run: RunStore, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, failed = files.create_bytes, []

    def once(uri: str, data: bytes) -> bool:
        if "/commits/" in uri and not failed:
            failed.append(really(uri, data) if written else None)
            raise StorageError("no reply")
        return really(uri, data)

    monkeypatch.setattr(files, "create_bytes", once)
    saves = CheckpointWriter(run, scratch=tmp_path, keep=2, keep_every=0, patience_seconds=PATIENCE_SECONDS)
    save(saves, 1)
    saves.wait()
    assert failed
    assert [commit.step for commit in run.commits()] == [1]
    assert len({name.split("/")[0] for name in files.list_files(files.join(run.uri, "data"))}) == 1
    saves.close()


def test_files_that_a_failed_local_save_used_up_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunStore(str(tmp_path / "run"))
    run.create_config({"format": 1, "config": {}})
    run.claim({})
    really, calls = files.upload, []

    def second_fails(*arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise StorageError("the disk is full")
        really(*arguments, **named)

    monkeypatch.setattr(files, "upload", second_fails)
    saves = CheckpointWriter(run, scratch=tmp_path, keep=2, keep_every=0, patience_seconds=PATIENCE_SECONDS)
    save(saves, 1)
    until(lambda: not saves.busy)
    assert saves.notice_failure()
    save(saves, 1)
    saves.wait()
    assert [commit.step for commit in run.commits()] == [1]
    saves.close()


def test_a_save_given_up_between_two_files_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunStore(f"memory://{uuid.uuid4().hex}/run")
    run.create_config({"format": 1, "config": {}})
    run.claim({})
    really, entered, go_on = files.upload, threading.Event(), threading.Event()

    def paused(*arguments: Any, **named: Any) -> None:
        really(*arguments, **named)
        if not entered.is_set():
            entered.set()
            assert go_on.wait(10)

    monkeypatch.setattr(files, "upload", paused)
    saves = CheckpointWriter(run, scratch=tmp_path, keep=2, keep_every=0, patience_seconds=PATIENCE_SECONDS)
    save(saves, 1)
    assert entered.wait(10)
    saves.make_way(2)
    go_on.set()
    save(saves, 2)
    saves.wait()
    assert [commit.step for commit in run.commits()] == [2]
    saves.close()


def test_a_real_run_is_written_while_storage_comes_and_goes(tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunStore(f"{s3_uri}/run")
    run.create_config({"format": 1, "config": {}})
    run.claim({})
    really, failing = run.send, threading.Event()

    def sometimes(*arguments: Any, **named: Any) -> Any:
        if failing.is_set():
            raise StorageError("no route")
        return really(*arguments, **named)

    monkeypatch.setattr(run, "send", sometimes)
    saves = CheckpointWriter(run, scratch=tmp_path, keep=2, keep_every=0, patience_seconds=PATIENCE_SECONDS)
    save(saves, 1)
    saves.wait()
    failing.set()
    for step in (2, 3):
        save(saves, step)
        until(lambda: not saves.busy)
    failing.clear()
    saves.wait()
    steps = [commit.step for commit in run.commits()]
    assert (steps[0], steps[-1]) == (3, 1)  # 2 went when 3 came, unless it was being tried just then
    found = run.restore(tmp_path / "restored")
    assert found is not None
    assert found.commit.step == 3
    shutil.rmtree(found.folder)
    saves.close()
