"""slurm/*.sh with a real Slurm and the real trainer: requeued when that helps and never otherwise, with a calm run's weights.

Jobs mostly wait, so those that need nobody are submitted together, before the first test (`jobs`); the tests look at their ends.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import Cluster, running_cluster
from system import assert_identical, clean_environment, finish, newest_step, outcome, removed_afterwards, train_command

from job import errors
from job.checkpoint.store import RunStore

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
TINY_MODEL = ROOT / "job" / "demo" / "tiny.json"
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
REAL = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is one")

STEPS = 40
SLOW_AFTER = 10
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
PERMANENT = {kind.exit_code for kind in (errors.ConfigError, errors.DataError, errors.Superseded, errors.AccessError)}
PERMANENT.add(errors.ResumeError.exit_code)
OTHERS = {errors.StorageError.exit_code, errors.TrainingError.exit_code, 137, 233}
"""Worth another start only after progress. 71 and 75 are treated each in its own way."""

SLOWLY = f"""
# The real clipjob, in whose first attempt steps after the first few take long, so that something can happen to it.
def slowly(arguments, stop):
    import job.train
    step = job.train.train_step
    def slow_step(state, *rest, **named):
        report = step(state, *rest, **named)
        if state.step > {SLOW_AFTER} and "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ["SLOW_SECONDS"]))
        return report
    job.train.train_step = slow_step
    return run(arguments, stop)
from job import launch
run, launch.run_command = launch.run_command, slowly
launch.main()
"""
REALLY = "os.execv(sys.executable, [sys.executable, '-m', 'job', *sys.argv[1:]])"
FAIL_AS_NUMBERED = "sys.exit(int(os.environ['SLURM_ARRAY_TASK_ID']))"
FIRST_75_THEN_65 = "sys.exit(65 if 'SLURM_RESTART_COUNT' in os.environ else 75)"
FIRST_71_THEN_65 = "print('on', os.environ['SLURMD_NODENAME']); sys.exit(65 if 'SLURM_RESTART_COUNT' in os.environ else 71)"
SAVE_AND_CRASH = """
commits = pathlib.Path(os.environ['CLIPJOB_RUN'], 'commits')
commits.mkdir(parents=True, exist_ok=True)
time.sleep(8)  # train.sh has looked at the run by then
(commits / f'a{len(list(commits.iterdir())) + 1:06}-s000000000001.json').touch()
sys.exit(70)
"""
DEAF = """
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
YOUNG = """
if 'SLURM_RESTART_COUNT' in os.environ:
    sys.exit(65)
print("young", flush=True)
time.sleep(600)
"""
ONE_WAITS = (
    "sys.exit(65 if 'SLURM_RESTART_COUNT' in os.environ else 75) if os.environ['SLURM_ARRAY_TASK_ID'] != '1' else time.sleep(25)"
)


def program(folder: Path, name: str, body: str) -> str:
    """Stands where `clipjob` would, for what the real one does not do on demand; `inspect` is the real one."""
    path = folder / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, sys, time\nif sys.argv[1] == 'inspect':\n    {REALLY}\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


