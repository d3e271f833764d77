"""slurm/*.sh with a real Slurm and the real trainer: requeued when that helps and never otherwise, with a calm run's weights."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import Cluster, running_cluster
from system import assert_identical, clean_environment, finish, newest_step, outcome, removed_afterwards, train_command

from job import errors
from job.checkpoint.store import RunStore

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "slurm" / "train.sh"
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is one"),
]

STEPS = 40
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": 0,
    "checkpoint_every": 10,
    "precision": "fp32",
    "threads": 1,
    "torch_threads": 1,
    "metrics_port": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with removed_afterwards(tmp_path_factory.mktemp("slurm")) as place:
        yield place


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with running_cluster() as found:
        found.environment |= {
            **{name: value for name, value in clean_environment().items() if not name.startswith("SLURM")},
            "SLURM_CONF": found.environment["SLURM_CONF"],
            "CLIPJOB": f"{sys.executable} -m job",
            "PYTHONPATH": str(ROOT),
            "CLIPJOB_DEVICE": "cpu",
            "CLIPJOB_SCRATCH": str(folder / "scratch"),
            **{f"CLIPJOB_{name.upper()}": str(value) for name, value in SETTINGS.items()},
        }
        yield found


@pytest.fixture(scope="module")
def calm(folder: Path) -> dict[str, Any]:
    finish(train_command(folder / "calm", scratch=folder / "scratch", **SETTINGS))
    return outcome(folder / "calm")


def until(condition: Any, what: str, *, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def again(cluster: Cluster, job: str) -> None:
    """Starts a requeued job at once; Slurm would hold it for two minutes."""
    until(
        lambda: cluster.state(job) == "PENDING" and int(cluster.fact(job, "Restarts")) >= 1,
        f"requeue of {job}:\n{cluster.log(job)}",
    )
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def submit(cluster: Cluster, run: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str) -> str:
    one_core = ("--cpus-per-task=1", *flags)
    return cluster.submit(TRAIN, *arguments, flags=one_core, CLIPJOB_RUN=str(run), **environment)


def test_policies_are_those_of_the_exit_codes() -> None:
    text = TRAIN.read_text(encoding="utf-8")
    permanent = {int(code) for code in re.search(r"^\s+([\d |]+)\) exit \"\$code\"", text, re.MULTILINE)[1].split("|")}  # type: ignore[index]
    kinds = (errors.ConfigError, errors.DataError, errors.Superseded, errors.AccessError, errors.ResumeError)
    assert permanent == {kind.exit_code for kind in kinds}
    assert f'"$code" = {errors.Stopped.exit_code} ]' in text


def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path) for path in sorted((ROOT / "slurm").glob("*.sh"))]
    found = subprocess.run([str(Path(sys.executable).parent / "shellcheck"), *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_without_arguments_it_runs_the_demo_to_its_end(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    job = submit(cluster, folder / "complete")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.log(job)
    assert_identical(folder / "complete", calm)


def test_a_time_limit_saves_requeues_and_goes_on(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    run = folder / "limited"
    # Limits are whole minutes, and the signal may come up to a minute before its time: here 15 to 75 seconds after the start.
    job = submit(cluster, run, flags=("--time=2", "--signal=USR1@45"), CLIPJOB_MAX_STEPS="100000", CLIPJOB_CHECKPOINT_EVERY="0")
    again(cluster, job)
    assert "saved at a signal; requeued" in cluster.log(job)
    saved = newest_step(run)
    assert saved > 0
    until(lambda: f'"event": "resumed", "run": "{run}", "attempt": 2, "step": {saved}' in cluster.log(job), "the second attempt")
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert RunStore(str(run)).attempts()[0]["end"]["exit_code"] == 75


def test_two_nodes_train_together(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    run = folder / "two-nodes"
    job = submit(cluster, run, flags=("--nodes=2",), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.log(job)
    assert RunStore(str(run)).attempts()[0]["ranks"] == 2
    losses = [[found["history"][f"step {step}"]["loss"] for step in range(1, 6)] for found in (outcome(run), calm)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_preemption_with_grace_is_requeued_by_slurm_and_goes_on(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    run = folder / "preempted"
    job = submit(cluster, run, flags=("--partition=low", "--exclusive", "--nodelist=n1"))
    until(lambda: newest_step(run) >= 10, f"step 10:\n{cluster.log(job)}")
    urgent = cluster.submit(_script(folder, "sleep 3"), flags=("--partition=high", "--exclusive", "--nodelist=n1"))
    cluster.wait_for(urgent, "COMPLETED", "RUNNING")
    again(cluster, job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.log(job)
    assert_identical(run, calm)


def test_preemption_without_grace_goes_on_from_the_last_checkpoint(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    run = folder / "evicted"
    job = submit(cluster, run, flags=("--partition=nograce", "--exclusive", "--nodelist=n2"))
    until(lambda: newest_step(run) >= 10, f"step 10:\n{cluster.log(job)}")
    urgent = cluster.submit(_script(folder, "sleep 3"), flags=("--partition=high", "--exclusive", "--nodelist=n2"))
    again(cluster, job)
    cluster.wait_for(urgent, "COMPLETED")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.log(job)
    assert_identical(run, calm)


def test_a_trainer_that_ignores_signals_is_killed_and_requeued_by_slurm(cluster: Cluster, folder: Path) -> None:
    deaf = _program(folder, "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR1)]; time.sleep(600)")
    job = submit(cluster, folder / "deaf", flags=("--partition=low", "--exclusive", "--nodelist=n3"), CLIPJOB=str(deaf))
    cluster.wait_for(job, "RUNNING")
    time.sleep(2)
    cluster.submit(_script(folder, "sleep 1"), flags=("--partition=high", "--exclusive", "--nodelist=n3"))
    until(lambda: int(cluster.fact(job, "Restarts")) >= 1, "the requeue")
    cluster.run("scancel", job)
    assert "requeued" not in cluster.log(job)  # by train.sh


def _script(folder: Path, body: str) -> Path:
    path = folder / f"script-{abs(hash(body))}.sh"
    path.write_text(f"#!/bin/bash\n{body}\n")
    return path


def test_what_a_user_cancels_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    run = folder / "cancelled"
    job = submit(cluster, run, CLIPJOB_MAX_STEPS="100000")
    until(lambda: newest_step(run) >= 10, f"step 10:\n{cluster.log(job)}")
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.fact(job, "Restarts") == "0"
    assert newest_step(run) > 10 or RunStore(str(run)).attempts()[0]["end"]["exit_code"] == 75  # it had the time to save


def test_permanent_errors_and_crashes_without_progress_are_not_requeued(cluster: Cluster, folder: Path) -> None:
    bad_data = submit(cluster, folder / "bad-data", "--csv", "/nowhere.csv", "--lmdb", "/nowhere")
    crash = submit(cluster, folder / "crash", CLIPJOB=str(_program(folder, "sys.exit(70)")))
    launch_failure = submit(cluster, folder / "launch", CLIPJOB=str(_program(folder, "sys.exit(233)")))
    for job, code in ((bad_data, 65), (crash, 70), (launch_failure, 233)):
        assert cluster.wait_for(job, "FAILED", "COMPLETED") == "FAILED", cluster.log(job)
        assert cluster.fact(job, "ExitCode") == f"{code}:0"
        assert cluster.fact(job, "Restarts") == "0"
    assert "without a new checkpoint" in cluster.log(crash)


def _program(folder: Path, body: str) -> Path:
    """Stands where `clipjob` would for what the real one does not do on demand: `inspect` is the real one."""
    path = folder / f"program-{abs(hash(body))}"
    path.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        f"if sys.argv[1] == 'inspect': os.execv(sys.executable, [sys.executable, '-m', 'job', *sys.argv[1:]])\n{body}\n"
    )
    path.chmod(0o755)
    return path


def test_a_crash_after_progress_is_requeued_within_the_budget(cluster: Cluster, folder: Path) -> None:
    run = folder / "crashing"
    body = (
        "import pathlib\n"
        "commits = pathlib.Path(os.environ['CLIPJOB_RUN'], 'commits'); commits.mkdir(parents=True, exist_ok=True)\n"
        "time.sleep(6)\n"  # train.sh has looked before
        "(commits / f'a{len(list(commits.iterdir())) + 1:06}-s000000000001.json').touch(); sys.exit(70)"
    )
    job = submit(cluster, run, CLIPJOB=str(_program(folder, body)), MAX_REQUEUES="1")
    again(cluster, job)
    until(lambda: "requeued 1 times already" in cluster.log(job), "the end of the budget")
    cluster.wait_for(job, "FAILED")
    assert cluster.fact(job, "Restarts") == "1"


def test_a_dead_node_gives_the_job_to_another(cluster: Cluster, folder: Path, calm: dict[str, Any]) -> None:
    run = folder / "dead-node"
    job = submit(cluster, run, flags=("--nodelist=n3",))
    until(lambda: newest_step(run) >= 10, f"step 10:\n{cluster.log(job)}")
    os.killpg(cluster.daemons["n3"].pid, signal.SIGKILL)
    cluster.daemons["n3"].wait()
    for line in subprocess.run(["pgrep", "-f", f"--run {run}|job demo"], capture_output=True, text=True).stdout.split():
        if f"CLIPJOB_RUN={run}" in Path(f"/proc/{line}/environ").read_text(errors="replace"):
            os.kill(int(line), signal.SIGKILL)
    cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=", check=False)
    until(lambda: cluster.state(job) in ("PENDING", "RUNNING") and int(cluster.fact(job, "Restarts")) >= 1, "requeue by Slurm")
    cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=n2", "StartTime=now", check=False)
    cluster.start_node("n3")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.log(job)
    assert_identical(run, calm)


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, folder: Path) -> None:
    runs = folder / "sweep"
    cluster.environment["CLIPJOB_RUN"] = str(runs)
    try:
        flags = "--cpus-per-task=1 --parsable"
        said = cluster.run(
            str(ROOT / "slurm" / "sweep.sh"), LRS="1e-4 1e-3", MODELS="", DECAYS="0.1", SBATCH_FLAGS=flags, CLIPJOB_MAX_STEPS="3",
            check=False,
        )  # fmt: skip
        assert said == "" or said.strip().isdigit()
        model = str(ROOT / "job" / "demo" / "tiny.json")
        job = cluster.run(
            str(ROOT / "slurm" / "sweep.sh"), LRS="1e-4 1e-3", MODELS=model, DECAYS="0.1", SBATCH_FLAGS=flags, CLIPJOB_MAX_STEPS="3"
        ).strip()  # fmt: skip
        until(lambda: len(list(runs.glob("*/result.json"))) == 2, f"two results:\n{cluster.run('squeue')}")
    finally:
        del cluster.environment["CLIPJOB_RUN"]
    assert job
    rates = {RunStore(str(path.parent)).load_config()["config"]["lr"] for path in runs.glob("*/result.json")}  # type: ignore[index]
    assert rates == {1e-4, 1e-3}
