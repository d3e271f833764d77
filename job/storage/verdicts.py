"""Which of our errors an error of storage is, why it probably happened, and what to do. A part of explain.py.

Errors come from botocore, from s3fs (aiohttp below it), from urllib3, from other fsspec packages and from the kernel. They are
told apart by the store's own code, by the names of their classes and by their texts, so that none of these has to be imported.
"""

import contextlib
import errno
import os
import re
import socket
import ssl
from urllib.parse import urlsplit

from job.errors import AccessError, ConfigError, StorageError
from job.storage.codes import (
    AGAIN,
    Verdict,
    chain,
    endpoint_in_use,
    failing,
    of_code,
    permission_remedy,
    response_code,
    senseless,
    storage_at,
)

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOError", "DefaultCredentialsError"}
_NO_CREDENTIALS_NOW = {"CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError", "RefreshError"}
_UNREACHABLE = {
    "HTTPClientError",  # botocore
    "ConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "ChecksumError",
    "FlexibleChecksumError",
    "HTTPError",  # urllib3
    "HTTPException",  # http.client
    "ClientError",  # aiohttp
    "OSError",
}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs"}


def verdict_of(error: Exception, uri: str, *, ask_endpoint: bool = False) -> Verdict | None:
    """None: not storage's doing, or simply absent.

    Args: ask_endpoint: where a connection was cut, find out whether the endpoint of http:// speaks TLS (4 s at most).
    """
    code, names = response_code(error), {kind.__name__ for kind in type(error).__mro__}
    # fsspec's http calls it absent too, when it got no answer
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket" and "ClientConnectionError" not in _names(error.__cause__):
        return None
    texts = " ".join(str(link) for link in chain(error))
    verdict = (
        (of_code(code, error, uri) if code else None)
        or _of_credentials(names, uri)
        or (_of_tls(texts) if names & {"SSLError", "BotoCoreError", "ClientError"} else None)
        or (_of_number(error, names) if not code else None)
        or _of_kind(error, uri)
        or (_of_connection(error, names, texts, uri) if names & _UNREACHABLE and not code else None)
    )
    if verdict is None and ("BotoCoreError" in names or "Invalid endpoint" in texts):
        verdict = senseless()
    cut = re.search(r"reset by peer|Broken pipe|closing transport|(?i:connection was closed|disconnected)", texts) or code in (
        "400",
        "Bad Request",
    )
    if verdict and cut and ask_endpoint and uri.startswith("s3") and _speaks_tls(endpoint_in_use()):
        verdict = _TLS_PORT
    return verdict


def _of_credentials(names: set[str], uri: str) -> Verdict | None:
    remedy = {
        "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or give this machine or pod a service account.",
        "gc": "Set GOOGLE_APPLICATION_CREDENTIALS, or give this machine or pod a service account.",
        "ab": "Set AZURE_STORAGE_ACCOUNT_NAME and its credentials, or give this machine or pod an identity.",
        "az": "Set AZURE_STORAGE_ACCOUNT_NAME and its credentials, or give this machine or pod an identity.",
    }.get(uri[:2], "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine or pod a role.")
    if names & _NO_CREDENTIALS_NOW:
        return Verdict(AccessError, "the credentials could not be renewed", remedy, transient=True)
    return Verdict(AccessError, "no usable credentials were found", remedy) if names & _NO_CREDENTIALS else None


_TLS_PORT = Verdict(
    AccessError,
    "the endpoint speaks https, and its address says http",
    "Begin AWS_ENDPOINT_URL with https:// (or name another port).",
)


