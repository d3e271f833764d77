"""SIGTERM, SIGUSR1 and SIGINT in every phase: saved, exit code 75, and the same command goes on as if nothing had happened."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system import (
    REPOSITORY,
    Job,
    assert_identical,
    clean_environment,
    committed,
    finish,
    last_history_step,
    newest_step,
    outcome,
    removed_afterwards,
    train_command,
    unfinished_saves,
)

from job.checkpoint.store import RunStore

pytestmark = pytest.mark.system

STEPS, EVALUATE_EVERY, CHECKPOINT_EVERY = 12, 6, 4
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "val_fraction": 0.25,  # hundreds of images to evaluate, some seconds
    "evaluate_every": EVALUATE_EVERY,
    "checkpoint_every": CHECKPOINT_EVERY,
    "precision": "fp32",
    "threads": 2,
    "torch_threads": 1,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the run ends when nobody interrupts it."""
    with removed_afterwards(tmp_path_factory.mktemp("calm")) as folder:
        finish(train_command(folder / "run", scratch=folder / "scratch", **SETTINGS))
        found = outcome(folder / "run")
    assert found["facts"]["best_step"] > 0, "the tests below need a best checkpoint on the way"
    return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "place") as folder:
        yield folder / "run"


def command_for(run: Path) -> list[str]:
    return train_command(run, scratch=run.parent / "scratch", **SETTINGS)


def assert_saved(job: Job, run: Path, by: int) -> int:
    """Checks what an interrupted attempt left: everything it did is durable and its end is noted. Returns: the step."""
    assert job.end() == 75, job.tail()
    assert "Run the same command to go on" in job.said
    store = RunStore(str(run))
    end = store.attempts()[-1]["end"]
    assert (end["exit_code"], end["reason"]) == (75, signal.Signals(by).name)
    restored = store.restore(run.parent / "check")
    assert restored is not None
    assert not restored.rejected
    done = max([line["step"] for line in job.seen("step")], default=0)
    assert last_history_step(run) == restored.commit.step >= done, "a step that was done is lost"
    return restored.commit.step


def assert_goes_on(run: Path, expected: dict[str, Any]) -> None:
    """Starts the same command again: it goes on where the last attempt stopped, and ends as if nothing had happened."""
    step = newest_step(run)
    job = finish(command_for(run))
    assert [line["step"] for line in job.seen("resumed")] == [step]
    assert_identical(run, expected)


@pytest.mark.parametrize(
    ("delay", "number"), [(0.0, signal.SIGTERM), (0.3, signal.SIGINT), (1.0, signal.SIGUSR1), (2.0, signal.SIGTERM)]
)
def test_a_signal_while_importing_is_heard(delay: float, number: int, run: Path) -> None:
    with Job(*command_for(run), forked=False) as job:
        job.wait_until_stoppable()
        maps = Path(f"/proc/{job.process.pid}/maps").read_text(encoding="utf-8")
        assert "libtorch" not in maps, "the handler must be there before torch is"
        time.sleep(max(0.0, job.started + delay - time.monotonic()))
        job.send(number)
        assert job.end() == 75
    assert f"{signal.Signals(number).name} arrived while" in job.said
    assert not run.exists(), "nothing was begun, so nothing is left"


def test_a_signal_while_reading_the_data_is_heard(run: Path) -> None:
    with Job(*command_for(run)) as job:
        job.wait_for("csv")
        job.send(signal.SIGINT)
        assert job.end() == 75
    assert "SIGINT arrived while" in job.said
    assert not run.exists(), "nothing was begun, so nothing is left"


def test_a_signal_during_the_first_evaluation_is_heard(run: Path, expected: dict[str, Any]) -> None:
    with Job(*command_for(run)) as job:
        job.until(lambda: (run / "base" / "files.json").exists(), "the base model")
        time.sleep(0.5)
        assert not job.seen("evaluated")
        job.send(signal.SIGUSR1)
        assert assert_saved(job, run, signal.SIGUSR1) == 0
        assert not job.seen("evaluated"), "it waited for the evaluation to end"
    assert_goes_on(run, expected)


