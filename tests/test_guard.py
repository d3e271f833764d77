"""Other data that the model must not forget, scored beside the held-out ones; and runs that end when they get no better."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from system import Job, assert_identical, finish, outcome, run_to_end, train_words
from test_evaluate import evaluate
from test_export import export

from job.checkpoint.store import RunStore
from job.config import Config
from job.errors import ConfigError
from job.evaluate.alpha import ALPHAS


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("guard")
    csv, lmdb = tiny.write_data(folder, 120)
    model = tiny.write_config(folder)
    keys = [f"other/{number}.jpg" for number in range(24)]
    tiny.write_lmdb(folder / "guard.lmdb", {key: tiny.picture(1000 + at) for at, key in enumerate(keys)})
    lines = "".join(f"{key},a thing of another kind {at}\n" for at, key in enumerate(keys))
    (folder / "guard.csv").write_text("filepath,title\n" + lines, encoding="utf-8")  # other columns than the training data

    def words(run: Path, **more: Any) -> list[str]:
        settings: dict[str, Any] = {
            "csv": csv,
            "lmdb": lmdb,
            "model": model,
            "run": run,
            "scratch": folder / "scratch",
            "global_batch_size": 16,
            "max_steps": 12,
            "evaluate_every": 4,
            "val_fraction": 0.2,
            "lr": 1e-3,
            "precision": "fp32",
            "torch_threads": 1,
            "threads": 2,
            "device": "cpu",
            "metrics_port": 0,
            "log_every": 1,
            "guard_csv": folder / "guard.csv",
            "guard_lmdb": folder / "guard.lmdb",
            **more,
        }
        return train_words(settings)

    return words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_guard_is_scored_from_step_0_as_evaluate_scores_it(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    words = command(tmp_path / "run")
    finish(words)
    store = RunStore(str(tmp_path / "run"))
    rows = [row for row in store.read_history() if row["kind"] == "evaluation"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    data = ("--csv", option(words, "--guard-csv"), "--lmdb", option(words, "--guard-lmdb"), "--task", "retrieval")
    result = store.result() or {}
    found = evaluate(tmp_path / "run" / "export" / "final", *data, "--batch-size", 16, "--precision", "fp32")[0]["metrics"]
    after = {name.removeprefix("guard_"): value for name, value in result["after"].items() if name.startswith("guard_")}
    assert len(after) == 8
    assert after.keys() <= found.keys()
    assert {name: found[name] for name in after} == pytest.approx(after)
    assert {name for name in result["before"] if name.startswith("guard_")} == {f"guard_{name}" for name in after}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Recall on the guard" in page
    facts = export(tmp_path / "run", tmp_path / "out")  # by the run's own guard
    assert "loses at most 0.01 of recall@5 on guard." in facts["why"]
    assert [row["alpha"] for row in facts["scores"]] == list(ALPHAS)
    of_base = {name: value for name, value in result["before"].items() if name.startswith("guard_")}
    assert {f"guard_{name}": facts["scores"][0]["guard"][name] for name in after} == pytest.approx(of_base)


def test_a_guard_that_changed_or_is_gone_ends_the_restart(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    words = command(tmp_path / "run")
    finish(words)
    (tmp_path / "run" / "result.json").unlink()
    without = command(tmp_path / "run", guard_csv="", guard_lmdb="")
    other = tiny.write_csv(tmp_path / "other.csv", [("other/1.jpg", "something else")])
    for changed in (without, command(tmp_path / "run", guard_csv=other)):
        code, job = run_to_end(changed)
        assert code == 78, job.tail()
        assert "the guard CSV's sha256" in job.said


def test_a_run_that_gets_no_better_is_complete_after_as_many_evaluations_as_patience_says(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    """With a learning rate that changes nothing, no evaluation after the first is better."""
    settings = {"lr": 1e-30, "patience": 2, "max_steps": 400, "evaluate_every": 3}
    calm = finish(command(tmp_path / "calm", **settings))
    result = RunStore(str(tmp_path / "calm")).result() or {}
    assert (result["outcome"], result["step"], result["best_step"]) == ("complete", 6, 0)
    assert calm.seen("complete: no better one in as many evaluations as --patience", best_step=0)
    with Job(*command(tmp_path / "killed", **settings)) as first:
        first.wait_for("evaluated", step=3)
        first.process.kill()
        first.end()
    finish(command(tmp_path / "killed", **settings))
    assert_identical(tmp_path / "killed", outcome(tmp_path / "calm"))


def test_patience_that_is_over_is_over_for_a_restart_as_well(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    settings = {"lr": 1e-30, "patience": 1, "max_steps": 400, "evaluate_every": 3}
    finish(command(tmp_path / "run", **settings))
    for name in ("result.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    again = finish(command(tmp_path / "run", **settings))
    assert not again.seen("step")
    assert (RunStore(str(tmp_path / "run")).result() or {})["step"] == 3


def test_the_best_checkpoint_is_that_of_the_chosen_metric_or_the_last(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    name = "image_retrieval_recall@1"
    held_out = finish(command(tmp_path / "run", best_metric=name, max_steps=24)).seen("data")[0]["held_out"]
    store = RunStore(str(tmp_path / "run"))
    rows = [row for row in store.read_history() if row["kind"] == "evaluation"]
    assert rows[-1]["step"] == 24
    best = max(rows, key=lambda row: row[name])  # the first of equals
    error = (best[name] * (1 - best[name]) / held_out) ** 0.5
    last_is_alike = rows[0][name] < rows[-1][name] >= best[name] - error
    assert (store.result() or {})["best_step"] == (24 if last_is_alike else best["step"])


@pytest.mark.parametrize("given", [{"guard_csv": "a.csv"}, {"guard_lmdb": "a.lmdb"}])
def test_a_guard_needs_both(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="give both or neither"):
        Config(run="r", csv="c", lmdb="l", **given)
