"""Starting again: what may change and what may not, damaged checkpoints, two attempts at once, attempts that get nowhere, no
network, S3, old formats.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3server import S3Server
from system import (
    Job,
    assert_identical,
    finish,
    last_history_step,
    names_in,
    newest_step,
    outcome,
    removed_afterwards,
    run_to_end,
    snapshot,
    tensors_of,
    train_command,
    unfinished_saves,
)

from job.checkpoint.state import FACTS, OPTIMIZER, WEIGHTS, TrainState
from job.checkpoint.store import Commit, RunStore
from job.demo import settings as demo_settings
from job.model.build import load_base
from job.model.optimizer import make_optimizer
from job.storage import files

pytestmark = pytest.mark.system

STEPS = 24
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": 8,
    "checkpoint_every": 4,
    "precision": "fp32",
    "threads": 2,
    "torch_threads": 1,
}
FIXTURE = Path(__file__).parent / "fixtures" / "run-format-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with removed_afterwards(tmp_path_factory.mktemp("resume")) as place:
        yield place


@pytest.fixture(scope="module")
def command(folder: Path) -> Callable[..., list[str]]:
    """command(run, …) trains, as always but for the given settings. Its model config is a file that may go once a run began."""
    model = folder / "model.json"
    shutil.copy(demo_settings()["model"], model)

    def make(run: Path | str, **changes: Any) -> list[str]:
        return train_command(run, **{"model": model, "scratch": folder / "scratch", **SETTINGS, **changes})

    return make


@pytest.fixture(scope="module")
def complete(folder: Path, command: Callable[..., list[str]]) -> Path:
    """A run that nobody interrupted. Leave it as it is."""
    finish(command(folder / "complete"))
    return folder / "complete"


@pytest.fixture(scope="module")
def expected(complete: Path) -> dict[str, Any]:
    return outcome(complete)


@pytest.fixture(scope="module")
def stopped(folder: Path, command: Callable[..., list[str]]) -> Path:
    """A run that was stopped on its way, with two checkpoints. Leave it as it is."""
    run = folder / "stopped"
    with Job(*command(run, keep_checkpoints=3)) as job:
        job.wait_for("step", step=12)
        job.send(signal.SIGTERM)
        assert job.end() == 75, job.tail()
    assert 12 < newest_step(run) < 16
    assert len(RunStore(str(run)).commits()) >= 3
    return run


@pytest.fixture
def halfway(stopped: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, by hard links: replace files in it, don't write into them."""
    with removed_afterwards(tmp_path / "copy") as place:
        yield Path(shutil.copytree(stopped, place / "run", copy_function=os.link))


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# What may change, and what may not


def test_decode_threads_may_change_and_torch_threads_are_adopted(
    halfway: Path, command: Callable[..., list[str]], expected: dict[str, Any]
) -> None:
    job = finish(command(halfway, threads=1, torch_threads=None, checkpoint_every="5", keep_checkpoints=4, log_every="3"))
    assert len(job.seen("resumed")) == 1
    assert_identical(halfway, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.5}, ("--lr", "0.001", "0.5")),
        ({"model": "ViT-B-16"}, ("--model", "model.json", "ViT-B-16")),
        ({"global_batch_size": 32}, ("--global-batch-size", "16", "32")),
    ],
    ids=["lr", "model", "batch-size"],
)
def test_another_setting_is_refused_by_name(
    change: dict[str, Any], words: tuple[str, ...], stopped: Path, command: Callable[..., list[str]]
) -> None:
    before = snapshot(stopped)
    code, job = run_to_end(command(stopped, **change))
    assert code == 78, job.tail()
    assert all(word in job.said for word in words), job.said
    assert snapshot(stopped) == before


