"""The ledger's promises: every second has a state, sums survive restarts, and what a kill has cost is known to one beacon."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system import Job, newest_step, removed_afterwards, train_command

from job.checkpoint.store import RunStore
from job.runtime.ledger import STATES, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_second_belongs_to_the_state_it_was_spent_in(clock: Clock) -> None:
    ledger = Ledger(clock=clock, already=3.0)
    for state, seconds in (("startup", 2.0), ("staging", 5.0), ("data_wait", 1.0), ("productive", 7.0), ("data_wait", 0.5)):
        ledger.enter(state)
        clock.now += seconds
    assert ledger.seconds == dict.fromkeys(STATES, 0.0) | {"startup": 5.0, "staging": 5.0, "data_wait": 1.5, "productive": 7.0}
    assert ledger.total_seconds == clock.now - 100.0 + 3.0
    assert ledger.goodput == pytest.approx(7.0 / 18.5)


def test_a_state_within_another_returns_to_it_whatever_happens(clock: Clock) -> None:
    ledger = Ledger(clock=clock)
    ledger.enter("productive")
    clock.now += 1
    with contextlib.suppress(RuntimeError), ledger.within("evaluate"):
        clock.now += 10
        raise RuntimeError
    clock.now += 2
    assert (ledger.seconds["productive"], ledger.seconds["evaluate"]) == (3.0, 10.0)


def at(clock: Clock, **seconds: float) -> Ledger:
    """A ledger after so many seconds of each state."""
    ledger = Ledger(clock=clock)
    for state, spent in seconds.items():
        ledger.enter(state)
        clock.now += spent
    ledger.enter("startup")
    return ledger


def test_a_graceful_restart_goes_on_adding(clock: Clock) -> None:
    first = at(clock, startup=4, productive=20).to_json()
    second = at(clock, startup=5)
    second.go_on(first, step=10, beacon={"step": 10, "ledger": first}, restarts=1, preempted=True)
    assert (second.seconds["startup"], second.seconds["productive"], second.seconds["recompute"]) == (9.0, 20.0, 0.0)
    assert (second.restarts, second.preemptions, second.lost_steps) == (1, 1, 0)


def test_steps_after_the_last_commit_are_lost_and_no_sum_falls(clock: Clock) -> None:
    first = at(clock, startup=4, productive=20)
    committed = first.to_json()
    for state, seconds in (("data_wait", 1), ("productive", 6), ("evaluate", 2)):
        first.enter(state)
        clock.now += seconds
    beacon = {"step": 13, "ledger": first.to_json()}
    second = at(clock, startup=5)
    second.go_on(committed, step=10, beacon=beacon, restarts=1, preempted=False)
    assert second.seconds["productive"] == 26.0
    assert second.total_seconds == 4 + 20 + 9 + 5
    assert (second.lost_steps, second.recompute_until) == (3, 13)


def test_attempts_that_die_before_a_commit_add_up(clock: Clock) -> None:
    """The third starts from the commit that the second started from; the second's beacon carries what the first had lost."""
    committed = at(clock, startup=4, productive=20).to_json()
    second = at(clock, startup=5)
    second.go_on(committed, step=10, beacon={"step": 13, "ledger": committed}, restarts=1, preempted=False)
    second.enter("productive")
    clock.now += 8
    beacon = {"step": 14, "ledger": second.to_json()}
    third = at(clock, startup=6)
    third.go_on(committed, step=10, beacon=beacon, restarts=2, preempted=False)
    assert third.lost_steps == 3 + 4
    assert third.recompute_until == 14
    assert third.seconds["productive"] == 20 + 8
    assert third.seconds["startup"] == 4 + 5 + 6


def test_what_was_left_out_is_counted_through_attempts(clock: Clock) -> None:
    first = at(clock, productive=20)
    first.skipped_samples, first.nonfinite_steps = 4, 1
    committed = first.to_json()
    first.skipped_samples += 2
    second = at(clock, startup=5)
    second.go_on(committed, step=10, beacon={"step": 13, "ledger": first.to_json()}, restarts=1, preempted=False)
    second.skipped_samples += 1
    assert (second.to_json()["skipped_samples"], second.to_json()["nonfinite_steps"]) == (7, 1)


def test_a_run_from_before_there_was_a_ledger_goes_on(clock: Clock) -> None:
    ledger = at(clock, startup=2)
    ledger.go_on({}, step=7, beacon=None, restarts=3, preempted=False)
    assert ledger.total_seconds == 2.0
    assert ledger.restarts == 3


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "runs") as place:
        yield place


def seconds_in(told: dict[str, Any]) -> float:
    """Of all states. Args: told: by a beacon, or by the info of a commit."""
    return float(sum(told["ledger"]["seconds"].values()))


@pytest.mark.system
def test_states_add_up_to_wall_time_through_a_kill(folder: Path) -> None:
    run = folder / "run"
    settings = {"global_batch_size": 16, "val_fraction": 0.02, "evaluate_every": 0, "torch_threads": 1, "checkpoint_every": 30}
    command = train_command(run, scratch=folder / "scratch", max_steps=120, **settings)
    with Job(*command, forked=False) as job:  # imports are a part of its time
        started = time.time()
        job.until(lambda: newest_step(run) >= 30, "step 30")
        job.until(lambda: max((line["step"] for line in job.seen("step")), default=0) >= 45, "step 45")
        job.send(signal.SIGKILL)
        job.end()
        killed = time.time()
    beacon = json.loads((run / "attempts" / "000001-beacon.json").read_text(encoding="utf-8"))
    told = [beacon, RunStore(str(run)).commits()[0].info]
    for one in told:
        assert seconds_in(one) == pytest.approx(one["at"] - started, rel=0.01)
    known = max(map(seconds_in, told))
    assert killed - started - known < 10.0 + 4.0  # one beacon, and the time that writing it took
    with Job(*command, forked=False) as job:
        started = time.time()
        assert job.end() == 0
    end = RunStore(str(run)).commits()[0].info
    assert seconds_in(end) == pytest.approx(known + end["at"] - started, rel=0.01)
    last = end["ledger"]
    assert last["restarts"] == 1
    assert 0 <= last["lost_steps"] == max(0, beacon["step"] - 30)
    assert (last["seconds"]["recompute"] > 0) == (last["lost_steps"] > 0)
