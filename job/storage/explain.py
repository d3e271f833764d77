"""What storage raises, in words: the URI, the operation, the likely cause, the remedy, and the class with the right exit code."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from job.errors import JobError, StorageError
from job.storage.codes import chain, response_code
from job.storage.verdicts import verdict_of

__all__ = ["explained", "is_transient", "response_code", "shown"]

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_LONGEST_FOUND = 400
"""Characters of what the store or client said; some say a whole web page."""


def shown(text: str) -> str:
    """A URI or a message without passwords, signatures and secrets."""
    text = re.sub(r"(?<=://)[^/\s\"']*@", "***@", text)
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "")) > 7:  # shorter ones are of tests, and may be a part of any word
            text = text.replace(secret, "***")
    return re.sub(r"(?i)((?:X-Amz-)?(?:Signature|Credential|Security-Token|AWSAccessKeyId)|\bsig)=[^&\s\"']+", r"\1=***", text)


@contextmanager
def explained(uri: str, operation: str, *, writing: bool = False) -> Iterator[None]:
    """Turns what storage raises into our errors, with the URI, the operation, the likely cause and the remedy.

    Args:
        operation: what was being done, as "reading" or "listing".
        writing: nothing needs to be there beforehand, so what is absent was removed under our hands: a failure.
    Raises:
        FileNotFoundError: unchanged; there is no such object. Not when writing.
        AccessError: it refuses us, and would refuse us again: credentials, permission, no such bucket, read-only.
        StorageError: it may work later, or elsewhere: unreachable, failing, full.
        ConfigError: no such kind of URI.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        verdict = verdict_of(error, uri, ask_endpoint=True)
        kind, cause, remedy = verdict[:3] if verdict else (None, "", "")
        if verdict is None and writing and isinstance(error, FileNotFoundError):
            kind, cause = StorageError, "something was removed while it was being written"
            remedy = "Is someone removing this run? Else start again."
        if kind is None:
            raise
        text = f"{operation[:1].upper()}{operation[1:]} {uri} failed: {cause} ({_found(error)}). {remedy}"
        raise kind(shown(text)) from error


def is_transient(error: BaseException) -> bool:
    """Whether another try may help: unreachable, too slow, failing, damaged on the way. Not where storage refuses."""
    verdict = verdict_of(error, "") if isinstance(error, Exception) and not isinstance(error, JobError) else None
    return verdict is not None and verdict.transient


def _found(error: Exception) -> str:
    """What the store itself said, else what the client did."""
    said = next((link for link in chain(error) if isinstance(getattr(link, "response", None), dict)), error)
    text = " ".join(re.sub(r" \(reached max retries: \d+\)", "", str(said)).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= _LONGEST_FOUND else text[:_LONGEST_FOUND] + " …"