def stand_in(folder: Path, command: str, before: str) -> str:
    """A PATH on which a command of Slurm does something else before. Args: before: in sh; it may exit."""
    folder.mkdir()
    script = folder / command
    script.write_text(f'#!/bin/sh\n{before}\nexec {shutil.which(command)} "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def until(condition: Callable[[], Any], what: Callable[[], str] | str, *, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with removed_afterwards(tmp_path_factory.mktemp("slurm")) as place:
        yield place


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with running_cluster() as found:
        found.environment = {
            **{name: value for name, value in clean_environment().items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": found.environment["SLURM_CONF"],
            "CLIPJOB": f"{sys.executable} -m job",
            "PYTHONPATH": str(ROOT),
            "CLIPJOB_DEVICE": "cpu",
            "CLIPJOB_SCRATCH": str(folder / "scratch"),
            **{f"CLIPJOB_{name.upper()}": str(value) for name, value in SETTINGS.items()},
        }
        yield found


def submit(cluster: Cluster, run: Path | None, *arguments: str, flags: tuple[str, ...] = (), **environment: str) -> str:
    place = {"CLIPJOB_RUN": str(run)} if run else {}
    return cluster.submit(SLURM / "train.sh", *arguments, flags=("--cpus-per-task=1", *flags), **place, **environment)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Everything that runs by itself: name -> number."""
    slowly = program(folder, "slowly", SLOWLY)
    found = {}
    # Limits are whole minutes, and the signal may come up to a minute before its time: here 30 to 90 seconds after the start.
    found["limited"] = submit(cluster, folder / "limited", flags=("--time=2", "--signal=USR1@30"), CLIPJOB=slowly, SLOW_SECONDS="4")
    found["crashing"] = submit(cluster, folder / "crashing", CLIPJOB=program(folder, "crashing", SAVE_AND_CRASH), MAX_REQUEUES="1")
    array = ("--array=0-2", "--output=%x-%A_%a.log")
    found["neighbours"] = submit(cluster, folder / "neighbours", flags=array, CLIPJOB=program(folder, "neighbours", ONE_WAITS))
    codes = ",".join(map(str, sorted(PERMANENT | OTHERS)))
    array = (f"--array={codes}", "--output=%x-%A_%a.log")
    found["codes"] = submit(cluster, folder / "codes", flags=array, CLIPJOB=program(folder, "codes", FAIL_AS_NUMBERED))
    found["refused"] = submit(
        cluster, folder / "re fused", flags=("--no-requeue",), CLIPJOB=program(folder, "refused", FIRST_75_THEN_65)
    )
    found["elsewhere"] = submit(
        cluster,
        folder / "elsewhere",
        flags=("--partition=mortal",),
        CLIPJOB=program(folder, "elsewhere", FIRST_71_THEN_65),
        PATH=stand_in(folder / "slow", "scontrol", '[ "$1" != update ] || sleep 3'),  # the TERM of a requeue comes before
    )
    found["complete"] = submit(cluster, None, "--run", str(folder / "complete"), "--max-steps", str(STEPS), *data_flags())
    found["bad data"] = submit(cluster, folder / "bad-data", "--csv", "/nowhere.csv", "--lmdb", "/nowhere")
    found["two nodes"] = submit(
        cluster, folder / "two-nodes", flags=("--nodes=2",), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo"
    )
    return found


def data_flags() -> list[str]:
    """The demo's data and model, for `clipjob train`."""
    command = train_command("unused")
    return [word for name in ("--csv", "--lmdb", "--model", "--lr", "--val-fraction") for word in _flag(command, name)]


def _flag(command: list[str], name: str) -> list[str]:
    return command[command.index(name) : command.index(name) + 2] if name != "--val-fraction" else []


def urgent(cluster: Cluster, node: str, *flags: str) -> str:
    """A job of the partition that takes nodes from others."""
    words = ("--partition=high", "--exclusive", f"--nodelist={node}", "--output=/dev/null", *flags, "--wrap=sleep 1")
    return cluster.run("sbatch", "--parsable", *words).strip()


@pytest.fixture(scope="module")
def calm(folder: Path, jobs: dict[str, str]) -> dict[str, Any]:
    """The run that nobody disturbed, and that Slurm did not see."""
    finish(train_command(folder / "calm", scratch=folder / "scratch", **SETTINGS))
    return outcome(folder / "calm")


def ended(cluster: Cluster, job: str, *, state: str, code: int, restarts: int) -> None:
    cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    facts = {name: cluster.fact(job, name) for name in ("JobState", "ExitCode", "Restarts")}
    assert facts == {"JobState": state, "ExitCode": f"{code}:0", "Restarts": str(restarts)}, cluster.log(job)[-4000:]


def requeued(cluster: Cluster, job: str, times: int = 1) -> None:
    until(
        lambda: cluster.restarts(job) >= times,
        lambda: f"no requeue of {job}, which is {cluster.state(job)}:\n{cluster.log(job)[-4000:]}",
    )


# What needs no cluster


def test_policies_are_those_of_the_exit_codes() -> None:
    text = (SLURM / "train.sh").read_text(encoding="utf-8")
    found = re.search(r"^ +([\d |]+)\) exit \"\$code\"", text, re.MULTILINE)
    assert found
    assert {int(code) for code in found[1].split("|")} == PERMANENT
    assert f" {errors.Stopped.exit_code}) requeue " in text
    assert f'"$code" = {errors.DeviceError.exit_code} ]' in text
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JobError)]
    special = {errors.Stopped.exit_code, errors.DeviceError.exit_code}
    assert {kind.exit_code for kind in classes} <= PERMANENT | OTHERS | special  # a new code needs a decision


