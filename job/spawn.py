"""The ranks of one node as processes: started together, told of every signal, and ended together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from job.runtime.ranks import Ranks
from job.runtime.stop import STOP_SIGNALS

FAILURE_GRACE_SECONDS = 60.0
"""How long the others may take to notice that a rank has failed. After a signal there is no limit: they are saving."""
POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def run_ranks(ranks: Ranks, arguments: list[str]) -> int:
    """Runs `clipjob` with these arguments as each rank of this node. Returns: the exit code of the rank that ended first with
    one that is not 0; of one that was killed, 128 and the signal's number, as a shell has it."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, remember)
    started_as = ["-m", "job"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
    children = [
        subprocess.Popen(  # noqa: S603  our own command
            [sys.executable, *started_as, *arguments],
            env={**os.environ, **ranks.environment(local_rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on a terminal reaches this process alone, which passes it on once
            preexec_fn=_prepare_child,
        )
        for local_rank in range(ranks.local_size)
    ]
    code, failed_at = 0, 0.0
    while any(child.poll() is None for child in children):
        while received:
            for child in children:
                child.send_signal(received[0])
            del received[0]
        for local_rank, child in enumerate(children):
            if child.poll() and not code:
                code, failed_at = _shell_code(child.returncode), time.monotonic()
                if child.returncode < 0:
                    name = signal.Signals(-child.returncode).name
                    sys.stderr.write(f"clipjob: rank {ranks.rank + local_rank} was killed by {name}\n")
                    sys.stderr.flush()
        if failed_at and time.monotonic() - failed_at > FAILURE_GRACE_SECONDS and code != 75:
            for child in children:
                child.kill()
        time.sleep(POLL_SECONDS)
    codes = [_shell_code(child.returncode) for child in children]
    return code or max(codes)


def _shell_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _prepare_child() -> None:
    """Signals wait until the rank can handle them. When the launcher dies, ranks get SIGTERM: they save, and leave."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
