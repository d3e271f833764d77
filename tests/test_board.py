"""TensorBoard's own reader finds what a run wrote, and of steps done twice only the second time."""

from pathlib import Path

import pytest
from system import finish, run_to_end, train_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from job.runtime.board import Board


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def row(step: int, loss: float | None) -> dict[str, float | int | None]:
    return {"step": step, "loss": loss, "lr": 1e-3, "gradient_norm": 1.0}


def test_steps_that_are_done_again_show_once(tmp_path: Path) -> None:
    first = Board(tmp_path, step=0)
    for step in (1, 2, 3, 4):
        first.row(row(step, 10.0 + step), samples_per_second=5.0)
    first.evaluated({"image_retrieval_recall@1": 0.5}, step=4)
    first.close()
    second = Board(tmp_path, step=2)
    for step in (3, 4):
        second.row(row(step, 20.0 + step), samples_per_second=5.0)
    second.row(row(5, None), samples_per_second=5.0)
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert [step for step, _ in scalars(tmp_path, "train/lr")] == [1, 2, 3, 4, 5]


def test_a_disk_that_fails_costs_the_events_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = Board(tmp_path, step=0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    board._writer.add_scalar = fail
    board.row(row(1, 1.0), samples_per_second=5.0)
    board.row(row(2, 1.0), samples_per_second=5.0)
    board.close()
    assert [record.message for record in caplog.records] == ["no more events for TensorBoard in this attempt"]


@pytest.mark.system
def test_a_run_writes_its_steps_and_its_evaluations(tmp_path: Path) -> None:
    settings = {
        "max_steps": 4,
        "global_batch_size": 16,
        "val_fraction": 0.02,
        "evaluate_every": 2,
        "tensorboard": tmp_path / "events",
    }
    finish(train_command(tmp_path / "run", **settings))
    assert [step for step, _ in scalars(tmp_path / "events", "train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path / "events", "held_out/image_retrieval_recall@5")] == [0, 2, 4]


@pytest.mark.system
def test_a_folder_that_cannot_be_made_is_a_bad_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, job = run_to_end(train_command(tmp_path / "run", max_steps=1, tensorboard=tmp_path / "file" / "events"))
    assert (code, "--tensorboard" in job.said) == (2, True)