def _of_tls(texts: str) -> Verdict | None:
    """What is wrong with a secure connection. None: nothing, or it was only cut."""
    if re.search(r"mismatch, certificate|doesn't match|not valid for", texts):
        remedy = "Use a name that is in the certificate in AWS_ENDPOINT_URL, or give the server a certificate with the name in use."
        return Verdict(AccessError, "the server's certificate is for another host name", remedy)
    if re.search(r"certificate (has expired|is not yet valid)", texts):
        return Verdict(AccessError, "the server's certificate is out of date", "Renew it, or set this machine's clock.")
    if "CERTIFICATE_VERIFY_FAILED" in texts:
        remedy = "Set AWS_CA_BUNDLE to a PEM file with the certificate of the authority that signed the server's."
        return Verdict(AccessError, "the server's certificate is not trusted here", remedy)
    if re.search(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|RECORD_LAYER_FAILURE", texts):
        remedy = "Begin AWS_ENDPOINT_URL with http:// (or name another port)."
        return Verdict(AccessError, "the endpoint speaks http, and its address says https", remedy)
    if re.search(r"HTTP request (was sent )?to (an )?HTTPS", texts):
        return _TLS_PORT
    bundle = os.environ.get("AWS_CA_BUNDLE", "")
    if bundle and re.search(r"No such file|\[X509|PEM|CA certificate bundle", texts):
        return Verdict(AccessError, f"AWS_CA_BUNDLE names no file of certificates ({bundle})", "Correct AWS_CA_BUNDLE: a PEM file.")
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _of_number(error: Exception, names: set[str]) -> Verdict | None:
    """Of what the kernel says."""
    number = getattr(error, "errno", None)
    if "SafetensorError" in names and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])  # its writer is in Rust and hands over the words only
    if isinstance(error, PermissionError) or number in _REFUSED:
        remedy = f"Make it writable and readable for user {os.getuid()}, and not mounted read-only, or choose another path."
        return Verdict(AccessError, "it is not permitted", remedy if number in _REFUSED else permission_remedy(error))
    if number in _FULL:
        return Verdict(StorageError, "the disk or the quota is full", "Free some space; what was committed before is untouched.")
    if number in _NO_PLACE:
        return Verdict(AccessError, "no file can be at this place", "Choose another path.")
    if number == errno.ESTALE:
        remedy = f"Check the file server and its mount, {AGAIN}"
        return Verdict(StorageError, "the network file system has lost hold of the file", remedy, transient=True)
    if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        remedy = "Mount it with locks, or use a local disk (--scratch for staged files)."
        return Verdict(StorageError, "this file system lacks what is needed here, such as locks", remedy)
    if number in (errno.EMFILE, errno.ENFILE):
        return Verdict(StorageError, "too many files are open", "Raise the limit (ulimit -n).", transient=True)
    return None


def _of_kind(error: Exception, uri: str) -> Verdict | None:
    """Of a URI that nothing here can open."""
    if not (isinstance(error, ImportError) or (isinstance(error, ValueError) and "Protocol not known" in str(error))):
        return None
    package = _PACKAGES.get(uri.partition("://")[0])
    if package:
        return Verdict(ConfigError, f"this kind of URI needs a package that is not here: {package}", f"pip install {package}")
    return Verdict(
        ConfigError, "this kind of URI is not supported here", "Use a local path or s3://, or install fsspec's package for it."
    )


def _of_connection(error: Exception, names: set[str], texts: str, uri: str) -> Verdict:
    """Of a server that does not answer as it should."""
    if "Proxy" in " ".join(names) or "ProxyError" in texts or "Tunnel connection failed" in texts:
        refused = re.search(r"\b(401|403|407)\b", " ".join(str(link) for link in list(chain(error))[1:]))
        remedy = "Check HTTPS_PROXY and HTTP_PROXY; NO_PROXY names the hosts that are reached without one."
        if refused:
            return Verdict(AccessError, f"the proxy refuses us ({refused[1]})", remedy)
        return Verdict(StorageError, f"{storage_at(uri)} is unreachable, for its proxy is", remedy, transient=True)
    if re.search(r"not known|nodename nor servname|Failed to resolve|getaddrinfo|name resolution", texts):
        remedy = f"Correct the host in AWS_ENDPOINT_URL, or mend this machine's DNS, {AGAIN}"
        return Verdict(StorageError, f"{storage_at(uri)} is unreachable: its host name is unknown", remedy, transient=True)
    if re.search(r"Connect call failed|Connection refused", texts):
        remedy = f"Correct host and port in AWS_ENDPOINT_URL, or start the server, {AGAIN}"
        return Verdict(StorageError, f"{storage_at(uri)} is unreachable: nothing listens there", remedy, transient=True)
    return failing(uri)


def _names(error: BaseException | None) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _speaks_tls(endpoint: str) -> bool:
    """Whether an address that says http is one of https: many a server just hangs up on plain requests."""
    with contextlib.suppress(OSError, ValueError):
        place = urlsplit(endpoint)
        if place.scheme == "http" and place.hostname:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
            with socket.create_connection((place.hostname, place.port or 80), timeout=2) as connection:
                context.wrap_socket(connection, server_hostname=place.hostname).close()
                return True
    return False
