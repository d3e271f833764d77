"""/metrics: there from the start, on a free port if need be, and with what the job knows."""

import socket
import urllib.request
from collections.abc import Iterator

import pytest

from job.runtime.metrics import Metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(port=free_port(), host="127.0.0.1")
    yield made
    made.close()


def read(metrics: Metrics) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_staging_counts_bytes_of_all_files_once(metrics: Metrics) -> None:
    for name, done, planned in (("a", 10, 100), ("a", 100, 100), ("b", 5, 50), ("a", 0, 100), ("a", 40, 100)):
        metrics.staging(name, done, planned)
    found = read(metrics)
    assert found["clipjob_staging_bytes_total"] == 105
    assert found["clipjob_staging_bytes_planned"] == 150


def test_a_durable_checkpoint_is_told(metrics: Metrics) -> None:
    metrics.saved(7, 3.0, stall_seconds=0.02, upload_seconds=2.0, size=1000)
    metrics.waiting.set(2)
    found = read(metrics)
    assert found['clipjob_checkpoint_saves_total{result="ok"}'] == 1
    assert found["clipjob_checkpoint_last_success_step"] == 7
    assert found["clipjob_checkpoint_bytes"] == 1000
    assert found["clipjob_checkpoint_stall_seconds_sum"] == pytest.approx(0.02)
    assert found["clipjob_checkpoint_upload_seconds_count"] == 1
    assert found["clipjob_checkpoints_waiting"] == 2


def test_a_taken_port_is_met_by_a_free_one(metrics: Metrics) -> None:
    other = Metrics(port=metrics.port, host="127.0.0.1")
    assert other.port not in (0, metrics.port)
    assert "clipjob_step" in read(other)
    other.close()


def test_port_0_serves_nothing() -> None:
    silent = Metrics(port=0)
    assert silent.port == 0
    silent.close()
