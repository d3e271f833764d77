"""Whole runs on a store that fails: they end as if nothing had happened, or the end is clear and nothing is lost."""

import json
import signal
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from faultproxy import FOREVER, Proxy, before, cut, error, in_reply, in_request, lose_reply, reset, running_proxy
from s3server import BUCKET, KEY, SECRET, S3Server, s3_environment, use_s3
from system import Job, assert_identical, finish, newest_step, outcome, removed_afterwards, train_command

from job.demo import FOLDER
from job.demo import settings as demo_settings
from job.storage import files, remote

STEPS = 30
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": STEPS,
    "checkpoint_every": 4,
    "precision": "fp32",
    "threads": 2,
    "torch_threads": 1,
}
PATIENCE = "5s"
LIMIT_SECONDS = 90
"""From the moment that storage is gone to the end of the job: PATIENCE, and the tries of the requests before and after it."""
SLOW_DOWN = error(503, "SlowDown")

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the run comes to on a local disk, where nothing fails."""
    with removed_afterwards(tmp_path_factory.mktemp("undisturbed")) as folder:
        finish(train_command(folder / "run", scratch=folder / "scratch", **SETTINGS))
        yield outcome(folder / "run")


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with running_proxy(s3_server.endpoint) as started:
        yield started


@pytest.fixture
def run(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a new run; this process reaches it without the proxy. Nothing unfinished may be left there."""
    use_s3(monkeypatch, s3_server.endpoint)
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    yield uri
    client = boto3.client(
        "s3", endpoint_url=s3_server.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    left = client.list_multipart_uploads(Bucket=BUCKET, Prefix=uri.removeprefix(f"s3://{BUCKET}/")).get("Uploads", [])
    client.close()
    files.remove_tree(uri)
    remote.close()
    assert left == []


def test_training_goes_on_while_storage_is_down_and_all_is_there_in_the_end(
    proxy: Proxy, run: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    with Job(*train_command(run, scratch=tmp_path, **SETTINGS), environment=s3_environment(proxy.endpoint)) as job:
        job.wait_for("step", step=6)
        down = proxy.add(SLOW_DOWN, times=FOREVER)
        job.wait_for("step", step=STEPS - 2)
        job.until(lambda: down.happened > 2, "requests to the store that is down")
        before = newest_step(run)
        assert before < STEPS - 2
        proxy.clear()
        assert job.end() == 0, job.tail()
    assert_identical(run, expected)


def test_metrics_are_up_while_data_is_on_its_way(proxy: Proxy, run: str, tmp_path: Path) -> None:
    files.write_bytes(f"{run}-data/data.csv", Path(demo_settings()["csv"]).read_bytes())
    come = threading.Event()
    proxy.add(before(come.wait), r"data\.csv", times=FOREVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = train_command(run, scratch=tmp_path, csv=f"{run}-data/data.csv", metrics_port=port, **SETTINGS)
    try:
        with Job(*command, environment=s3_environment(proxy.endpoint)) as job:
            job.until(lambda: proxy.count(r"data\.csv"), "a request for the CSV")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
                said = reply.read().decode()
            assert "clipjob_build_info{" in said
            assert "clipjob_train_loss NaN" in said
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as reply:
                assert json.load(reply)["ready"] is False
            come.set()
            job.wait_for("step", step=1)
            job.send(signal.SIGTERM)
            assert job.end() == 75, job.tail()
    finally:
        come.set()
        files.remove_tree(f"{run}-data")


def test_a_store_that_stays_down_is_69_in_time_and_the_next_attempt_goes_on(
    proxy: Proxy, run: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    command = train_command(run, scratch=tmp_path, storage_patience=PATIENCE, **SETTINGS)
    with Job(*command, environment=s3_environment(proxy.endpoint)) as job:
        job.wait_for("step", step=10)
        job.until(lambda: newest_step(run) >= 4, "a checkpoint")
        down, began = proxy.add(SLOW_DOWN, times=FOREVER), time.monotonic()
        assert job.end() == 69, job.tail()
        assert time.monotonic() - began < LIMIT_SECONDS
    assert down.happened > 2
    assert run in job.said
    assert "failing" in job.said
    saved = newest_step(run)
    assert saved >= 4
    proxy.clear()
    again = finish(command, environment=s3_environment(proxy.endpoint))
    assert again.seen("resumed")[0]["step"] == saved
    assert_identical(run, expected)


def test_credentials_that_expire_midway_are_named_and_the_next_attempt_goes_on(
    proxy: Proxy, run: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    command = train_command(run, scratch=tmp_path, storage_patience=PATIENCE, **SETTINGS)
    with Job(*command, environment=s3_environment(proxy.endpoint)) as job:
        job.wait_for("step", step=10)
        job.until(lambda: newest_step(run) >= 4, "a checkpoint")
        expired, began = proxy.add(error(403, "ExpiredToken", "The provided token has expired."), times=FOREVER), time.monotonic()
        assert job.end() in (69, 77), job.tail()
        assert time.monotonic() - began < LIMIT_SECONDS
    assert expired.happened > 1
    assert run in job.said
    assert "token" in job.said
    assert SECRET not in job.said
    saved = newest_step(run)
    proxy.clear()
    again = finish(command, environment=s3_environment(proxy.endpoint))
    assert again.seen("resumed")[0]["step"] == saved
    assert_identical(run, expected)


def test_a_run_over_a_bad_line_ends_like_any_other(proxy: Proxy, run: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    """Data and run are in the store, and every tenth request fails in one of seven ways."""
    for name in ("data.csv", "images.lmdb/data.mdb"):
        files.upload(FOLDER / "openmoji" / name, f"{run}-data/{name}")
    faults = (
        SLOW_DOWN,
        reset,
        lose_reply,
        error(500, "InternalError"),
        in_reply(cut(0.5)),
        in_request(cut(0.5, reset=True)),
        in_reply(cut(0.7, reset=True)),
    )
    rules = [proxy.add(fault, times=FOREVER, probability=0.015, seed=seed) for seed, fault in enumerate(faults)]
    command = train_command(
        run, csv=f"{run}-data/data.csv", lmdb=f"{run}-data/images.lmdb", scratch=tmp_path, **SETTINGS, storage_patience="10m"
    )
    finish(command, environment=s3_environment(proxy.endpoint))
    assert sum(rule.happened for rule in rules) >= 5
    assert_identical(run, expected)
    files.remove_tree(f"{run}-data")
