"""What the codes of a store's refusals mean (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).

A part of explain.py.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from job.errors import AccessError, JobError, StorageError


class Verdict(NamedTuple):
    kind: type[JobError]
    cause: str
    remedy: str
    transient: bool = False
    """Another try may help."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, …"""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def response_code(error: BaseException) -> str:
    """The store's own code for an error (such as NoSuchBucket), or an empty text. s3fs keeps it in the cause."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _response(error: BaseException) -> dict[str, dict[str, str]]:
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return response
        cause = cause.__cause__
    return {}


_ABSENT = {"NoSuchKey", "NoSuchUpload", "404"}
_UNKNOWN_KEY = {"InvalidAccessKeyId", "InvalidAccessKey", "InvalidClientTokenId", "UnrecognizedClientException"}
_WRONG_SECRET = {"SignatureDoesNotMatch", "InvalidSignatureException"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
_TOKEN = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "NotSignedUp", "InvalidPayer", "403", "Forbidden", "401"}
_ELSEWHERE = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "Redirect",
    "TemporaryRedirect",
    "301",
    "302",
    "307",
}
_SENSELESS = {"InvalidBucketName", "400", "Bad Request"}  # 400: all that a HEAD says of an expired token or a wrong region
_STORE_FULL = {"QuotaExceeded", "InsufficientStorage", "507", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_BUSY = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "BandwidthLimitExceeded",
    "TooManyRequests",
    "429",
    "ServiceUnavailable",
    "503",
}
DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}
_LATER = {"RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "408", "409", "425"}
_ACTIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListObjects": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
}
"""What a policy has to allow for an S3 operation."""
AGAIN = "then start the same command again."


def of_code(code: str, error: Exception, uri: str) -> Verdict:
    status = int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        remedy = "Create the bucket, or correct the URI or the endpoint (AWS_ENDPOINT_URL)."
        return Verdict(AccessError, "there is no such bucket", remedy)
    if code in _UNKNOWN_KEY:
        remedy = "Check AWS_ACCESS_KEY_ID (or the profile or role it comes from), and that the endpoint is the one it was made for."
        return Verdict(AccessError, "it is not permitted, for the store does not know the access key", remedy)
    if code in _WRONG_SECRET:
        remedy = "Check AWS_SECRET_ACCESS_KEY, and that no proxy on the way changes requests."
        return Verdict(AccessError, "it is not permitted, for the secret does not belong to the access key", remedy)
    if code in _CLOCK:
        remedy = (
            "Set this machine's clock (NTP): a store refuses what was signed more than 15 minutes before or after its own time."
        )
        return Verdict(AccessError, "the clocks of this machine and of the store differ", remedy)
    if code in _TOKEN:
        remedy = "Get new credentials (AWS_SESSION_TOKEN with its key and secret), or use a role, which renews them by itself."
        return Verdict(AccessError, "the session token has expired or is not valid", remedy)
    if code.startswith(("KMS.", "Kms")):
        remedy = "Check SSEKMSKeyId, the key's state, and that its policy allows kms:GenerateDataKey and kms:Decrypt."
        return Verdict(AccessError, "the encryption key can't be used", remedy)
    if code in _DENIED:
        return Verdict(AccessError, "it is not permitted", permission_remedy(error))
    if code in _ELSEWHERE:
        details = _response(error).get("Error", {})
        where = "".join(f" The store names {details[name]}." for name in ("Region", "Endpoint") if details.get(name))
        return Verdict(
            AccessError, "the bucket is in another region or behind another endpoint", f"Set AWS_REGION or AWS_ENDPOINT_URL.{where}"
        )
    if code == "InvalidObjectState":
        return Verdict(AccessError, "the object is archived", "Restore it from the archive, then start again.")
    if code in _SENSELESS:
        return senseless()
    if code in _STORE_FULL:
        return Verdict(StorageError, "the store or its quota is full", "Free some space; what was committed before is untouched.")
    if code in _ABSENT | _CHANGED:
        remedy = "Is someone else writing or removing here? Else start again."
        return Verdict(StorageError, "what it is about was changed or removed meanwhile", remedy)
    if code in _BUSY:
        remedy = f"Retries did not help. Start fewer jobs at once on this bucket, or wait, {AGAIN}"
        return Verdict(StorageError, f"{storage_at(uri)} is failing: it is too busy", remedy, transient=True)
    if code in DAMAGED:
        remedy = f"Retries did not help. Check the network and this machine's memory, {AGAIN}"
        return Verdict(StorageError, "what arrived at the store is not what was sent", remedy, transient=True)
    if status == 501 or code in ("NotImplemented", "501", "405", "MethodNotAllowed"):
        remedy = "Use a store that knows this operation; `clipjob check --run` tries all that are needed."
        return Verdict(AccessError, "the store does not know this operation", remedy)
    if 400 <= status < 500 and code not in _LATER:
        remedy = "Check the URI, AWS_ENDPOINT_URL, AWS_REGION and --storage-option."
        return Verdict(AccessError, "the store refuses the request", remedy)
    return failing(uri)


def failing(uri: str) -> Verdict:
    what = "network, endpoint and the store's health" if "://" in uri else "the disk and its mount"
    remedy = f"Retries did not help. Check {what}, {AGAIN}"
    return Verdict(StorageError, f"{storage_at(uri)} is unreachable or failing", remedy, transient=True)


def senseless() -> Verdict:
    remedy = "Check AWS_ENDPOINT_URL (with https:// or http://), AWS_REGION, the bucket's name and that no token has expired."
    return Verdict(AccessError, "the request makes no sense to the store or its client", remedy)


def permission_remedy(error: Exception) -> str:
    name = next((str(link.operation_name) for link in chain(error) if hasattr(link, "operation_name")), "")
    if "kms" in str(_response(error).get("Error", {}).get("Message", "")).lower():
        return "The policy of these credentials must allow kms:GenerateDataKey and kms:Decrypt for the bucket's key."
    allow = f"must allow {_ACTIONS[name]}" if name in _ACTIONS else "must allow to list, read, write and delete objects"
    remedy = f"The policy of these credentials {allow} for this URI."
    if _ACTIONS.get(name) == "s3:GetObject":
        remedy += " Without s3:ListBucket for its bucket, even an absent object is refused."
    if response_code(error) in ("403", "Forbidden"):
        remedy += " The store gave no reason: key, secret, token or clock may also be wrong."
    return remedy


def endpoint_in_use() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def storage_at(uri: str) -> str:
    return f"storage at {endpoint_in_use()}" if endpoint_in_use() and uri.startswith("s3") else "storage"
