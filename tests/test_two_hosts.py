"""Two hosts, each a network namespace with an address of its own: a rank is killed, and the cable is cut in mid-step."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from system import Job, newest_step, removed_afterwards, train_command

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip` (iproute2)"),
]

SETTINGS: dict[str, Any] = {
    "max_steps": 5000,
    "global_batch_size": 16,
    "val_fraction": 0.02,
    "evaluate_every": 0,
    "checkpoint_every": 4,
    "precision": "fp32",
    "threads": 1,
    "torch_threads": 1,
    "nnodes": 2,
}
NOTICED_SECONDS = 75.0
"""30 of silence, 15 for the training thread to notice by itself, the rest for a busy machine."""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces with a cable between them."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    interface: str

    def cut(self) -> None:
        """No packet gets through any more, and nobody is told."""
        ip("-n", self.names[0], "link", "set", self.interface, "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    tag = uuid.uuid4().hex[:6]
    found = Hosts((f"clip-{tag}-0", f"clip-{tag}-1"), ("10.77.0.1", "10.77.0.2"), "cable")
    try:
        for name in found.names:
            ip("netns", "add", name)
        ip("-n", found.names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", found.names[1])
        for name, address in zip(found.names, found.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield found
    finally:
        for name in found.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "runs") as folder:
        yield folder / "run"


@contextlib.contextmanager
def two_nodes(hosts: Hosts, run: Path) -> Iterator[list[Job]]:
    """The same command on both, as a cluster starts it."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Job(
                    *train_command(run, scratch=run.parent / f"scratch{node}", **SETTINGS),
                    before=("ip", "netns", "exec", name),
                    environment={
                        "NODE_RANK": str(node),
                        "MASTER_ADDR": hosts.addresses[0],
                        "GLOO_SOCKET_IFNAME": hosts.interface,
                    },
                )
            )
            for node, name in enumerate(hosts.names)
        ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_in_seconds(hosts: Hosts, run: Path, victim: int) -> None:
    with two_nodes(hosts, run) as jobs:
        jobs[0].until(lambda: newest_step(run) >= 4, "step 4")
        jobs[victim].send(signal.SIGKILL)
        began = time.monotonic()
        assert jobs[1 - victim].end() == 70, jobs[1 - victim].tail()
        assert time.monotonic() - began < 30
    assert f"Rank {victim}" in jobs[1 - victim].said
    assert "Start the job again" in jobs[1 - victim].said


def test_a_cut_cable_ends_both_and_a_restart_goes_on(hosts: Hosts, run: Path) -> None:
    with two_nodes(hosts, run) as jobs:
        jobs[0].until(lambda: newest_step(run) >= 4, "step 4")
        hosts.cut()
        began = time.monotonic()
        for job in jobs:
            assert job.end() == 70, job.tail()
        assert time.monotonic() - began < NOTICED_SECONDS
    assert all("has not been heard of" in job.said for job in jobs)
    before = newest_step(run)
    ip("-n", hosts.names[0], "link", "set", hosts.interface, "up")
    with two_nodes(hosts, run) as jobs:
        resumed = jobs[0].wait_for("resumed")
        assert resumed["step"] == before
        jobs[0].until(lambda: newest_step(run) > before, "a later step")
        jobs[1].send(signal.SIGTERM)
        assert [job.end() for job in jobs] == [75, 75]


def test_a_node_that_does_not_come_is_named(hosts: Hosts, run: Path) -> None:
    """Its name is what counts here; how long ranks wait is not."""
    code = (
        "import sys; from job.runtime import peers; peers.MEET_SECONDS = 5.0\n"
        "from job.runtime.ranks import Ranks\n"
        f"ranks = Ranks(0, 3, 0, 1, {hosts.addresses[0]!r}, 29555)\n"
        "try: peers.Peers(ranks)\n"
        "except Exception as error: print(error)\n"
    )
    found = subprocess.run(
        ["ip", "netns", "exec", hosts.names[0], sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert "1 of 3 ranks met in 5 seconds; missing: 1, 2" in found.stdout
