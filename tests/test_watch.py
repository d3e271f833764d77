"""`clipjob watch` tells how a run is from its files alone."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3server import S3Server, s3_environment, use_s3
from system import Job, clean_environment, newest_step, removed_afterwards, train_command

from job.watch import render, snapshot, sparkline

SECONDS = {"productive": 80.0, "data_wait": 15.0, "startup": 5.0, "evaluate": 0.1}
FOUND: dict[str, Any] = {
    "run": "s3://bucket/run",
    "model": "ViT-B-32",
    "pretrained": "openai",
    "result": None,
    "attempts": [
        {"attempt": 1, "host": "a", "end": {"exit_code": 75, "reason": "SIGTERM"}},
        {"attempt": 2, "host": "b", "end": None},
    ],
    "beacon": {"attempt": 2, "at": 1000.0, "step": 50, "ledger": {"seconds": SECONDS, "lost_steps": 3}},
    "step": 50,
    "steps": 200,
    "last_row": {"seconds": 2.0, "loss": 1.5},
    "losses": [4.0, 3.0, 2.0, 1.5],
    "evaluations": [
        {"step": 0, "image_retrieval_recall@5": 0.1, "text_retrieval_recall@5": 0.2},
        {"step": 40, "image_retrieval_recall@5": 0.3, "text_retrieval_recall@5": 0.4},
    ],
    "checkpoint_step": 44,
}


def test_a_running_run() -> None:
    text = render(FOUND, now=1005.0)
    for words in (
        "attempt 2 on b is running",
        "50/200",
        "25%, 5 min to go",
        "text -> image: 0.100 at step 0, 0.300 at step 40",
        "a kill now costs 6 steps",
        "2, 1 asked to stop; 3 steps done twice",
        "productive 80%, data wait 15%, startup 5%",
    ):
        assert words in text, words


def test_silence_and_ends_are_told_apart() -> None:
    assert "has been silent for 17 min: killed, perhaps" in render(FOUND, now=2000.0)
    ended = {**FOUND, "attempts": [*FOUND["attempts"][:1], {"attempt": 2, "end": {"exit_code": 69, "reason": "storage"}}]}
    assert "attempt 2 ended with 69 (storage)" in render(ended, now=1005.0)
    assert "is starting" in render({**FOUND, "beacon": {**FOUND["beacon"], "attempt": 1}}, now=1005.0)
    assert "complete; the model is s3://x" in render({**FOUND, "result": {"export": "s3://x"}}, now=1005.0)


def test_sparkline_shows_the_course_in_a_fixed_width() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0]) == "▁"
    line = sparkline([float(1000 - at) for at in range(1000)])
    assert (len(line), line[0], line[-1]) == (60, "█", "▁")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "runs") as place:
        yield place


@pytest.mark.system
def test_a_real_run_in_a_store_is_followed_through_a_kill(
    folder: Path, s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(monkeypatch, s3_server.endpoint)
    run, store = f"{s3_uri}/run", s3_environment(s3_server.endpoint)
    settings = {"max_steps": 5000, "global_batch_size": 16, "evaluate_every": 0, "checkpoint_every": 10, "torch_threads": 1}
    with Job(*train_command(run, scratch=folder / "scratch", **settings), environment=store) as job:
        job.until(lambda: newest_step(run) >= 10, "step 10")
        said = subprocess.run(
            [sys.executable, "-m", "job", "watch", run, "--once"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={**clean_environment(), **store},
        ).stdout
        assert "attempt 1 on" in said
        assert "is running" in said
        assert "/5000" in said
        job.send(signal.SIGKILL)
        job.end()
        for line in job.seen("step"):
            assert (line["run"], line["attempt"], line["rank"]) == (run, 1, 0)
    found = snapshot(run)
    assert "silent for" in render(found, now=time.time() + 120)


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "job", "watch", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=clean_environment(),
    )
    assert found.returncode == 2
    assert "is not a run" in found.stderr
