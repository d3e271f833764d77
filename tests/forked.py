"""Jobs that begin as a fork of a process that has imported torch and open_clip already: seven seconds of CPU less for each start.

From there on it is the real command: its own process, signals, files, exit code. What happens before and while Python imports is
for real starts (`Job(..., forked=False)`), and so is anything that wants another environment for imports.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
OF_IMPORTS = ("HF_", "HOME", "KMP_", "LD_", "MKL_", "OMP_", "PYTHON", "TMPDIR", "TORCH", "XDG_")
"""Variables that count while modules are imported."""


class Forked:
    """What `subprocess.Popen` would be of such a job, as far as `Job` needs it."""

    stdin = None

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, cwd: Path) -> None:
        self.args = ["clipjob", *arguments]
        self.returncode: int | None = None
        ends = [os.pipe() for _ in range(3)]
        null = os.open(os.devnull, os.O_RDONLY)
        request = {"arguments": [*arguments], "environment": dict(environment), "cwd": str(cwd)}
        server = _server()
        socket.send_fds(server, [json.dumps(request).encode()], [null, *(writable for _, writable in ends)])
        self.pid = struct.unpack("i", server.recv(4))[0]
        for end in (null, *(writable for _, writable in ends)):
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(readable, "rb") for readable, _ in ends[:2])
        self._status = ends[2][0]

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            told = os.read(self._status, 4)
            assert len(told) == 4, "the process that forks jobs is gone"
            self.returncode = os.waitstatus_to_exitcode(struct.unpack("i", told)[0])
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_servers: dict[int, socket.socket] = {}


def _server() -> socket.socket:
    """The connection to this process's own server; it ends with this process."""
    if os.getpid() not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = [name for name in os.environ if name.startswith(("CLIPJOB_", "AWS_", *OF_IMPORTS[2:6]))]
        environment = {name: value for name, value in os.environ.items() if name not in names} | {"OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        _servers[os.getpid()] = ours
        atexit.register(_end, ours, process)
    return _servers[os.getpid()]


def _end(connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    connection.close()
    process.wait()


def serve(control: socket.socket) -> None:
    """Forks a job for each request, and tells how it ended; until the other side is gone."""
    import job.train

    assert job.train
    assert threading.active_count() == 1, "a fork copies only one thread"
    readable, writable = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writable)
    waiting: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control, readable], [], [])
        if readable in ready:
            os.read(readable, 4096)
            while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = waiting.pop(ended[0])
                os.write(status, struct.pack("i", ended[1]))
                os.close(status)
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not message:
                for pid in waiting:
                    os.kill(pid, signal.SIGKILL)
                return
            began = time.monotonic_ns()
            child = os.fork()
            if not child:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (control.fileno(), readable, writable, *waiting.values(), fds[3]):
                    os.close(end)
                become(json.loads(message), fds[:3], seed=began)
            waiting[child] = fds[3]
            for end in fds[:3]:
                os.close(end)
            control.send(struct.pack("i", child))


def become(request: dict[str, Any], fds: Sequence[int], *, seed: int) -> NoReturn:
    """Runs the command as `python -m job` would, and ends as Python would."""
    import random

    from job.__main__ import main

    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed(seed)
    sys.argv = [str(ROOT / "job" / "__main__.py"), *request["arguments"]]
    code: Any = 1
    try:
        main()
    except SystemExit as ending:
        code = ending.code or 0
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve(socket.socket(fileno=int(sys.argv[1])))
