"""--lr auto: a rate is found before the first step, nothing else changes, and the run survives what every run survives."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from system import Job, assert_identical, finish, outcome, run_to_end, train_words

from job.checkpoint.store import RunStore
from job.range_test import COST, LARGEST_SHARE, RATE_OF_NEW_WEIGHTS, RATES, best_rate

STEPS = 210
"""Two directions."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("range")
    csv, lmdb = tiny.write_data(folder, 120)
    model = tiny.write_config(folder)

    def words(run: Path, **more: Any) -> list[str]:
        settings: dict[str, Any] = {
            "csv": csv,
            "lmdb": lmdb,
            "run": run,
            "init_from": folder / "base",
            "model": model,
            "scratch": folder / "scratch",
            "global_batch_size": 16,
            "max_steps": STEPS,
            "lr": "auto",
            "precision": "fp32",
            "torch_threads": 1,
            "threads": 2,
            "device": "cpu",
            "metrics_port": 0,
            "log_every": 1,
            "checkpoint_every": 20,
            "evaluate_every": 100,
            **more,
        }
        return train_words(settings)

    finish(words(folder / "base", init_from=None, lr=1e-3, max_steps=40))
    return words


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]) -> tuple[Path, Job]:
    run = tmp_path_factory.mktemp("calm") / "run"
    return run, finish(command(run))


def found_by(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = (RunStore(str(run)).result() or {})["range_test"]
    return found


@pytest.mark.parametrize(("centre", "expected"), [(3e-4, 3e-4), (2e-4, 2e-4), (1e-7, 1e-5), (1.0, 3e-3)])
def test_the_best_rate_is_where_the_curve_is_least(centre: float, expected: float) -> None:
    losses = [(math.log(rate) - math.log(centre)) ** 2 for rate in RATES]
    assert best_rate(RATES, losses) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([4.0, 3.0, 2.0, math.nan, math.inf, math.nan], 1e-4), ([math.nan] * 6, 1e-5), ([math.inf, 3.0, 2.0, 1.9, 2.5, 4.0], None)],
)
def test_rates_that_diverge_are_never_the_best(losses: list[float], expected: float | None) -> None:
    found = best_rate(RATES, losses)
    assert found == expected if expected else 1e-4 < found < 1e-3


def test_what_is_found_is_kept_told_and_cheap(calm: tuple[Path, Job]) -> None:
    run, job = calm
    found = found_by(run)
    [line] = job.seen("learning rate")
    assert {name: line[name] for name in found} == found
    assert found["rates"] == list(RATES)
    assert len(set(found["losses"])) == len(RATES)
    assert RATES[0] <= found["lr"] <= RATES[-1]
    assert 2 * COST <= LARGEST_SHARE * STEPS
    assert max(row["lr"] for row in RunStore(str(run)).read_history() if row["kind"] == "step") == pytest.approx(found["lr"])
    assert f"<td>{found['lr']:g}</td>" in (run / "report.html").read_text(encoding="utf-8")


def test_the_run_is_that_of_the_rate_given_by_hand(
    tmp_path: Path, command: Callable[..., list[str]], calm: tuple[Path, Job]
) -> None:
    """So the test leaves weights, optimiser, order and random numbers as they were."""
    finish(command(tmp_path / "run", lr=found_by(calm[0])["lr"]))
    assert_identical(tmp_path / "run", outcome(calm[0]))


@pytest.mark.parametrize(
    "more",
    [{"micro_batch": 5}, {"lock_image": True, "crop_scale": 1}, {"soft_targets": 0.2}],
    ids=["micro-batch", "locked", "soft-targets"],
)
def test_so_it_is_with_other_ways_to_train(tmp_path: Path, command: Callable[..., list[str]], more: dict[str, Any]) -> None:
    settings = {"max_steps": 100, **more}
    finish(command(tmp_path / "auto", **settings))
    found = found_by(tmp_path / "auto")
    assert len(set(found["losses"])) == len(RATES)
    finish(command(tmp_path / "given", **{**settings, "lr": found["lr"]}))
    assert_identical(tmp_path / "given", outcome(tmp_path / "auto"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_struck_before_its_first_step_goes_on_to_the_bit(
    tmp_path: Path, command: Callable[..., list[str]], calm: tuple[Path, Job], number: signal.Signals
) -> None:
    with Job(*command(tmp_path / "run")) as first:
        first.wait_for("trying learning rates")
        first.send(number)
        assert first.end() == (75 if number == signal.SIGTERM else -number)
        assert not first.seen("learning rate"), "the signal came too late for this test"
    finish(command(tmp_path / "run"))
    assert_identical(tmp_path / "run", outcome(calm[0]))
    assert found_by(tmp_path / "run") == found_by(calm[0])


def test_a_later_attempt_does_not_test_again(tmp_path: Path, command: Callable[..., list[str]], calm: tuple[Path, Job]) -> None:
    with Job(*command(tmp_path / "run")) as first:
        first.wait_for("checkpoint", step=20)
        first.send(signal.SIGKILL)
        first.end()
    again = finish(command(tmp_path / "run"))
    assert not again.seen("learning rate")
    assert_identical(tmp_path / "run", outcome(calm[0]))


def test_two_ranks_find_what_one_finds(tmp_path: Path, command: Callable[..., list[str]], calm: tuple[Path, Job]) -> None:
    finish(command(tmp_path / "run", nproc_per_node=2, max_steps=STEPS, threads=1))
    one, two = found_by(calm[0]), found_by(tmp_path / "run")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["lr"] == pytest.approx(one["lr"], rel=0.05)


@pytest.mark.parametrize(("first", "then"), [("auto", 1e-4), (1e-4, "auto")])
def test_a_restart_can_not_change_between_auto_and_a_rate(
    tmp_path: Path, command: Callable[..., list[str]], first: Any, then: Any
) -> None:
    finish(command(tmp_path / "run", lr=first, max_steps=100))
    (tmp_path / "run" / "result.json").unlink()
    code, job = run_to_end(command(tmp_path / "run", lr=then, max_steps=100))
    assert code == 78, job.tail()
    assert "--lr was" in job.said


def test_weights_of_a_folder_have_learnt(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    words = command(tmp_path / "run", max_steps=100)
    base = Path(words[words.index("--init-from") + 1])
    finish(command(tmp_path / "run", init_from=None, model=base / "export" / "final", max_steps=100))
    assert found_by(tmp_path / "run")["losses"]


def test_random_weights_get_the_usual_rate(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    job = finish(command(tmp_path / "run", init_from=None, max_steps=6))
    assert job.seen("learning rate, the usual one of random weights", lr=RATE_OF_NEW_WEIGHTS)
    assert found_by(tmp_path / "run")["lr"] == RATE_OF_NEW_WEIGHTS


def test_a_run_too_short_for_it_leaves_nothing_behind(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    code, job = run_to_end(command(tmp_path / "run", max_steps=99))
    assert code == 2, job.tail()
    assert "--lr auto measures for 3 steps, more than 3% of a run of 99. Give --lr" in job.said
    assert not (tmp_path / "run").exists()
    finish(command(tmp_path / "run", max_steps=5, lr=1e-4))