def test_the_page_names_every_code_where_the_script_puts_it() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[^|]*) \| ([^|]+) \|$", page, re.MULTILINE)
    codes = {frozenset(map(int, re.findall(r"\b\d\d?\b", first.split(":")[0].split(", a kill")[0]))): then for first, then in rows}
    assert codes[frozenset(PERMANENT)].startswith("stays ended")
    assert codes[frozenset({errors.DeviceError.exit_code})].startswith("requeued with this node excluded")
    assert codes[frozenset(code for code in OTHERS if code < 128)].startswith("requeued if there was a new checkpoint")
    assert page.count(f"exit {errors.Stopped.exit_code}, requeued by the script") == 2


NOTE_ARGUMENTS = """#!/bin/sh
case " $* " in
    *" inspect "*) echo complete ;;
    *) printf '%s\\n' "$0" "$@" > "$NOTED"; printf '%s\\n' "device $CLIPJOB_DEVICE" "run $CLIPJOB_RUN" >> "$NOTED" ;;
esac
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Slurm, and runtimes of containers, that only note what they are to start; and a project with its environment."""
    for place in ("bin/srun", "bin/apptainer", "bin/podman", "project/.venv/bin/clipjob"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTE_ARGUMENTS, encoding="utf-8")
        path.chmod(0o755)
    (tmp_path / "project" / "slurm").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '   Command={tmp_path}/project/slurm/train.sh --csv x'\n", encoding="utf-8")
    scontrol.chmod(0o755)
    return tmp_path


def started(site: Path, *arguments: str, **environment: str) -> list[str]:
    """What train.sh gives to srun, whose name comes first; then the device and the run, as the job sees them."""
    of_slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "mine", "SLURM_SUBMIT_DIR": "/data", "SLURMD_NODENAME": "n1"}
    path = f"{site}/bin:/usr/bin:/bin"
    variables = {"PATH": path, "NOTED": str(site / "noted"), **of_slurm, **environment}
    found = subprocess.run(["bash", str(SLURM / "train.sh"), *arguments], env=variables, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return (site / "noted").read_text(encoding="utf-8").splitlines()


PODMAN = ["podman", "run", "--rm", "--network=host", "--env-host", "--device", "nvidia.com/gpu=all", "--entrypoint", ""]
LAUNCH = ["--cpus-per-task=1", "--kill-on-bad-exit=0"]


def test_without_arguments_it_is_the_demo_by_the_projects_own_command(site: Path) -> None:
    clipjob = f"{site}/project/slurm/../.venv/bin/clipjob"
    assert started(site) == [f"{site}/bin/srun", *LAUNCH, clipjob, "demo", "device cuda", "run /data/mine-12"]


def test_settings_are_for_training(site: Path) -> None:
    clipjob = str(site / "project" / ".venv" / "bin" / "clipjob")
    found = started(site, "--csv", "a b.csv", "--run=/runs/x", CLIPJOB=clipjob, SLURM_CPUS_PER_TASK="6", CLIPJOB_DEVICE="cpu")
    expected = ["--cpus-per-task=6", LAUNCH[1], clipjob, "train", "--csv", "a b.csv", "device cpu", "run /runs/x"]
    assert found[1:] == expected


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("pyxis", ["--container-image=a.sqsh", "--container-mounts=/a:/a,/b:/b", "--no-container-mount-home"]),
        ("apptainer", ["apptainer", "exec", "--nv", "--bind", "/a:/a,/b:/b", "a.sqsh"]),
        ("podman", [*PODMAN, "--volume", "/a:/a", "--volume", "/b:/b", "a.sqsh"]),
    ],
)
def test_a_container_runs_the_same_command(site: Path, runtime: str, words: list[str]) -> None:
    found = started(site, CONTAINER_RUNTIME=runtime, IMAGE="a.sqsh", MOUNTS="/a:/a,/b:/b")
    assert found[1:-2] == [*LAUNCH, *words, "clipjob", "demo"]


