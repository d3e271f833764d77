"""--storage-option: what requests to a store carry besides, such as who pays, or how an object is encrypted.

Names that begin with a capital are parameters of S3 requests, as S3's documentation spells them. Others are storage options of
the fsspec package of another protocol (gcsfs, adlfs, …). Credentials are neither: they come from where every client looks.
"""

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

from job.errors import ConfigError

_FOR_S3 = (
    "ACL",
    "BucketKeyEnabled",
    "CacheControl",
    "ContentDisposition",
    "ContentLanguage",
    "ExpectedBucketOwner",
    "GrantFullControl",
    "GrantRead",
    "GrantReadACP",
    "GrantWriteACP",
    "RequestPayer",
    "SSEKMSEncryptionContext",
    "SSEKMSKeyId",
    "ServerSideEncryption",
    "StorageClass",
    "Tagging",
)
"""What a request can carry without changing what it does. Ranges, conditions and checksums are the job's own."""
_SECRET = re.compile(
    r"key|key_?id|pass|user(name)?|auth|anon|.*(access_?key|account_?key|private_?key|secret|token|password|credential|ssecustomer"
    r"|sas|connection_?string).*",
    re.IGNORECASE,
)
_chosen: dict[str, str] = {}


def parse(text: str) -> dict[str, str]:
    """Name -> value of "RequestPayer=requester,ServerSideEncryption=aws:kms".

    Raises: ConfigError, for a name that S3 does not have, or that carries a credential. Its text shows no values.
    """
    found: dict[str, str] = {}
    for pair in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in pair.partition("="))
        if not (equals and name and value):
            raise ConfigError(f"--storage-option must be key=value, such as RequestPayer=requester; found {name or 'no key'!r}.")
        if _SECRET.fullmatch(name):
            raise ConfigError(
                f"--storage-option {name} carries credentials, and those never stand in a job's settings. Give them where every "
                "client looks: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or a role of this machine or pod (for Google "
                "and Azure: GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_*, or an identity)."
            )
        if name[:1].isupper() and name not in _FOR_S3:
            near = difflib.get_close_matches(name, _FOR_S3, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(f"--storage-option {name} is not known. {hint}Known for S3: {', '.join(_FOR_S3)}.")
        if name in found and found[name] != value:
            raise ConfigError(f"--storage-option {name} is given twice, with different values. Leave one out.")
        found[name] = value
    return found


def configure_storage(text: str) -> None:
    """Sets the options of this process, before its first request. Raises: ConfigError."""
    configure(parse(text))


def configure(options: Mapping[str, str]) -> None:
    """Args: options: from `parse`."""
    _chosen.clear()
    _chosen.update(options)
    for_operation.cache_clear()


@functools.cache
def for_operation(name: str) -> dict[str, Any]:
    """The options that an S3 operation takes, such as "put_object", by the client's own model of S3."""
    chosen = {key: _value(value) for key, value in _chosen.items() if key[:1].isupper()}
    if not chosen:
        return {}
    import botocore
    import botocore.session

    model = botocore.session.Session().get_service_model("s3")
    operation = next(known for known in model.operation_names if name in (known, botocore.xform_name(known)))
    taken = model.operation_model(operation).input_shape.members
    return {key: value for key, value in chosen.items() if key in taken}


def for_protocol(protocol: str) -> dict[str, Any]:
    """The options as arguments of an fsspec filesystem."""
    if protocol not in ("s3", "s3a"):
        return {key: _value(value) for key, value in _chosen.items() if not key[:1].isupper()}
    carried = {key: _value(value) for key, value in _chosen.items() if key[:1].isupper()}
    payer = carried.pop("RequestPayer", None)  # s3fs has its own word for it, without which it lists at the owner's expense
    return {"s3_additional_kwargs": carried, "requester_pays": payer == "requester"} if carried or payer else {}


def names_for_others(protocol: str) -> list[str]:
    """The options that a protocol's client does not get."""
    for_s3 = protocol in ("s3", "s3a")
    return sorted(name for name in _chosen if name[:1].isupper() != for_s3)


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)