def test_other_data_is_refused_by_name(stopped: Path, tmp_path: Path, command: Callable[..., list[str]]) -> None:
    before = snapshot(stopped)
    csv = tmp_path / "data.csv"
    csv.write_text(Path(demo_settings()["csv"]).read_text(encoding="utf-8").replace("grinning face", "face that grins", 1))
    code, job = run_to_end(command(stopped, csv=csv))
    assert code == 78, job.tail()
    assert "the CSV's sha256" in job.said
    assert "the LMDB" not in job.said
    code, job = run_to_end(command(stopped, lmdb=lmdb_with_one_more(tmp_path / "images.lmdb")))
    assert code == 78, job.tail()
    assert all(words in job.said for words in ("the LMDB", "2465", "2466")), job.said
    assert "the CSV" not in job.said
    assert snapshot(stopped) == before


def test_attempts_that_get_nowhere_come_to_an_end(
    halfway: Path, expected: dict[str, Any], command: Callable[..., list[str]]
) -> None:
    for _ in range(2):
        RunStore(str(halfway)).claim({})  # killed before any checkpoint
    before = newest_step(halfway)
    code, job = run_to_end(command(halfway, max_idle_attempts=2))
    assert code == 70, job.tail()
    assert "The last 2 attempts" in job.said
    assert "higher --max-idle-attempts" in job.said
    assert newest_step(halfway) == before
    finish(command(halfway, max_idle_attempts=3))
    assert_identical(halfway, expected)


def lmdb_with_one_more(path: Path) -> Path:
    import lmdb

    shutil.copytree(demo_settings()["lmdb"], path)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"one more", b"image")
    return path


def test_a_complete_run_says_so_at_once(complete: Path, expected: dict[str, Any], command: Callable[..., list[str]]) -> None:
    before = snapshot(complete)
    began = time.monotonic()
    code, job = run_to_end(command(complete), python=["-X", "importtime"])
    assert time.monotonic() - began < 3
    assert code == 0, job.tail()
    assert "this run is complete" in job.said
    assert f"{STEPS} steps" in job.output
    imported = {line.rsplit("|", 1)[-1].strip() for line in job.text if line.startswith("import time:")}
    assert "job.cli" in imported
    assert not {"torch", "open_clip", "pandas"} & imported
    code, job = run_to_end(command(complete, lr=0.5))
    assert code == 78, job.tail()
    assert "--lr" in job.said
    assert snapshot(complete) == before


# Damaged checkpoints


def truncate(run: Path, commit: Commit) -> None:
    path = run / "data" / commit.data / WEIGHTS
    rewrite(path, path.read_bytes()[:-1000])


def flip_a_bit(run: Path, commit: Commit) -> None:
    path = run / "data" / commit.data / OPTIMIZER
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    rewrite(path, bytes(content))


def lose_a_file(run: Path, commit: Commit) -> None:
    (run / "data" / commit.data / FACTS).unlink()


def garble_the_commit(run: Path, commit: Commit) -> None:
    path = run / "commits" / commit.name
    rewrite(path, path.read_bytes()[:-40])


DAMAGES = [
    (truncate, f"{WEIGHTS} has"),
    (flip_a_bit, f"{OPTIMIZER} has changed since it was saved"),
    (lose_a_file, f"{FACTS} is missing"),
    (garble_the_commit, "not readable as JSON"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    damage: Callable[[Path, Commit], None],
    reason: str,
    halfway: Path,
    command: Callable[..., list[str]],
    expected: dict[str, Any],
) -> None:
    newest, before = RunStore(str(halfway)).commits()[:2]
    damage(halfway, newest)
    job = finish(command(halfway))
    (rejected,) = job.seen("checkpoint rejected")
    assert rejected["commit"] == newest.name
    assert reason in rejected["reason"]
    assert job.seen("resumed")[0]["step"] == before.step
    assert_identical(halfway, expected)


def test_if_no_checkpoint_is_sound_nothing_is_thrown_away(halfway: Path, command: Callable[..., list[str]]) -> None:
    commits = RunStore(str(halfway)).commits()
    for (damage, _), commit in zip((DAMAGES * len(commits))[: len(commits)], commits, strict=True):
        damage(halfway, commit)
    before = snapshot(halfway)
    code, job = run_to_end(command(halfway))
    assert code == 78, job.tail()
    assert all(commit.name in job.said for commit in commits)
    after = snapshot(halfway)
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("attempts/") for name in after.keys() - before.keys())