@pytest.mark.skipif(
    shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None, reason="no shellcheck"
)
def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    scripts = [str(path) for path in sorted(SLURM.glob("*.sh"))]
    found = subprocess.run([str(shellcheck), *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# Ends that the script decides on


@REAL
def test_permanent_errors_and_crashes_without_progress_are_not_requeued(cluster: Cluster, jobs: dict[str, str]) -> None:
    for code in sorted(PERMANENT | OTHERS):
        job = f"{jobs['codes']}_{code}"
        ended(cluster, job, state="FAILED", code=code, restarts=0)
        assert ("to go on: " in cluster.log(job)) == (code in OTHERS)


@REAL
def test_the_real_trainers_bad_data_ends_the_job(cluster: Cluster, jobs: dict[str, str]) -> None:
    ended(cluster, jobs["bad data"], state="FAILED", code=errors.DataError.exit_code, restarts=0)


@REAL
def test_a_crash_after_progress_is_requeued_within_the_budget(cluster: Cluster, jobs: dict[str, str]) -> None:
    ended(cluster, jobs["crashing"], state="FAILED", code=70, restarts=1)
    log = cluster.log(jobs["crashing"])
    assert log.count("ended with 70, after progress. Requeued") == 1
    assert "It was requeued 1 times, and MAX_REQUEUES is 1" in log


@REAL
def test_a_node_that_cannot_do_it_is_left_for_another(cluster: Cluster, jobs: dict[str, str]) -> None:
    ended(cluster, jobs["elsewhere"], state="FAILED", code=65, restarts=1)
    log = lambda: cluster.log(jobs["elsewhere"])  # noqa: E731
    until(lambda: set(re.findall(r"^on (\w+)$", log(), re.MULTILINE)) == {"n6", "n7"}, log, seconds=20)  # it may be late


@REAL
def test_where_requeueing_is_refused_the_log_has_the_line_that_goes_on(cluster: Cluster, jobs: dict[str, str]) -> None:
    ended(cluster, jobs["refused"], state="FAILED", code=75, restarts=0)
    assert re.search(rf"to go on: CLIPJOB_RUN=\S*re\\ fused sbatch .*{SLURM}/train.sh$", cluster.log(jobs["refused"]), re.MULTILINE)


@REAL
def test_an_element_of_an_array_is_requeued_alone(cluster: Cluster, jobs: dict[str, str]) -> None:
    for element, code, restarts in ((0, 65, 1), (2, 65, 1), (1, 70, 0)):
        ended(cluster, f"{jobs['neighbours']}_{element}", state="FAILED", code=code, restarts=restarts)


# The real trainer


@REAL
def test_it_trains_to_the_end_with_the_weights_of_a_calm_run(
    cluster: Cluster, folder: Path, jobs: dict[str, str], calm: Any
) -> None:
    ended(cluster, jobs["complete"], state="COMPLETED", code=0, restarts=0)
    assert_identical(folder / "complete", calm)


@REAL
def test_two_nodes_train_together(cluster: Cluster, folder: Path, jobs: dict[str, str], calm: dict[str, Any]) -> None:
    ended(cluster, jobs["two nodes"], state="COMPLETED", code=0, restarts=0)
    assert RunStore(str(folder / "two-nodes")).attempts()[0]["ranks"] == 2
    losses = [[found["history"][f"step {step}"]["loss"] for step in range(1, 6)] for found in (outcome(folder / "two-nodes"), calm)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@REAL
@pytest.mark.parametrize(("partition", "node"), [("grace", "n3"), ("nograce", "n4")])
def test_preempted_it_goes_on_to_the_weights_of_a_calm_run(
    cluster: Cluster, folder: Path, calm: dict[str, Any], partition: str, node: str
) -> None:
    run = folder / partition
    slowly = program(folder, "slowly", SLOWLY)
    flags = (f"--partition={partition}", "--exclusive")
    job = submit(cluster, run, flags=flags, CLIPJOB=slowly, SLOW_SECONDS="1")
    until(lambda: newest_step(run) >= SLOW_AFTER, lambda: f"no step {SLOW_AFTER}:\n{cluster.log(job)}")
    urgent(cluster, node)
    ended(cluster, job, state="COMPLETED", code=0, restarts=1)
    assert_identical(run, calm)
    assert RunStore(str(run)).attempts()[0]["end"]["exit_code"] == 75  # a signal, and time to save


@REAL
def test_what_a_user_cancels_stays_cancelled(cluster: Cluster, folder: Path, jobs: dict[str, str]) -> None:
    run = folder / "cancelled"
    seen = folder / "file_sd"
    seen.mkdir()
    told = {"METRICS_SD": str(seen), "CLIPJOB_METRICS_PORT": ""}
    job = submit(cluster, run, CLIPJOB=program(folder, "slowly", SLOWLY), SLOW_SECONDS="1", **told)
    until(lambda: newest_step(run) >= SLOW_AFTER, lambda: f"no step {SLOW_AFTER}:\n{cluster.log(job)}")
    [found] = json.loads((seen / f"clipjob-{job}.json").read_text(encoding="utf-8"))
    host, _, port = found["targets"][0].partition(":")
    assert (host, found["labels"]["slurm_job"]) == (socket.gethostname(), job)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert f'run="{run}"' in reply.read().decode()
    cluster.run("scancel", job)
    until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job, check=False).strip(), "its end")
    assert cluster.state(job) == "CANCELLED"
    assert cluster.restarts(job) == 0
    assert "Requeued" not in cluster.log(job)
    assert newest_step(run) > SLOW_AFTER  # it had the time to save
    assert list(seen.iterdir()) == []


@REAL
def test_a_dead_node_gives_the_job_to_another(cluster: Cluster, folder: Path, jobs: dict[str, str], calm: dict[str, Any]) -> None:
    cluster.wait_for(jobs["elsewhere"], "FAILED")  # it needs both nodes
    run = folder / "dead-node"
    job = submit(cluster, run, flags=("--partition=mortal",), CLIPJOB=program(folder, "slowly", SLOWLY), SLOW_SECONDS="3")
    until(lambda: newest_step(run) >= SLOW_AFTER, lambda: f"no step {SLOW_AFTER}:\n{cluster.log(job)}")
    node = cluster.fact(job, "BatchHost")
    cluster.kill_node(node)
    requeued(cluster, job)
    ended(cluster, job, state="COMPLETED", code=0, restarts=1)
    assert cluster.fact(job, "BatchHost") != node
    assert_identical(run, calm)


@REAL
def test_a_node_that_is_dead_before_the_launch_ends_the_job(cluster: Cluster, folder: Path) -> None:
    """srun says 233. Nothing was gained, and Slurm has not noticed the node yet."""
    cluster.kill_node("n9")
    job = submit(cluster, folder / "torn", flags=("--partition=torn", "--nodes=2"), CLIPJOB=program(folder, "deaf", DEAF))
    cluster.wait_for(job, "FAILED", "COMPLETED")
    assert cluster.fact(job, "ExitCode") == "233:0", cluster.log(job)
    assert cluster.restarts(job) == 0


@REAL
def test_a_chain_goes_on_with_one_run_and_then_does_nothing(cluster: Cluster, folder: Path) -> None:
    run = folder / "chain"
    first_stopped = (
        f"if not pathlib.Path({str(run)!r}).exists():\n    pathlib.Path({str(run)!r}).mkdir()\n    sys.exit(75)\n{REALLY}"
    )
    said = cluster.run(
        str(SLURM / "chain.sh"),
        "demo",
        CLIPJOB_RUN=str(run),
        JOBS="3",
        CLIPJOB=program(folder, "first-stopped", first_stopped),
        SBATCH_FLAGS="--cpus-per-task=1",
        CLIPJOB_MAX_STEPS="3",
    )
    first, second, third = re.findall(r"of 3: (\d+)", said)
    ended(cluster, first, state="FAILED", code=75, restarts=0)
    ended(cluster, second, state="COMPLETED", code=0, restarts=0)
    ended(cluster, third, state="COMPLETED", code=0, restarts=0)
    assert "this run is complete" in cluster.log(third)
    assert RunStore(str(run)).result()["attempts"] == 1  # type: ignore[index]


@REAL
def test_a_sweep_is_an_array_of_runs(cluster: Cluster, folder: Path) -> None:
    runs = folder / "sweep"
    job = cluster.run(
        str(SLURM / "sweep.sh"),
        LRS="1e-4 1e-3",
        MODELS=str(TINY_MODEL),
        DECAYS="0.1",
        SBATCH_FLAGS="--cpus-per-task=1 --parsable",
        CLIPJOB_MAX_STEPS="3",
        CLIPJOB_RUN=str(runs),
    ).strip()
    for element in range(2):
        ended(cluster, f"{job}_{element}", state="COMPLETED", code=0, restarts=0)
    rates = {RunStore(str(path.parent)).load_config()["config"]["lr"] for path in runs.glob("*/result.json")}  # type: ignore[index]
    assert rates == {1e-4, 1e-3}


@REAL
def test_a_trainer_that_ignores_signals_is_killed_and_requeued_by_slurm(cluster: Cluster, folder: Path) -> None:
    deaf = program(folder, "deaf", DEAF)
    job = submit(cluster, folder / "deaf", flags=("--partition=briefly", "--exclusive"), CLIPJOB=deaf)
    until(lambda: "deaf" in cluster.log(job), "a trainer that hears nothing")
    urgent(cluster, "n5")
    requeued(cluster, job)
    cluster.run("scancel", job)
    assert "Requeued" not in cluster.log(job)  # by train.sh


@REAL
def test_preempted_while_python_starts_it_is_requeued(cluster: Cluster, folder: Path) -> None:
    """It has no handler yet and dies of TERM; there was nothing to save."""
    young = program(folder, "young", YOUNG)
    path = stand_in(folder / "no-answer", "squeue", f"mkdir {folder}/no-answer/asked 2>/dev/null && exit 1")  # the first time
    job = submit(cluster, folder / "young", flags=("--partition=grace", "--exclusive"), CLIPJOB=young, PATH=path)
    until(lambda: "young" in cluster.log(job), "a trainer that has just begun")
    urgent(cluster, "n3")
    ended(cluster, job, state="FAILED", code=65, restarts=1)
    assert "ended by a signal while it started. Requeued" in cluster.log(job)
    assert (folder / "no-answer" / "asked").exists()


@REAL
def test_a_time_limit_saves_requeues_and_goes_on(
    cluster: Cluster, folder: Path, jobs: dict[str, str], calm: dict[str, Any]
) -> None:
    run = folder / "limited"
    ended(cluster, jobs["limited"], state="COMPLETED", code=0, restarts=1)
    assert "saved at a signal. Requeued" in cluster.log(jobs["limited"])
    first, _second = RunStore(str(run)).attempts()
    assert (first["end"]["exit_code"], first["end"]["reason"]) == (75, "SIGUSR1")
    assert_identical(run, calm)
