"""What storage raises, in words: the URI, the operation, the likely cause, the remedy, and the class with the right exit code."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from job.errors import AccessError, ConfigError, JobError, StorageError


def shown(text: str) -> str:
    """A URI or a message without passwords and signatures."""
    text = re.sub(r"(?<=://)[^/\s\"']*@", "***@", text)
    return re.sub(r"(?i)((?:X-Amz-)?(?:Signature|Credential|Security-Token|AWSAccessKeyId))=[^&\s\"']+", r"\1=***", text)


def response_code(error: BaseException) -> str:
    """The store's own code for an error (such as NoSuchBucket), or an empty text. s3fs keeps it in the cause."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""


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
        verdict = _verdict(error, uri)
        if verdict is None and writing and isinstance(error, FileNotFoundError):
            verdict = (
                StorageError,
                "something was removed while it was being written",
                "Is someone removing this run? Else start again.",
            )
        if verdict is None:
            raise
        kind, cause, remedy = verdict
        found = shown(str(error)).strip().rstrip(".") or type(error).__name__
        raise kind(f"{operation[:1].upper()}{operation[1:]} {shown(uri)} failed: {cause} ({found}). {remedy}") from error


_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOError",
}
_UNREACHABLE = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "ClientError", "OSError"}
_WRONG_PLACE = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
    "InvalidBucketName",
    "301",
    "400",  # all that a HEAD says of an expired token or a wrong region
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _verdict(error: Exception, uri: str) -> tuple[type[JobError], str, str] | None:
    """The class of our error, the likely cause and the remedy; None: not storage's doing, or simply absent."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code = response_code(error)
    number = getattr(error, "errno", None)
    if "SafetensorError" in names and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])  # its writer is in Rust and hands over the words only
    if code == "NoSuchBucket":
        return AccessError, "there is no such bucket", "Create the bucket, or correct the URI or the endpoint (AWS_ENDPOINT_URL)."
    causes = {kind.__name__ for kind in type(error.__cause__).__mro__}
    if isinstance(error, FileNotFoundError) and "ClientConnectionError" not in causes:  # fsspec's http calls that absent too
        return None
    if names & _NO_CREDENTIALS:
        return (
            AccessError,
            "no usable credentials were found",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine or pod a role.",
        )
    if isinstance(error, PermissionError) or number in _REFUSED:
        return AccessError, "it is not permitted", _permission_remedy(error)
    if number in _FULL:
        return StorageError, "the disk or the quota is full", "Free some space; what was committed before is untouched."
    if number in _NO_PLACE:
        return AccessError, "no file can be at this place", "Choose another path."
    if isinstance(error, ImportError) or (isinstance(error, ValueError) and "Protocol not known" in str(error)):
        remedy = "Use a local path or s3://, or install fsspec's package for it."
        return ConfigError, "this kind of URI is not supported here", remedy
    if names & _UNREACHABLE and code not in _WRONG_PLACE:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        where = f" at {shown(endpoint)}" if endpoint and uri.startswith("s3") else ""
        remedy = "Retries did not help. Check network, endpoint and the store's health, then start the same command again."
        return StorageError, f"storage{where} is unreachable or failing", remedy
    if code in _WRONG_PLACE or "BotoCoreError" in names or "Invalid endpoint" in str(error):
        remedy = "Check AWS_ENDPOINT_URL (with https:// or http://), AWS_REGION, the bucket's name and that no token has expired."
        return AccessError, "the request makes no sense to the store or its client", remedy
    return None


def _permission_remedy(error: Exception) -> str:
    if getattr(error, "errno", None) in _REFUSED and not response_code(error):
        return f"Make it writable and readable for user {os.getuid()}, and not mounted read-only, or choose another path."
    return (
        "Check the key, the secret, the clock and that the policy allows to list, read, write and delete objects under this URI "
        "(without permission to list, even an absent object is refused)."
    )
