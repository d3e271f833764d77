"""Everything that can end a job, one class per exit code.

    JobError
    ├── ConfigError          2   bad flags, environment, or config file
    ├── DataError           65   bad CSV, LMDB, images, or weights file
    ├── StorageError        69   storage or hub unreachable after retries; disk or quota full
    ├── TrainingError       70   diverged, no progress, out of memory
    ├── PeerFailed               another rank ended, with its exit code; 70 if it is lost
    ├── DeviceError         71   this node cannot do what was asked of it
    ├── Stopped             75   a signal arrived; everything done so far is durable
    ├── Superseded          76   a newer attempt owns the run
    ├── AccessError         77   storage refuses us
    └── ResumeError         78   bad checkpoint, or a restart that contradicts the run

Schedulers act on the codes (Kubernetes podFailurePolicy, Slurm requeue), so a code never changes its meaning.
An exception that is not a JobError is a bug of ours: it exits 70 with its traceback.
"""

import errno


class JobError(Exception):
    """A job that ends for a known reason. The message is one paragraph: what, where, and what to do."""

    exit_code: int = 70


class ConfigError(JobError):
    exit_code = 2


class DataError(JobError):
    exit_code = 65


class StorageError(JobError):
    exit_code = 69


class TrainingError(JobError):
    exit_code = 70


class PeerFailed(JobError):
    """Another rank of the job has ended, and this one with it."""

    def __init__(self, message: str, exit_code: int = 70) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DeviceError(JobError):
    exit_code = 71


class Stopped(JobError):
    exit_code = 75


class Superseded(JobError):
    exit_code = 76


class AccessError(JobError):
    exit_code = 77


class ResumeError(JobError):
    exit_code = 78


def exit_code_of(error: BaseException) -> int:
    """The exit code that an exception ends the process with."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError.exit_code
    return error.exit_code if isinstance(error, JobError) else JobError.exit_code


COMPLETE = 0
INTERRUPTED_TWICE = 130
"""A second Ctrl-C on a terminal: the person does not want to wait for the save."""
