"""kill -9 at random moments of every phase, again and again: the run ends as if nothing had happened, bit for bit."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from system import (
    Job,
    assert_identical,
    committed,
    finish,
    newest_step,
    outcome,
    removed_afterwards,
    train_command,
    unfinished_saves,
)

from job.demo import settings as demo_settings
from job.storage import files

KILLS_PER_RUN = 25
STEPS, EVALUATE_EVERY = 80, 10
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "val_fraction": 0.1,
    "evaluate_every": EVALUATE_EVERY,
    "checkpoint_every": 4,
    "precision": "fp32",
    "threads": 2,
    "torch_threads": 1,
    "max_idle_attempts": 0,
}
IN_THE_MIDDLE = ("start", "load", "step", "evaluate", "save")
"""Phases that a kill is aimed at while the run goes on; at its end comes "export"."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--kills 200` is eight storms on a local disk and eight with everything on S3, each of other moments."""
    if "kills" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--kills")
        storms = [(seed, min(KILLS_PER_RUN, wanted - at)) for seed, at in enumerate(range(0, wanted, KILLS_PER_RUN))]
        metafunc.parametrize(("seed", "kills"), storms, ids=[f"storm{seed}-kills{kills}" for seed, kills in storms])
        metafunc.parametrize("place", ["local", "s3"])


@dataclass(frozen=True)
class Place:
    """Where a storm's run lies, and its data."""

    run: str
    data: dict[str, str]
    """Settings that lead to it."""
    environment: dict[str, str]


