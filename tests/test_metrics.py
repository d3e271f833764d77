"""/metrics: there from the start, on a free port if need be, and with what the job knows."""

import math
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.attempt import versions
from job.config import Config
from job.errors import ConfigError
from job.runtime import metrics as metrics_module
from job.runtime.metrics import Metrics
from job.runtime.watchdog import Watchdog
from job.telemetry import make_metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(port=free_port(), host="127.0.0.1", run="r")
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


ROW = {
    "kind": "step",
    "step": 7,
    "lr": 1e-5,
    "pairs": 16,
    "bad_samples": 2,
    "loss": 1.5,
    "gradient_norm": 2.0,
    "logit_scale": 14.0,
    "accuracy_image_to_text": 0.5,
    "accuracy_text_to_image": 0.25,
    "right_caption_probability": 0.125,
    "seconds": 0.5,
    "data_wait_seconds": 0.1,
}


def test_a_step_is_told_under_the_names_that_dashboards_use(metrics: Metrics) -> None:
    metrics.start_run(model="ViT-B-32", pretrained="openai", step=6, steps=107, samples_per_step=16)
    metrics.start_training(4.0)
    metrics.row(ROW, steps=107, steps_per_epoch=10.0)
    metrics.evaluated({"text_retrieval_recall@5": 0.75, "image_retrieval_recall@1": 0.5, "mean_recall": 0.6})
    found = read(metrics)
    assert found["clipjob_step"] == 7
    assert found["clipjob_epoch"] == pytest.approx(0.7)
    assert found["clipjob_eta_seconds"] == 50.0
    assert found["clipjob_train_loss"] == 1.5
    assert found['clipjob_train_accuracy_ratio{direction="text_to_image"}'] == 0.25
    assert found["clipjob_samples_per_second"] == 32.0
    assert found["clipjob_step_duration_seconds_sum"] == 0.5
    assert found['clipjob_eval_recall_ratio{direction="image_to_text",k="5"}'] == 0.75
    assert found['clipjob_eval_recall_ratio{direction="text_to_image",k="1"}'] == 0.5
    assert found["clipjob_resume_duration_seconds"] == 4.0
    assert found['clipjob_run_info{model="ViT-B-32",pretrained="openai",run="r"}'] == 1


def test_a_step_without_a_number_leaves_the_last_ones(metrics: Metrics) -> None:
    metrics.row(ROW, steps=10, steps_per_epoch=10.0)
    metrics.row({**ROW, "step": 8, "loss": None}, steps=10, steps_per_epoch=10.0)
    assert read(metrics)["clipjob_train_loss"] == 1.5


def test_counters_are_those_of_all_attempts_and_absent_until_they_are_known(metrics: Metrics) -> None:
    metrics.start_run(model="m", pretrained="", step=10, steps=100, samples_per_step=16)
    assert not [name for name in read(metrics) if name.startswith(("clipjob_time_seconds", "clipjob_samples_total"))]
    ledger = {"seconds": {"productive": 50.0, "recompute": 6.0}, "restarts": 1, "preemptions": 0, "lost_steps": 3}
    ledger |= {"skipped_samples": 2, "nonfinite_steps": 1}
    metrics.tell({"step": 10, "ledger": ledger})
    found = read(metrics)
    assert found["clipjob_samples_total"] == 13 * 16
    assert found["clipjob_lost_steps_total"] == 3
    assert found["clipjob_restarts_total"] == 1
    assert found['clipjob_time_seconds_total{state="recompute"}'] == 6.0
    assert found["clipjob_goodput_ratio"] == pytest.approx(50 / 56)
    assert found['clipjob_skipped_samples_total{reason="undecodable"}'] == 2
    assert found["clipjob_nonfinite_steps_total"] == 1


def test_what_is_not_known_yet_is_not_a_number(metrics: Metrics) -> None:
    found = read(metrics)
    for name in (
        "train_loss",
        "learning_rate",
        "step",
        "checkpoint_last_success_step",
        "checkpoint_last_success_timestamp_seconds",
    ):
        assert math.isnan(found[f"clipjob_{name}"])
    for name in ("run_completed_timestamp_seconds", "checkpoints_waiting", "staging_bytes_planned", "staging_bytes_total"):
        assert found[f"clipjob_{name}"] == 0
    assert not [name for name in found if name.startswith(("clipjob_run_info", "clipjob_mfu", "clipjob_eval_recall"))]


def test_a_restored_checkpoint_is_the_last_durable_one(metrics: Metrics) -> None:
    metrics.restored(20, at=1_750_000_000.5)
    found = read(metrics)
    assert found["clipjob_checkpoint_last_success_timestamp_seconds"] == 1_750_000_000.5
    assert found["clipjob_checkpoint_last_success_step"] == 20
    assert found['clipjob_checkpoint_saves_total{result="ok"}'] == 0


def test_the_versions_of_what_runs_are_told() -> None:
    made = make_metrics(
        Config(csv="c", lmdb="l", run="r", metrics_port=free_port()), watchdog=Watchdog(limit_seconds=0), is_first=True
    )
    try:
        (name,) = (name for name in read(made) if name.startswith("clipjob_build_info"))
    finally:
        made.close()
    assert all(
        f'{label}="{versions()[of]}"' in name for label, of in (("version", "clipjob"), ("torch", "torch"), ("cuda", "cuda"))
    )


def test_a_textfile_carries_the_same_and_stays_after_a_complete_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "TEXTFILE_SECONDS", 0.01)
    place = tmp_path / "clipjob.prom"
    for completes in (False, True):
        metrics = Metrics(port=0, run="r", textfile=place)
        metrics.row(ROW, steps=10, steps_per_epoch=10.0)
        while not (place.exists() and 'clipjob_train_loss{run="r"} 1.5' in place.read_text(encoding="utf-8")):
            time.sleep(0.01)
        if completes:
            metrics.complete()
        metrics.close()
        assert place.exists() == completes
    assert 'clipjob_run_completed_timestamp_seconds{run="r"} 0' not in place.read_text(encoding="utf-8")


def test_a_taken_port_is_met_by_a_free_one(metrics: Metrics) -> None:
    other = Metrics(port=metrics.port, host="127.0.0.1")
    assert other.port not in (0, metrics.port)
    assert "clipjob_step" in read(other)
    other.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_told(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--metrics-host {host} .*address of this machine"):
        Metrics(port=free_port(), host=host)


def test_port_0_serves_nothing() -> None:
    silent = Metrics(port=0)
    assert silent.port == 0
    silent.close()
