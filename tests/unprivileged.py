"""What a file's permissions do, also when the tests run as root, who may do anything."""

import os
import subprocess
import sys


def run_unprivileged(code: str) -> str:
    """Runs Python code in a process without root's capabilities. Returns: what it printed."""
    drop = [] if os.geteuid() else ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    return subprocess.run([*drop, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def error_of(call: str, *, imports: str) -> str:
    """Class and message of the JobError that a call raises, "nothing" if it raises none."""
    return run_unprivileged(
        f"from job.errors import JobError\n{imports}\ntry:\n    {call}\n    print('nothing')\n"
        "except JobError as error:\n    print(type(error).__name__, error)"
    )