@pytest.fixture
def storm_place(place: str, seed: int, folder: Path, request: pytest.FixtureRequest) -> Place:
    if place == "local":
        return Place(str(folder / f"run{seed}"), {}, {})
    uri = str(request.getfixturevalue("s3_uri"))
    demo = demo_settings()
    files.upload(Path(demo["csv"]), f"{uri}/data.csv")
    files.upload(Path(demo["lmdb"]) / "data.mdb", f"{uri}/images.lmdb/data.mdb")
    environment = request.getfixturevalue("s3_server").environment
    return Place(f"{uri}/run{seed}", {"csv": f"{uri}/data.csv", "lmdb": f"{uri}/images.lmdb"}, environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with removed_afterwards(tmp_path_factory.mktemp("storm")) as place:
        yield place


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> tuple[dict[str, Any], Job]:
    run = folder / "uninterrupted"
    job = finish(train_command(run, scratch=folder / "scratch", **SETTINGS), forked=False)
    expected = outcome(run)
    shutil.rmtree(run)
    assert len(expected["history"]) == STEPS + STEPS // EVALUATE_EVERY + 1
    return expected, job


def aims(kills: int, dice: random.Random) -> list[str]:
    """What each kill is aimed at. Those at the export come last, for the run only gets there once."""
    at_the_end = max(1, kills // 8)
    middle = [IN_THE_MIDDLE[at % len(IN_THE_MIDDLE)] for at in range(kills - at_the_end)]
    dice.shuffle(middle)
    return [*middle, *["export"] * at_the_end]


def strike(job: Job, run: str, aim: str, dice: random.Random, *, start_seconds: float, evaluation_seconds: float) -> None:
    """Kills the job at a random moment of a phase, or when it reaches the export, so that a storm never runs out of job."""

    def exporting() -> bool:
        return any(int(step) == STEPS for _, step in committed(run))

    def at_event(event: str, occurrence: int) -> None:
        job.until(lambda: len(job.seen(event)) >= occurrence or exporting(), f"{event} number {occurrence}")

    def loaded() -> bool:
        return bool(job.seen("resumed") or job.seen("evaluated"))

    def about_to_evaluate() -> bool:
        return any(line["step"] % EVALUATE_EVERY == 0 for line in job.seen("step"))

    if aim == "start":
        until, delay = job.started + dice.uniform(0, start_seconds), 0.0  # it may start faster than the calm one did
        job.until(lambda: time.monotonic() >= until or attempt_of(job), "the moment")
    elif aim == "load":
        at_event("attempt", 1)
        delay = dice.uniform(0, 0.3)
    elif aim == "step":
        job.until(lambda: loaded() or exporting(), "the first step")
        at_event("step", dice.randint(1, 8))
        delay = dice.uniform(0, 0.1)
    elif aim == "evaluate":
        # A step's line is written once the next step is done, or before an evaluation begins.
        job.until(lambda: about_to_evaluate() or exporting(), "an evaluation")
        delay = dice.uniform(0, 0.5 * evaluation_seconds)
    elif aim == "save":
        wanted, met = dice.randint(1, 3), set[str]()

        def saving() -> bool:
            met.update(folder[:20] for folder in unfinished_saves(run) if f"-a{attempt_of(job):06}-" in folder)
            return len(met) >= wanted

        job.until(lambda: saving() or exporting(), f"save number {wanted}")
        delay = dice.uniform(0, 0.25)
    else:
        wanted, delay = dice.randint(1, 5), 0.0  # of six files and their half-written forms
        job.until(lambda: exporting() and loaded() and exported_files(run) >= wanted, f"exported file number {wanted}")
    time.sleep(delay)
    job.send(signal.SIGKILL)


def exported_files(run: str) -> int:
    """Half-written ones of a local run included."""
    if "://" in run:
        return len(files.list_files(f"{run}/export"))
    return sum(len(names) for _, _, names in os.walk(f"{run}/export"))


def attempt_of(job: Job) -> int:
    """0 while it has none."""
    claimed = job.seen("attempt")
    return claimed[0]["attempt"] if claimed else 0


def phases_of(job: Job, run: str) -> set[str]:
    """In which phases a killed job was, from what it logged and what lies there. A save goes on beside steps and evaluations."""
    if not attempt_of(job):
        return {"start"}
    if not job.seen("resumed") and not job.seen("evaluated"):
        return {"load"}
    saving = any(f"-a{attempt_of(job):06}-" in folder for folder in unfinished_saves(run))
    phases = {"save"} if saving else set()
    if not saving and any(int(step) == STEPS for _, step in committed(run)):
        return {"export"}
    last = max((line["step"] for line in job.seen("step")), default=0)
    if last and last % EVALUATE_EVERY == 0 and not job.seen("evaluated", step=last):
        return phases | {"evaluate"}
    return phases | {"step"}


@pytest.mark.system
@pytest.mark.timeout(900)
def test_a_storm_of_kills_changes_not_a_bit(
    seed: int, kills: int, folder: Path, storm_place: Place, uninterrupted: tuple[dict[str, Any], Job]
) -> None:
    expected, calm = uninterrupted
    run, dice = storm_place.run, random.Random(seed)
    command = train_command(run, scratch=folder / f"scratch{seed}", **SETTINGS, **storm_place.data)
    start_seconds = calm.seen("attempt")[0]["seconds_seen"]
    before = calm.seen("step", step=EVALUATE_EVERY)[0]["seconds_seen"]
    evaluation_seconds = calm.seen("evaluated", step=EVALUATE_EVERY)[0]["seconds_seen"] - before
    fell: Counter[str] = Counter()
    table = [f"{'kill':>4}  {'aimed at':<10}{'fell into':<16}{'after':>7}  {'last step':>9}  {'newest commit':>13}"]
    for number, aim in enumerate(aims(kills, dice), start=1):
        with Job(*command, environment=storm_place.environment, forked=aim != "start") as job:
            strike(job, run, aim, dice, start_seconds=start_seconds, evaluation_seconds=evaluation_seconds)
            assert job.end() == -signal.SIGKILL, f"kill {number} ({aim}) came too late:\n{job.tail()}"
        if aim == "start" and (claimed := job.seen("attempt")):  # the calm one may have started on a busy machine
            start_seconds = min(start_seconds, claimed[0]["seconds_seen"])
        phases = phases_of(job, run)
        fell.update(phases)
        seconds = time.monotonic() - job.started
        last = max((line["step"] for line in job.seen("step")), default=0)
        table.append(f"{number:>4}  {aim:<10}{'+'.join(sorted(phases)):<16}{seconds:>5.1f} s  {last:>9}  {newest_step(run):>13}")
    finish(command, environment=storm_place.environment)
    print("\n".join(table), f"kills by phase: {dict(fell)}", sep="\n")
    assert_identical(run, expected)
    files.remove_tree(run)
    if kills == KILLS_PER_RUN:
        assert all(fell[phase] >= 2 for phase in (*IN_THE_MIDDLE, "export")), fell
