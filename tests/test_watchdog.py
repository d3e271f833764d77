"""A job that hangs says where and ends; whoever asks /healthz knows before."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from system import Job, newest_step, removed_afterwards, train_command

from job.runtime.metrics import Metrics
from job.runtime.watchdog import Watchdog

HANGS = """
import time
from job.runtime.watchdog import Watchdog
told = []
dog = Watchdog(limit_seconds=1.0, on_hang=lambda reason: print("told:", reason, flush=True))
def the_place_where_it_hangs():
    time.sleep(60)
for _ in range(4):
    time.sleep(0.5)
    dog.beat("counting")
print("still here", flush=True)
the_place_where_it_hangs()
"""


def test_a_hang_shows_every_stack_and_ends_with_70() -> None:
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert time.monotonic() - began < 20
    assert found.returncode == 70
    assert "still here" in found.stdout  # beats keep it alive for longer than its limit
    assert "told: Nothing has moved" in found.stdout
    assert "the_place_where_it_hangs" in found.stderr
    assert "while counting (--hang-timeout)" in found.stderr


def status(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_health_is_the_age_of_the_heartbeat_and_readiness_comes_with_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watchdog, "_watch", lambda _self: None)  # only its clock is wanted here
    dog = Watchdog(limit_seconds=0.5)
    metrics = Metrics(port=free_port(), host="127.0.0.1", watchdog=dog)
    try:
        assert (status(metrics.port, "/healthz"), status(metrics.port, "/readyz")) == (200, 503)
        metrics.ready = True
        assert status(metrics.port, "/readyz") == 200
        time.sleep(0.8)
        assert (status(metrics.port, "/healthz"), status(metrics.port, "/readyz")) == (503, 503)
        dog.beat()
        assert status(metrics.port, "/healthz") == 200
    finally:
        metrics.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "runs") as place:
        yield place


@pytest.mark.system
def test_a_job_that_stands_still_ends_and_goes_on_from_its_checkpoint(folder: Path) -> None:
    """Its second rank is stopped in its tracks: alive for the kernel, dead for the job."""
    settings = {"max_steps": 5000, "global_batch_size": 16, "evaluate_every": 0, "checkpoint_every": 4, "torch_threads": 1}
    command = train_command(folder / "run", scratch=folder / "scratch", nproc_per_node=2, hang_timeout="10s", **settings)
    with Job(*command) as job:
        job.until(lambda: newest_step(folder / "run") >= 4, "step 4")
        children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text(encoding="ascii").split()
        os.kill(int(children[1]), signal.SIGSTOP)
        began = time.monotonic()
        job.until(lambda: not Path(f"/proc/{children[0]}").exists(), "the end of the first rank")
        assert time.monotonic() - began < 40
        os.kill(int(children[1]), signal.SIGKILL)  # the launcher would, a minute after the first one ended
        assert job.end() == 70, job.tail()
    assert "Nothing has moved" in job.said
