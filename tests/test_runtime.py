"""Signals, schedule, history, log, device, and the background writer."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from job.checkpoint.state import FACTS, OPTIMIZER, WEIGHTS, TrainState
from job.checkpoint.store import RunStore
from job.checkpoint.writer import CheckpointWriter
from job.errors import ConfigError, DeviceError, Stopped
from job.fields import Interval
from job.model.build import load_base
from job.model.optimizer import make_optimizer
from job.runtime.device import choose_device, choose_precision, decode_threads
from job.runtime.history import History
from job.runtime.log import JsonLines, ShortLines
from job.runtime.progress import Progress
from job.runtime.schedule import CheckpointClock, due_at_step
from job.runtime.stop import STOP_SIGNALS, StopSignal


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    stop = StopSignal()
    try:
        stop.install()
        stop.check("nothing")
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.name) == (True, number.name)
        with pytest.raises(Stopped, match=f"{number.name} arrived while reading"):
            stop.check("reading")
    finally:
        for one, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(one, handler)


def test_handler_is_there_before_anything_heavy_is_imported() -> None:
    code = (
        "import signal, sys\n"
        "import job.launch as launch\n"
        "def look(arguments, stop):\n"
        "    heavy = [name for name in ('torch', 'pandas', 'click', 'fsspec') if name in sys.modules]\n"
        "    print(signal.getsignal(signal.SIGTERM).__qualname__, heavy)\n"
        "    return 0\n"
        "launch.run_command = look\n"
        "sys.argv = ['clipjob', 'train']\n"
        "launch.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "StopSignal._handle []"


@pytest.mark.parametrize(
    ("interval", "steps_per_epoch", "due"),
    [
        ("10", 7.0, [10, 20, 30]),
        ("1ep", 10.0, [10, 20, 30]),
        ("1ep", 7.5, [8, 15, 23, 30]),
        ("0.5ep", 10.0, [5, 10, 15, 20, 25, 30]),
        ("auto", 10.0, [10, 20, 30]),
        ("0", 10.0, []),
        ("2ep", 0.5, list(range(1, 31))),
    ],
)
def test_steps_at_which_an_interval_is_due(interval: str, steps_per_epoch: float, due: list[int]) -> None:
    parsed = Interval.parse(interval)
    assert [step for step in range(31) if due_at_step(parsed, step, steps_per_epoch=steps_per_epoch)] == due


def test_auto_saves_more_rarely_when_saving_costs_more_but_never_beyond_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = CheckpointClock(Interval("auto"), steps_per_epoch=10)
    assert not clock.due(3)
    now += 61
    assert clock.due(3)
    clock.saved(stall_seconds=0.2, upload_seconds=12.0)  # 0.2 s of stall: 40 s at 0.5 %; 12 s of upload: 120 s at 10 %
    now += 119
    assert not clock.due(4)
    now += 2
    assert clock.due(4)
    clock.saved(stall_seconds=60.0, upload_seconds=900.0)
    now += 599
    assert not clock.due(5)
    now += 2
    assert clock.due(5)


class Report:
    def __init__(self, step: int, read: list[int]) -> None:
        self._step, self._read = step, read

    def read(self) -> dict[str, Any]:
        self._read.append(self._step)
        return {"step": self._step, "loss": None if self._step == 2 else 1.5}


def test_history_reads_a_step_after_the_next_was_queued() -> None:
    read: list[int] = []
    history = History(lambda _row: None)
    history.add(Report(1, read), data_wait_seconds=0.5)
    assert read == []
    history.add(Report(2, read), data_wait_seconds=0.5)
    assert read == [1]
    rows = [json.loads(line) for line in history.to_bytes().splitlines()]
    assert read == [1, 2]
    assert [(row["step"], row["loss"], row["data_wait_seconds"]) for row in rows] == [(1, 1.5, 0.5), (2, None, 0.5)]


def test_seconds_of_a_row_are_those_of_its_step_however_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rows: list[dict[str, Any]] = []
    history = History(rows.append)
    for step in (1, 2, 3):
        now += 2.0
        history.add(Report(step, []), data_wait_seconds=0.0)
    now += 0.5  # what a queued step still took
    history.flush()
    now += 60.0  # an evaluation
    history.restart_clock()
    now += 2.0
    history.add(Report(4, []), data_wait_seconds=0.0)
    history.flush()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["seconds"] for row in rows] == [2.0, 2.0, 2.5, 2.0]


def record(**extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": "step", "levelname": "INFO", "levelno": logging.INFO, **extra})


def test_log_lines_are_json_with_their_fields() -> None:
    line = json.loads(JsonLines().format(record(step=3, loss=0.25, path=Path("/x"))))
    assert (line["event"], line["level"], line["step"], line["loss"], line["path"]) == ("step", "info", 3, 0.25, "/x")


def test_a_terminal_gets_short_lines() -> None:
    assert ShortLines().format(record(step=3, loss=0.123456)) == "step (step 3, loss 0.1235)"


def test_a_gpu_asked_for_and_absent_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("cuda", "cuda:3"):
        with pytest.raises(DeviceError, match=f"--device {name} can't be used"):
            choose_device(name)
    assert choose_device("auto").type in ("cpu", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:", ""])
def test_a_device_that_does_not_exist_is_a_bad_flag(name: str) -> None:
    if name == "cuda:" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ConfigError, DeviceError)):
        choose_device(name)


def test_precision_and_threads() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) in ("fp32", "bf16")
    assert choose_precision("fp32", cpu) == "fp32"
    with pytest.raises(DeviceError, match="fp16 needs a GPU"):
        choose_precision("fp16", cpu)
    assert decode_threads(3) == 3
    assert 1 <= decode_threads(0) <= 16


def trained_state(folder: Path) -> TrainState:
    clip = tiny.make_clip(folder)
    state = TrainState(clip.module, make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6), None)
    for parameter in clip.module.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.step, state.seconds = 7, 12.5
    assert state.take_metrics({"mean_recall": 0.25})
    return state


def test_a_saved_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained_state(tmp_path)
    store = RunStore(str(tmp_path / "run"))
    store.create_config({"format": 1, "config": {}})
    store.claim({})
    writer = CheckpointWriter(store, scratch=tmp_path, keep=2, keep_every=0)
    writer.save(state, b'{"kind": "step", "step": 7}\n', info={"evaluated": True})
    with torch.no_grad():  # training goes on at once, and must not reach into the copy
        expected = {name: tensor.clone() for file in state.tensors().values() for name, tensor in file.items()}
        for parameter in state.model.parameters():
            parameter.zero_()
    writer.wait()
    found = RunStore(str(tmp_path / "run")).restore(tmp_path / "restored")
    assert found is not None
    assert len({(found.folder / name).stat().st_mode for name in (WEIGHTS, OPTIMIZER, FACTS)}) == 1
    clip = load_base(tmp_path / "base", weights=found.folder / WEIGHTS)
    again = TrainState(clip.module, make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6), None)
    again.restore(found.folder, found.commit.files)
    assert again.facts() == state.facts()
    tensors = {name: tensor for file in again.tensors().values() for name, tensor in file.items()}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_only_better_metrics_become_the_best(tmp_path: Path) -> None:
    state = trained_state(tmp_path)
    state.step = 8
    assert not state.take_metrics({"mean_recall": 0.25})
    assert (state.best_step, state.evaluated_step) == (7, 8)
    state.step = 9
    assert state.take_metrics({"mean_recall": 0.26})
    assert (state.best_step, state.best) == (9, {"mean_recall": 0.26})


@pytest.mark.parametrize(
    ("of_base", "of_best", "score", "held_out", "last_is_best"),
    [
        (0.1, 0.25, 0.24, 64, True),
        (0.1, 0.25, 0.25 - 0.053, 64, True),
        (0.1, 0.25, 0.25 - 0.055, 64, False),
        (0.1, 0.25, 0.24, 10_000, False),
        (0.1, 0.25, 0.3, 10_000, True),
        (0.245, 0.25, 0.24, 64, False),
        (0.25, 0.25, 0.25, 64, False),
        (0.9, 1.0, 1.0, 64, True),
    ],
    ids=["alike", "just", "lower", "lower, of many", "higher", "lower than the base", "no better than the base", "all right"],
)
def test_the_last_step_is_the_best_where_held_out_pairs_cannot_tell(
    tmp_path: Path, of_base: float, of_best: float, score: float, held_out: int, last_is_best: bool
) -> None:
    state = trained_state(tmp_path)
    state.before, state.best_score, state.step = {"mean_recall": of_base}, of_best, 8
    assert state.take_metrics({"mean_recall": score}, last_of=held_out) is last_is_best
    assert state.best_step == (8 if last_is_best else 7)


def test_the_log_says_where_an_interval_went_and_once_what_helps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, spent = [0.0], {"productive": 0.0, "data_wait": 0.0}
    monkeypatch.setattr("job.runtime.progress.time.monotonic", lambda: clock[0])
    progress = Progress(
        steps=100, done=0, every=Interval("steps", 1), steps_per_epoch=10, seconds_by_state=lambda: spent, remedy=lambda: "Do this."
    )
    row = {"loss": 1.0, "accuracy_image_to_text": 0.5, "seconds": 2.0, "data_wait_seconds": 1.5, "kind": "step", "pairs": 4}
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            clock[0] += 2.0
            spent["productive"] += 0.5
            spent["data_wait"] += 1.5
            progress.step({**row, "step": step}, samples=4)
    lines = [record for record in caplog.records if record.getMessage() == "step"]
    assert [vars(line)["time_spent"] for line in lines] == [{"productive": 0.25, "data_wait": 0.75}] * 3
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["75 % of the time went into waiting for data. Do this."]  # not of the first interval, and once


def test_no_field_takes_the_place_of_time_level_and_event() -> None:
    record = logging.makeLogRecord(
        {"msg": "step", "levelname": "INFO", "time": {"a": 1}, "level": 3, "event": "other", "loss": 2.0}
    )
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["event"], line["loss"]) == ("info", "step", 2.0)
    assert line["time"].endswith("Z")
