"""The real command as a process of its own: follow its log, strike at a chosen moment, read what it left behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from forked import OF_IMPORTS, Forked

from job.checkpoint.commit import COMMIT_NAME, DATA_NAME
from job.checkpoint.state import FACTS, OPTIMIZER, WEIGHTS
from job.checkpoint.store import RunStore
from job.demo import settings as demo_settings
from job.storage import files

REPOSITORY = Path(__file__).parent.parent
WAIT_SECONDS = 240
"""Patience with one event; a machine that others use too may need a good part of it."""

DECIDING = ("step", "bad_samples", "nonfinite_steps", "evaluated_step", "before", "after", "best_step", "best", "best_score")
"""Facts of a checkpoint that an interruption must not change; `seconds` is the one that it may."""


class Job:
    """One attempt. Use it as a context manager: whatever happens, the process is gone afterwards.

    Args:
        arguments: of `clipjob`.
        environment: variables besides a clean environment.
        before: words in front of the command (`unshare -rn`). python: flags of the interpreter.
        program: what stands for `clipjob` and is given the arguments.
        popen: further arguments of Popen.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        python: Sequence[str] = (),
        program: Sequence[str] = (),
        forked: bool = True,
        **popen: Any,
    ) -> None:
        self.started = time.monotonic()
        environment = environment or {}
        own = before or python or program or popen or any(name.startswith(OF_IMPORTS) for name in environment)
        variables = {**clean_environment(), **environment}
        self.process: Any
        if forked and not own and not os.environ.get("TESTS_START_FOR_REAL"):
            self.process = Forked(arguments, variables, cwd=REPOSITORY)
        else:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
            words = [*before, *(program or [sys.executable, *python, "-m", "job"]), *arguments]
            self.process = subprocess.Popen(words, cwd=REPOSITORY, env=variables, **streams)
        self.events: list[dict[str, Any]] = []
        """Log lines in JSON, in order, each with "seconds" since the start, as this process saw it."""
        self.text: list[str] = []
        """Every other line of stderr."""
        self.output = ""
        """stdout, once the process has ended."""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_log, self._read_output)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()

    def _read_log(self) -> None:
        for raw in self.process.stderr or ():
            seconds, line = time.monotonic() - self.started, raw.decode(errors="replace")
            try:
                self.events.append({**json.loads(line), "seconds_seen": seconds})
            except (ValueError, TypeError):
                self.text.append(line)

    def _read_output(self) -> None:
        if self.process.stdout:
            self.output = self.process.stdout.read().decode()

    def seen(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log lines of an event with these fields."""
        return [line for line in list(self.events) if line["event"] == event and fields.items() <= line.items()]

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for a condition to be true. Returns: its value. Fails, when the process ends before or time runs out."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            ended = self.process.poll() is not None
            if value := condition():
                return value
            assert not ended, f"ended with {self.process.returncode} before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {what} in {WAIT_SECONDS} s:\n{self.tail()}"
            time.sleep(0.002)

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first log line of an event with these fields, as soon as it is there."""
        found: list[dict[str, Any]] = self.until(lambda: self.seen(event, **fields), f"{event} {fields or ''}")
        return found[0]

    def wait_until_stoppable(self) -> None:
        """Returns as soon as the process handles SIGTERM: before that, it is only a Python that starts."""
        status = Path(f"/proc/{self.pid}/status")

        def handles() -> bool:
            caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status.read_text(encoding="utf-8"))
            return bool(caught and all(int(caught[1], 16) >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGUSR1)))

        self.until(handles, "signal handlers")

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for the process to end by itself. Returns: its exit code, negative for a signal."""
        code = self.process.wait(timeout=WAIT_SECONDS)
        for reader in self._readers:
            reader.join(timeout=WAIT_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        return code

    def tail(self) -> str:
        """The end of its log, for messages of failing tests."""
        lines = [json.dumps(line)[:300] for line in self.events[-8:]]
        return "\n".join([*lines, "".join(self.text)[-3000:]])

    @property
    def said(self) -> str:
        """What it told a person on stderr."""
        return "".join(self.text)


def clean_environment() -> dict[str, str]:
    """This process's environment without settings that would reach the job. Threads of torch that have nothing to do sleep: more of
    them than cores would spend their time waiting for each other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLIPJOB_", "AWS_", "OMP_", "MKL_"))}
    return {**kept, "OMP_WAIT_POLICY": "passive"}


def train_command(run: Path | str, **settings: Any) -> list[str]:
    """`train` of the demo's small model on its images. Args: settings: by Config's names; None leaves one out."""
    chosen: dict[str, Any] = {**demo_settings(), "run": str(run), "device": "cpu", "log_every": 1, "metrics_port": 0, **settings}
    return train_words(chosen)