# Two attempts at once


LASTING = ("commits/", "data/", "export/", "result.json", "config.json")
"""Names in a run that an attempt which was replaced must not touch."""


def lasting(run: str) -> dict[str, bytes]:
    return {name: files.read_bytes(files.join(run, name)) for name in files.list_files(run) if name.startswith(LASTING)}


@pytest.mark.parametrize(
    ("place", "moment"), [("local", "step"), ("local", "save"), ("local", "export"), ("s3", "step"), ("s3", "save")]
)
def test_an_attempt_that_was_replaced_while_it_slept_changes_nothing(
    place: str,
    moment: str,
    halfway: Path,
    command: Callable[..., list[str]],
    expected: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    run, environment = str(halfway), {}
    if place == "s3":
        run, environment = request.getfixturevalue("s3_uri") + "/run", request.getfixturevalue("s3_server").environment
        for name in files.list_files(str(halfway)):
            files.upload(halfway / name, files.join(run, name))
    moments: dict[str, Callable[[Job], Any]] = {
        "step": lambda job: job.seen("step"),
        "save": lambda job: job.seen("resumed") and unfinished_saves(run),
        "export": lambda _job: names_in(run, "export"),
    }
    with Job(*command(run), environment=environment) as old:
        old.until(lambda: moments[moment](old), moment)
        old.send(signal.SIGSTOP)
        finish(command(run), environment=environment)
        before = lasting(run)
        old.send(signal.SIGCONT)
        code = old.end()
    assert code == 76, old.tail()
    assert "has claimed the run" in old.said
    assert lasting(run) == before
    assert files.abort_uploads(run) == 0
    assert_identical(run, expected)


# Other ways on


def test_init_from_starts_with_the_best_weights_of_another_run(
    complete: Path, expected: dict[str, Any], tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    with removed_afterwards(tmp_path / "runs") as place:
        finish(command(place / "next", init_from=complete, max_steps=2))
        assert tensors_of(str(place / "next" / "base" / "open_clip_model.safetensors")) == expected["export/best"]
        result = RunStore(str(place / "next")).result()
        assert result is not None
        assert result["before"] == expected["facts"]["best"]


def test_init_from_a_run_without_export_says_so(stopped: Path, tmp_path: Path, command: Callable[..., list[str]]) -> None:
    code, job = run_to_end(command(tmp_path / "next", init_from=stopped))
    assert code == 65, job.tail()
    assert "has no exported model" in job.said


def test_rm_removes_the_run_and_nothing_else(halfway: Path) -> None:
    (halfway / "notes.txt").write_text("mine")
    code, job = run_to_end(["rm", "--yes", str(halfway)])
    assert code == 0, job.tail()
    assert [path.name for path in halfway.iterdir()] == ["notes.txt"]
    code, job = run_to_end(["rm", "--yes", str(halfway)])
    assert code == 2, job.tail()
    assert (halfway / "notes.txt").read_text() == "mine"


def test_inspect_shows_a_run_as_it_is(halfway: Path, tmp_path: Path) -> None:
    step = newest_step(halfway)
    code, job = run_to_end(["inspect", "--json", str(halfway)])
    assert code == 0, job.tail()
    found = json.loads(job.output)
    assert (found["complete"], found["step"], found["config"]["max_steps"]) == (False, step, STEPS)
    assert {item["state"] for item in found["checkpoints"]} == {"sound"}
    assert found["attempts"][0]["end"]["reason"] == "SIGTERM"
    code, job = run_to_end(["inspect", str(halfway)])
    assert code == 0, job.tail()
    assert f"not complete, step {step}" in job.output
    assert "exit 75: SIGTERM" in job.output

    truncate(halfway, RunStore(str(halfway)).commits()[0])
    before = snapshot(halfway)
    code, job = run_to_end(["inspect", "--json", str(halfway)])
    assert code == 0, job.tail()
    states = [item["state"] for item in json.loads(job.output)["checkpoints"]]
    assert f"{WEIGHTS} has" in states[0]
    assert set(states[1:]) == {"sound"}
    code, job = run_to_end(["inspect", str(halfway)])
    assert code == 0, job.tail()
    assert f"{WEIGHTS} has" in job.output
    assert snapshot(halfway) == before

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    code, job = run_to_end(["inspect", str(tmp_path / "foreign")])
    assert code == 2, job.tail()
    assert "is not a run" in job.said


def test_a_restart_needs_neither_network_nor_the_model_it_began_with(
    halfway: Path, folder: Path, tmp_path: Path, command: Callable[..., list[str]], expected: dict[str, Any]
) -> None:
    again = command(halfway, model=folder / "gone" / "model.json")
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0:
        job = finish(again, before=alone)
    else:
        (tmp_path / "sitecustomize.py").write_text(
            "import socket\n\n\ndef refuse(*_):\n    raise OSError('no network here')\n\n\n"
            "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        )
        job = finish(again, environment={"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert len(job.seen("resumed")) == 1
    assert_identical(halfway, expected)


def test_a_signal_saves_to_s3_before_the_job_leaves(
    s3_uri: str, s3_server: S3Server, command: Callable[..., list[str]], expected: dict[str, Any]
) -> None:
    environment = s3_server.environment
    with Job(*command(s3_uri), environment=environment) as job:
        job.wait_for("step", step=6)
        job.send(signal.SIGTERM)
        assert job.end() == 75, job.tail()
    step = newest_step(s3_uri)
    assert step == last_history_step(s3_uri) >= 6
    job = finish(command(s3_uri), environment=environment)
    assert job.seen("resumed")[0]["step"] == step
    assert_identical(s3_uri, expected)


# A checkpoint of the released format


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "fixture")) / "run"


def test_a_checkpoint_of_format_1_is_restored(old_run: Path, tmp_path: Path) -> None:
    store = RunStore(str(old_run))
    stored = store.load_config()
    assert stored is not None
    restored = store.restore(tmp_path / "restored")
    assert restored is not None
    known = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
    clip = load_base(old_run / "base", weights=restored.folder / WEIGHTS)
    optimizer = make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    state = TrainState(clip.module, optimizer, None)
    state.restore(restored.folder, restored.commit.files)
    assert {name: state.facts()[name] for name in known["facts"]} == known["facts"]
    sums = {name: sum(tensor.double().sum().item() for tensor in content.values()) for name, content in state.tensors().items()}
    assert sums == pytest.approx(known["sums"], rel=1e-9)
    moments = [set(optimizer.state[parameter]) for parameter in clip.module.parameters() if parameter in optimizer.state]
    assert moments
    assert all(names == {"step", "exp_avg", "exp_avg_sq"} for names in moments)
    assert all(torch.isfinite(parameter).all() for parameter in clip.module.parameters())


def test_a_run_of_format_1_goes_on(old_run: Path, tmp_path: Path) -> None:
    """With flags that scripts give; everything else it takes from its config."""
    data = old_run.parent
    job = finish(["train", "--run", str(old_run), "--csv", str(data / "data.csv"), "--lmdb", str(data / "images.lmdb")])
    known = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
    assert job.seen("resumed")[0]["step"] == known["facts"]["step"]
    result = RunStore(str(old_run)).result()
    assert result is not None
    assert (result["step"], result["attempts"]) == (known["max_steps"], 2)
    assert result["before"] == known["facts"]["before"]
    losses = [row["loss"] for row in RunStore(str(old_run)).read_history() if row["kind"] == "step"]
    some = known["facts"]["step"] + 5  # of those that come later, other processors may round differently
    assert losses[:some] == pytest.approx(known["losses"][:some], rel=1e-3)
    assert len(losses) == known["max_steps"]
