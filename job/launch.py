"""From the command line to the process's exit code. Nothing heavy is imported before the signal handler is installed."""

import os
import sys
import traceback
from typing import NoReturn

from job.errors import JobError, PeerFailed
from job.runtime.stop import StopSignal

STOPPABLE = ("train", "demo", "pack")
"""Commands that save before they leave; in all others a signal ends the process as usual."""

_DISK_FULL = {28: "the disk is full", 122: "the disk quota is used up"}  # ENOSPC, EDQUOT


def main() -> NoReturn:
    """Runs the command in sys.argv; ends the process with the exit code that errors.py documents."""
    stop, stoppable = StopSignal(), len(sys.argv) > 1 and sys.argv[1] in STOPPABLE
    if stoppable:
        stop.install()
    try:
        code = run_command(sys.argv[1:], stop)
    except Exception:  # noqa: BLE001  a bug of ours; Python's own code for it, 1, says nothing to a scheduler
        traceback.print_exc()
        code = 70
    if stoppable:
        stop.ignore()
    if _rank() and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what is left of a broken group of ranks could keep the interpreter from ending
    sys.exit(code)


def run_command(arguments: list[str], stop: StopSignal) -> int:
    """The exit code of a command; errors are told on stderr."""
    import click

    from job.cli import cli

    try:
        code = cli.main(args=arguments, prog_name="clipjob", standalone_mode=False, obj=stop)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        command = f"clipjob {arguments[0]}" if arguments[0] in cli.commands else "clipjob"
        message = error.format_message()
        _tell(f"{message}{'' if message.endswith(('.', '?', ')')) else '.'} See `{command} --help`.")
        return 2
    except (click.Abort, KeyboardInterrupt):
        _tell("stopped")
        return 130
    except PeerFailed as error:
        if _rank() in ("", "0") or "ank 0 " in str(error):  # one voice is enough
            _tell(str(error))
        return error.exit_code
    except JobError as error:
        _tell(str(error))
        return error.exit_code
    except BrokenPipeError:  # a pager that was closed
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno in _DISK_FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            reason = _DISK_FULL[error.errno]
            _tell(f"{reason}{where}. Free some space, or point --scratch or --run elsewhere. Earlier checkpoints are kept.")
            return 69
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        reason = (str(error).strip().splitlines() or ["memory ran out"])[0]
        _tell(
            f"{reason} Start again with a smaller --micro-batch (auto finds what fits a GPU), on a larger machine, or in a new run "
            "with --grad-checkpointing."
        )
        return 70


def _tell(message: str) -> None:
    who = f"rank {_rank()}: " if _rank() else ""
    sys.stderr.write(f"clipjob: {who}{message}\n")
    sys.stderr.flush()


def _rank() -> str:
    """The number of this process among several that its environment names; empty for one alone."""
    return os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") not in ("", "1") else ""