def train_words(settings: Mapping[str, Any]) -> list[str]:
    """`train` with these settings, by Config's names; None leaves one out, True is a flag alone."""
    words = ["train"]
    for name, value in settings.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def finish(command: Sequence[str], **arguments: Any) -> Job:
    """Runs a command to its end, which must be a success."""
    with Job(*command, **arguments) as job:
        code = job.end()
    assert code == 0, f"exit {code}:\n{job.tail()}"
    return job


def run_to_end(command: Sequence[str], **arguments: Any) -> tuple[int, Job]:
    """(exit code, the ended job)."""
    with Job(*command, **arguments) as job:
        return job.end(), job


# What a run holds


def names_in(run: Path | str, folder: str) -> list[str]:
    """What lies in a folder of a run."""
    if "://" in str(run):
        return sorted({path.split("/")[0] for path in files.list_files(files.join(str(run), folder))})
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(Path(run, folder))
    return []


def unfinished_saves(run: Path | str) -> set[str]:
    """The data folders of a run that no commit stands for (yet)."""
    matches = [match for match in map(DATA_NAME.fullmatch, names_in(run, "data")) if match]
    there = committed(run)
    return {match[0] for match in matches if (match["attempt"], match["step"]) not in there}


def committed(run: Path | str) -> set[tuple[str, str]]:
    """(attempt, step) of each commit of a run, as their names write them."""
    return {(match["attempt"], match["step"]) for match in map(COMMIT_NAME.fullmatch, names_in(run, "commits")) if match}


def newest_step(run: Path | str) -> int:
    """The step of the newest commit, -1 if there is none."""
    return max(((commit.attempt, commit.step) for commit in RunStore(str(run)).commits()), default=(0, -1))[1]


def last_history_step(run: Path | str) -> int:
    return max((row["step"] for row in RunStore(str(run)).read_history() if row["kind"] == "step"), default=0)


def tensors_of(uri: str) -> dict[str, tuple[str, bytes]]:
    """Name -> (dtype and shape, bytes) of a safetensors file. Its header names the metadata in any order, so files of equal
    tensors may differ."""
    return {
        name: (f"{tensor.dtype} {tuple(tensor.shape)}", tensor.numpy().tobytes())
        for name, tensor in safetensors.torch.load(files.read_bytes(uri)).items()
    }


def outcome(run: Path | str) -> dict[str, Any]:
    """All of a complete run that an interruption must not change: weights and optimiser, facts, every step's numbers."""
    store = RunStore(str(run))
    assert store.result() is not None, f"{run} is not complete"
    data = files.join(str(run), "data", store.commits()[0].data)
    parts = sorted(name for name in names_in(run, f"data/{store.commits()[0].data}") if name.startswith("optimizer"))
    optimizer = {name: tensor for part in parts for name, tensor in tensors_of(files.join(data, part)).items()}
    tensors = {WEIGHTS: tensors_of(files.join(data, WEIGHTS)), OPTIMIZER: optimizer}
    for export in ("export/final", "export/best"):
        tensors[export] = tensors_of(files.join(str(run), export, "open_clip_model.safetensors"))
        with tempfile.TemporaryDirectory() as folder:
            assert store.fetch_folder(export, Path(folder)), f"{export} is not complete"
    facts = json.loads(files.read_bytes(files.join(data, FACTS)))
    timing = ("seconds", "data_wait_seconds")
    rows = [{name: value for name, value in row.items() if name not in timing} for row in store.read_history()]
    history = {f"{row['kind']} {row['step']}": row for row in rows}
    assert len(history) == len(rows)
    return {**tensors, "facts": {name: facts[name] for name in DECIDING}, "history": history}


def assert_identical(run: Path | str, expected: Mapping[str, Any]) -> None:
    """Fails unless a complete run ended, bit for bit, like another, of which `outcome` was taken."""
    found = outcome(run)
    assert found["history"].keys() == expected["history"].keys()
    for name, row in expected["history"].items():
        assert found["history"][name] == row, f"{name} differs"
    assert found["facts"] == expected["facts"]
    for name in (WEIGHTS, OPTIMIZER, "export/final", "export/best"):
        assert found[name].keys() == expected[name].keys()
        differing = [tensor for tensor, value in expected[name].items() if found[name][tensor] != value]
        assert not differing, f"{name} differs in {differing}"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file -> (size, time of change in ns): equal snapshots mean that nothing was touched."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


@contextlib.contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """A folder for runs, which are too big to be kept for several test sessions."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