def test_a_signal_in_a_step_saves_that_step_and_a_second_signal_hurries_nothing(run: Path, expected: dict[str, Any]) -> None:
    with Job(*command_for(run)) as job:
        job.wait_for("step", step=2)
        time.sleep(0.03)
        job.send(signal.SIGTERM)
        while job.process.poll() is None:
            job.send(signal.SIGTERM)
            time.sleep(0.01)
        assert assert_saved(job, run, signal.SIGTERM) in (3, 4, 5)
    assert_goes_on(run, expected)


def test_a_signal_during_a_save_is_heard(run: Path, expected: dict[str, Any]) -> None:
    due = f"s{CHECKPOINT_EVERY:012}"
    with Job(*command_for(run)) as job:
        job.until(lambda: any(folder.startswith(due) for folder in unfinished_saves(run)), "the save")
        job.send(signal.SIGTERM)
        assert assert_saved(job, run, signal.SIGTERM) >= CHECKPOINT_EVERY
    assert_goes_on(run, expected)


def test_a_signal_just_after_the_best_evaluation_keeps_the_best_weights(run: Path, expected: dict[str, Any]) -> None:
    with Job(*command_for(run)) as job:
        job.wait_for("evaluated", step=EVALUATE_EVERY, best=True)
        job.send(signal.SIGINT)
        assert_saved(job, run, signal.SIGINT)
    assert any(int(step) == EVALUATE_EVERY for _, step in committed(run)), "the best checkpoint was given up"
    assert_goes_on(run, expected)


def test_a_signal_during_the_export_is_heard(run: Path, expected: dict[str, Any]) -> None:
    with Job(*command_for(run)) as job:
        job.until(lambda: (run / "export").is_dir(), "the export")
        job.send(signal.SIGTERM)
        code = job.end()
        assert code in (0, 75), job.tail()
        if code == 75:
            assert not (run / "result.json").exists()
            assert assert_saved(job, run, signal.SIGTERM) == STEPS
    finish(command_for(run))
    assert_identical(run, expected)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, dict[str, Any], list[bytes]]]:
    """A terminal: the file to type into, arguments for Job, and what appears on it."""
    keyboard, screen = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        with contextlib.suppress(OSError):
            while text := os.read(keyboard, 4096):
                shown.append(text)

    streams = {"stdin": screen, "stdout": screen, "stderr": screen}
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield keyboard, {**streams, "start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}, shown
    finally:
        os.close(screen)
        os.close(keyboard)


def test_one_ctrl_c_on_a_terminal_saves_and_says_how_to_go_on(run: Path, expected: dict[str, Any]) -> None:
    with terminal() as (keyboard, streams, shown), Job(*command_for(run), **streams) as job:
        job.until(lambda: newest_step(run) >= 0, "a checkpoint")
        os.write(keyboard, b"\x03")
        assert job.end() == 75, b"".join(shown).decode()
        time.sleep(0.1)
        assert "Run the same command to go on" in b"".join(shown).decode()
    assert last_history_step(run) == newest_step(run)
    assert_goes_on(run, expected)


def test_a_second_ctrl_c_on_a_terminal_ends_it_at_once(run: Path) -> None:
    with terminal() as (keyboard, streams, _), Job(*command_for(run), **streams) as job:
        maps = Path(f"/proc/{job.process.pid}/maps")
        job.until(lambda: "libtorch" in maps.read_text(encoding="utf-8"), "the import of torch")
        os.write(keyboard, b"\x03")
        time.sleep(0.2)
        assert job.process.poll() is None, "the first Ctrl-C ends the import only at its end"
        os.write(keyboard, b"\x03")
        asked = time.monotonic()
        assert job.end() == 130
        assert time.monotonic() - asked < 1


def test_signals_on_top_of_each_other_cannot_block_the_handler() -> None:
    """A handler that takes a lock waits for itself when the next signal interrupts it. Here one does at its every line."""
    program = textwrap.dedent("""
        import signal, sys
        from job.runtime.stop import StopSignal

        def another(frame, event, argument):
            signal.raise_signal(signal.SIGUSR1)
            return another

        stop = StopSignal()
        stop.install()
        sys.settrace(another)
        signal.raise_signal(signal.SIGTERM)
        sys.settrace(None)
        assert stop.requested and stop.name
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=clean_environment(),
        timeout=20,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
