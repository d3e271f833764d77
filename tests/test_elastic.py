"""Several ranks: the same run as one process, on any number after a restart; and ends that all ranks share."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3server import S3Server
from system import (
    Job,
    assert_identical,
    finish,
    names_in,
    newest_step,
    outcome,
    removed_afterwards,
    run_to_end,
    train_command,
    unfinished_saves,
)

from job.checkpoint.store import RunStore
from job.data.order import batches_from
from job.demo import settings as demo_settings
from job.runtime.ranks import Ranks
from job.runtime.world import World

pytestmark = pytest.mark.system

STEPS = 24
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 18,  # uneven on 4 ranks
    "val_fraction": 0.02,
    "evaluate_every": 8,
    "checkpoint_every": 4,
    "precision": "fp32",
    "threads": 1,
    "torch_threads": 1,
    "lr": 1e-4,
}
TOLERANCE = 2e-4
"""Between losses of about 3: what float32 sums in another order become over STEPS steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with removed_afterwards(tmp_path_factory.mktemp("elastic")) as place:
        yield place


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The run of one process that nobody disturbed."""
    finish(train_command(folder / "alone", scratch=folder / "scratch", **SETTINGS))
    return outcome(folder / "alone")


def command(run: Path | str, ranks: int, folder: Path, **settings: Any) -> list[str]:
    return train_command(run, scratch=folder / "scratch", **{**SETTINGS, "nproc_per_node": ranks, **settings})


def losses(history: dict[str, Any]) -> list[float]:
    return [history[f"step {step}"]["loss"] for step in range(1, STEPS + 1)]


def ranks_of(job: Job) -> list[int]:
    """The processes that a launcher started."""
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text(encoding="ascii")
    return [int(child) for child in children.split()]


def kill_a_rank(job: Job, rank: int) -> None:
    os.kill(ranks_of(job)[rank], signal.SIGKILL)


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            assert Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split()[2] == "Z"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_samples_of_one_process_in_its_order(size: int) -> None:
    for step, whole in zip(range(5), batches_from(7, global_batch_size=18), strict=False):
        parts = [World(Ranks(rank, size, rank, size)).part(18) for rank in range(size)]
        assert np.array_equal(np.concatenate([whole[part.start : part.stop] for part in parts]), whole), step


@pytest.mark.timeout(900)
def test_killed_on_4_ranks_then_on_2_then_finished_by_1_is_the_run_of_1(folder: Path, alone: dict[str, Any]) -> None:
    run = folder / "shrinking"
    for ranks, until, victim in ((4, 5, 3), (2, 13, 0)):
        with Job(*command(run, ranks, folder)) as job:
            job.until(lambda wanted=until: newest_step(run) >= wanted, f"step {until}")
            pids = ranks_of(job)
            kill_a_rank(job, victim)
            began = time.monotonic()
            assert job.end() == 128 + signal.SIGKILL, job.tail()
            assert time.monotonic() - began < 30
            assert f"rank {victim} was killed by SIGKILL" in job.said
            assert_gone(pids)
        assert RunStore(str(run)).result() is None
    finish(command(run, 1, folder))
    found = outcome(run)
    assert losses(found["history"]) == pytest.approx(losses(alone["history"]), abs=TOLERANCE)
    assert found["facts"]["before"] == pytest.approx(alone["facts"]["before"], abs=1e-5)  # evaluated by 4 ranks
    assert found["history"].keys() == alone["history"].keys()


@pytest.mark.timeout(900)
def test_equally_many_ranks_go_on_bit_for_bit(folder: Path, alone: dict[str, Any]) -> None:
    finish(command(folder / "three", 3, folder))
    expected = outcome(folder / "three")
    assert losses(expected["history"]) == pytest.approx(losses(alone["history"]), abs=TOLERANCE)
    run = folder / "three-killed"
    with Job(*command(run, 3, folder)) as job:
        job.until(lambda: newest_step(run) >= 5, "step 5")
        kill_a_rank(job, 1)
        assert job.end() == 128 + signal.SIGKILL
    finish(command(run, 3, folder))
    assert_identical(run, expected)


@pytest.mark.timeout(900)
def test_a_locked_tower_and_a_guard_are_those_of_one_process(folder: Path) -> None:
    guard = folder / "guard.csv"
    guard.write_text("".join(Path(demo_settings()["csv"]).read_text(encoding="utf-8").splitlines(keepends=True)[:51]))
    settings = {"lock_image": True, "crop_scale": 1, "guard_csv": guard, "guard_lmdb": demo_settings()["lmdb"], "epochs": 2}
    settings |= {"max_steps": None, "global_batch_size": 360}
    found = {}
    for ranks in (1, 3):
        job = finish(command(folder / f"locked-{ranks}", ranks, folder, **settings))
        assert job.seen("features of the locked image tower")
        found[ranks] = outcome(folder / f"locked-{ranks}")
    history, other = (found[ranks]["history"] for ranks in (3, 1))
    steps = [name for name in other if name.startswith("step ")]
    assert len(steps) > 10
    assert [history[step]["loss"] for step in steps] == pytest.approx([other[step]["loss"] for step in steps], abs=TOLERANCE)
    before, after = (found[3]["facts"][when] for when in ("before", "after"))
    assert before == pytest.approx(found[1]["facts"]["before"], abs=1e-5)
    assert {name for name in after if name.startswith("guard_")}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["launcher", "one rank"])
def test_a_signal_to_any_of_them_saves_once_and_all_leave_with_75(folder: Path, target: str) -> None:
    run = folder / f"signalled-{target.replace(' ', '-')}"
    with Job(*command(run, 2, folder, checkpoint_every=0, max_steps=2000, evaluate_every=0)) as job:
        job.wait_for("step", step=3)
        os.kill(job.process.pid if target == "launcher" else ranks_of(job)[1], signal.SIGTERM)
        assert job.end() == 75, job.tail()
        told = max(line["step"] for line in job.seen("step"))
    assert newest_step(run) >= told
    assert not unfinished_saves(run)
    assert job.said.count("Run the same command to go on") == 1


@pytest.mark.timeout(900)
def test_a_signal_while_ranks_start_loses_nothing(folder: Path) -> None:
    run = folder / "early"
    for seconds in (0.6, 2.0):
        with Job(*command(run, 2, folder)) as job:
            time.sleep(seconds)
            job.send(signal.SIGTERM)
            assert job.end() == 75, job.tail()


@pytest.mark.timeout(900)
def test_a_launcher_that_is_killed_leaves_nobody_behind(folder: Path) -> None:
    run = folder / "orphans"
    with Job(*command(run, 2, folder, max_steps=2000)) as job:
        job.wait_for("step", step=2)
        pids = ranks_of(job)
        job.send(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert_gone(pids)
    assert newest_step(run) >= 2  # they saved before they left


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"device": "cuda"}, 71, "--device cuda"),
        ({"csv": "/nowhere/data.csv"}, 65, "/nowhere/data.csv"),
        ({"global_batch_size": 2, "nproc_per_node": 3}, 2, "leaves nothing for some of 3 ranks"),
    ],
    ids=["no such device", "no such data", "more ranks than pairs"],
)
def test_the_cause_is_told_once_and_its_code_kept(folder: Path, changes: dict[str, Any], code: int, words: str) -> None:
    run = folder / f"bad-{code}"
    found, job = run_to_end(command(run, 2, folder, **changes))
    assert found == code, job.tail()
    assert words in job.said
    assert "Traceback" not in job.said


@pytest.mark.timeout(900)
def test_many_ranks_save_to_s3_and_one_goes_on(folder: Path, s3_server: S3Server, s3_uri: str) -> None:
    run = f"{s3_uri}/run"
    with Job(*command(run, 3, folder), environment=s3_server.environment) as job:
        job.until(lambda: newest_step(run) >= 5, "step 5")
        job.send(signal.SIGTERM)
        assert job.end() == 75, job.tail()
    newest = RunStore(run).commits()[0]
    assert sum(name.startswith("optimizer") for name in newest.files) == 3
    sizes = [record.size for name, record in newest.files.items() if name.endswith(".safetensors")]
    assert max(sizes) < 1.3 * sum(sizes) / 3  # rank 0's weights are a third of all, and the optimiser is divided
    finish(command(run, 1, folder), environment=s3_server.environment)
    assert "result.json" in names_in(run, "")
