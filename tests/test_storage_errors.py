"""Every way in which storage refuses or fails is told in words: URI, operation, cause, remedy, never a secret."""

import errno
import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from botocore import exceptions as botocore_errors
from s3fs.errors import translate_boto_error
from s3server import BUCKET, KEY, SECRET, S3Server, running_server, use_s3

from job.errors import AccessError, ConfigError, JobError, StorageError
from job.storage import explain, files, remote
from job.storage.transfer import Replaced

URI = f"s3://{BUCKET}/run/x"


def _every_operation(uri: str, tmp_path: Path) -> list[Callable[[], object]]:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    return [
        lambda: files.read_bytes(uri),
        lambda: files.write_bytes(uri, b"1"),
        lambda: files.create_bytes(uri, b"1"),
        lambda: files.upload(source, uri),
        lambda: files.download(uri, tmp_path / "target"),
        lambda: files.list_files(uri),
        lambda: files.stat(uri),
    ]


@pytest.mark.parametrize(
    ("key", "secret", "says"), [(KEY, "a wrong secret", "secret does not belong to"), ("nobody", SECRET, "not know the access key")]
)
def test_a_wrong_key_or_secret_is_77_and_told_apart(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, secret: str, says: str
) -> None:
    use_s3(monkeypatch, s3_server.endpoint, key=key, secret=secret)
    for operation in _every_operation(f"s3://{BUCKET}/x", tmp_path):
        # s3fs asks for a HEAD before it reads a whole object, and a reply to HEAD has no room for reasons
        with pytest.raises(AccessError, match=rf"s3://{BUCKET}/x.*({says}|gave no reason: key, secret)") as caught:
            operation()
        assert secret not in str(caught.value)
    remote.close()


def test_no_credentials_are_77(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, s3_server.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for operation in _every_operation(f"s3://{BUCKET}/x", tmp_path):
        with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
            operation()
    remote.close()


def test_a_missing_bucket_is_77(s3_uri: str, tmp_path: Path) -> None:
    for operation in _every_operation(s3_uri.replace(BUCKET, "no-such-bucket", 1), tmp_path):
        with pytest.raises(AccessError, match="no such bucket"):
            operation()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "htp://127.0.0.1"])
def test_an_endpoint_without_a_scheme_is_77(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    use_s3(monkeypatch, endpoint)
    with pytest.raises(AccessError, match="AWS_ENDPOINT_URL"):
        files.read_bytes(f"s3://{BUCKET}/x")
    remote.close()


def test_a_dead_endpoint_is_69_within_a_minute_and_keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, "http://user:hunter2@127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(StorageError, match="unreachable") as caught:
        files.write_bytes(f"s3://{BUCKET}/x", b"1")
    assert time.monotonic() - began < 60
    assert "hunter2" not in str(caught.value)
    remote.close()


def test_an_unknown_kind_of_uri_is_2() -> None:
    with pytest.raises(ConfigError, match="nonsense://x"):
        files.read_bytes("nonsense://x/y")


def test_messages_never_show_passwords_or_signatures() -> None:
    text = explain.shown("GET https://user:p@ss@host/x?X-Amz-Signature=abc&X-Amz-Credential=def&a=1 failed")
    assert text == "GET https://***@host/x?X-Amz-Signature=***&X-Amz-Credential=***&a=1 failed"


def test_bugs_of_ours_stay_what_they_are() -> None:
    with pytest.raises(TypeError), explain.explained("x", "reading"):
        raise TypeError("ours")
    with pytest.raises(JobError, match="as it was"), explain.explained("x", "reading"):
        raise StorageError("as it was")


# The same verdict whichever client met the error


def _reply(code: str, status: int, operation: str, **details: str) -> Any:
    """An error of the store as botocore raises it."""
    response = {"Error": {"Code": code, "Message": "made by a test", **details}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore_errors.ClientError(response, operation)


Case = tuple[str, int, str, type[JobError], str]

REFUSALS: list[Case] = [
    ("InvalidAccessKeyId", 403, "GetObject", AccessError, "does not know the access key.*AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", 403, "GetObject", AccessError, "secret does not belong.*AWS_SECRET_ACCESS_KEY"),
    ("RequestTimeTooSkewed", 403, "GetObject", AccessError, "clocks.*NTP"),
    ("ExpiredToken", 400, "PutObject", AccessError, "token has expired.*AWS_SESSION_TOKEN"),
    ("TokenRefreshRequired", 400, "PutObject", AccessError, "token has expired.*role"),
    ("InvalidToken", 400, "PutObject", AccessError, "token has expired or is not valid"),
    ("AccessDenied", 403, "ListObjectsV2", AccessError, "not permitted.*s3:ListBucket"),
    ("AccessDenied", 403, "PutObject", AccessError, "not permitted.*s3:PutObject"),
    ("AccessDenied", 403, "UploadPart", AccessError, "not permitted.*s3:PutObject"),
    ("AccessDenied", 403, "GetObject", AccessError, "not permitted.*s3:GetObject"),
    ("AccessDenied", 403, "DeleteObject", AccessError, "not permitted.*s3:DeleteObject"),
    ("AccessDenied", 403, "AbortMultipartUpload", AccessError, "not permitted.*s3:AbortMultipartUpload"),
    ("AccessDenied", 403, "ListMultipartUploads", AccessError, "not permitted.*s3:ListBucketMultipartUploads"),
    ("403", 403, "HeadObject", AccessError, "not permitted.*s3:GetObject.*gave no reason"),
    ("NoSuchBucket", 404, "PutObject", AccessError, "no such bucket.*AWS_ENDPOINT_URL"),
    ("PermanentRedirect", 301, "GetObject", AccessError, "another region.*AWS_REGION.*names eu-west-1"),
    ("AuthorizationHeaderMalformed", 400, "GetObject", AccessError, "another region.*names eu-west-1"),
    ("KMS.DisabledException", 400, "PutObject", AccessError, "encryption key.*SSEKMSKeyId"),
    ("InvalidObjectState", 403, "GetObject", AccessError, "archived"),
    ("InvalidStorageClass", 400, "PutObject", AccessError, "refuses the request.*--storage-option"),
    ("NotImplemented", 501, "PutObject", AccessError, "does not know this operation"),
    ("QuotaExceeded", 403, "PutObject", StorageError, "quota is full"),
    ("PreconditionFailed", 412, "GetObject", StorageError, "changed or removed"),
]
FAILURES: list[Case] = [
    ("SlowDown", 503, "PutObject", StorageError, "failing: it is too busy.*fewer jobs"),
    ("503", 503, "HeadObject", StorageError, "failing: it is too busy"),
    ("TooManyRequests", 429, "GetObject", StorageError, "failing: it is too busy"),
    ("InternalError", 500, "GetObject", StorageError, "unreachable or failing"),
    ("InternalError", 200, "CompleteMultipartUpload", StorageError, "unreachable or failing"),
    ("502", 502, "GetObject", StorageError, "unreachable or failing"),
    ("RequestTimeout", 400, "UploadPart", StorageError, "unreachable or failing"),
    ("BadDigest", 400, "UploadPart", StorageError, "not what was sent"),
]


@pytest.mark.parametrize(
    ("code", "status", "operation", "kind", "says"), REFUSALS + FAILURES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_code_of_the_store_means_the_same_through_either_client(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int, operation: str, kind: type[JobError], says: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    texts = set()
    raw = _reply(code, status, operation, Region="eu-west-1")
    for error in (raw, translate_boto_error(raw)):
        with pytest.raises(kind, match=rf"Trying {URI} failed: .*{says}") as caught, explain.explained(URI, "trying"):
            raise error
        assert type(caught.value) is kind
        assert explain.is_transient(error) == ((code, status, operation, kind, says) in FAILURES)
        texts.add(str(caught.value))
    assert len(texts) == 1


CUT = urllib3.exceptions.ProtocolError("Connection broken", ConnectionResetError(104, "Connection reset by peer"))
CONNECTIONS = [
    botocore_errors.EndpointConnectionError(endpoint_url="http://x"),
    botocore_errors.ConnectTimeoutError(endpoint_url="http://x"),
    botocore_errors.ReadTimeoutError(endpoint_url="http://x"),
    botocore_errors.ConnectionClosedError(endpoint_url="http://x"),
    botocore_errors.ResponseStreamingError(error=CUT),
    botocore_errors.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore_errors.FlexibleChecksumError(error_msg="other bytes"),
    botocore_errors.HTTPClientError(error="x"),
    botocore_errors.ProxyConnectionError(proxy_url="http://x"),
    botocore_errors.SSLError(endpoint_url="https://x", error="UNEXPECTED_EOF_WHILE_READING"),
    CUT,
    urllib3.exceptions.IncompleteRead(1, 2),
    urllib3.exceptions.ReadTimeoutError(None, "x", "too slow"),  # type: ignore[arg-type]
    http.client.IncompleteRead(b"1", 2),
    http.client.RemoteDisconnected("closed"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("too slow"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
]


@pytest.mark.parametrize("error", CONNECTIONS, ids=lambda error: type(error).__name__)
def test_what_breaks_a_connection_is_69_and_worth_another_try(error: Exception) -> None:
    assert explain.is_transient(error)
    with pytest.raises(StorageError, match=r"unreachable|lost hold"), explain.explained(URI, "reading"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        Replaced("another version"),
        StorageError("told already"),
        FileNotFoundError(errno.ENOENT, "absent"),
        botocore_errors.NoCredentialsError(),
        botocore_errors.ParamValidationError(report="no"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "full"),
        PermissionError(errno.EACCES, "no"),
        TypeError("ours"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_other_try_can_mend_is_not_tried_again(error: BaseException) -> None:
    assert not explain.is_transient(error)


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, StorageError, "quota is full.*Free some space"),
        (errno.EDQUOT, StorageError, "quota is full.*Free some space"),
        (errno.ESTALE, StorageError, "lost hold of the file.*mount"),
        (errno.ENOLCK, StorageError, "locks.*--scratch"),
        (errno.ENOSYS, StorageError, "locks.*--scratch"),
        (errno.EMFILE, StorageError, "ulimit"),
        (errno.EROFS, AccessError, "read-only"),
        (errno.EIO, StorageError, "failing.*the disk"),
    ],
)
def test_what_the_kernel_says_is_told_with_its_remedy(number: int, kind: type[JobError], says: str) -> None:
    with pytest.raises(kind, match=f"Writing /nfs/x failed: .*{says}"), explain.explained("/nfs/x", "writing"):
        raise OSError(number, "text")


# Permissions, at a real server that knows several users


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with users named after what they may do."""
    folder = tmp_path_factory.mktemp("guarded")
    users = {KEY: ["Admin"], "reader": ["Read", "List"], "writer": ["Write"], "blind": ["Read", "Write"]}
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": SECRET}],
            "actions": [action if name == KEY else f"{action}:{BUCKET}" for action in actions],
        }
        for name, actions in users.items()
    ]
    (folder / "users.json").write_text(json.dumps({"identities": identities}))
    with running_server(folder, f"-s3.config={folder / 'users.json'}") as server:
        yield server


@pytest.mark.parametrize(
    ("user", "operation", "says"),
    [
        ("reader", "write", "Writing .*s3:PutObject"),
        ("reader", "upload", "Copying .*s3:PutObject"),
        ("reader", "delete", "Removing .*s3:DeleteObject"),
        ("writer", "read", "Reading .*s3:GetObject"),
        ("writer", "look up", "Looking up .*s3:GetObject"),
        ("writer", "list", "Listing .*s3:ListBucket"),
        ("blind", "list", "Listing .*s3:ListBucket"),
    ],
)
def test_a_missing_permission_is_named_as_policies_spell_it(
    guarded: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: str, operation: str, says: str
) -> None:
    use_s3(monkeypatch, guarded.endpoint)
    files.write_bytes(URI, b"there")
    use_s3(monkeypatch, guarded.endpoint, key=user)
    (tmp_path / "source").write_bytes(b"1")
    act: dict[str, Callable[[], object]] = {
        "write": lambda: files.write_bytes(URI, b"2"),
        "upload": lambda: files.upload(tmp_path / "source", URI),
        "delete": lambda: files.remove(URI),
        "read": lambda: files.read_bytes(URI),
        "look up": lambda: files.stat(URI),
        "list": lambda: files.list_files(URI),
    }
    with pytest.raises(AccessError, match=says) as caught:
        act[operation]()
    assert URI in str(caught.value)
    remote.close()


# Other protocols


@pytest.mark.parametrize(
    ("uri", "package"),
    [("gs://bucket/x", "gcsfs"), ("gcs://bucket/x", "gcsfs"), ("az://box/x", "adlfs"), ("abfs://box/x", "adlfs")],
)
def test_a_missing_package_is_2_and_named(uri: str, package: str) -> None:
    with pytest.raises(ConfigError, match=rf"{uri}.*pip install {package}"):
        files.read_bytes(uri)


def test_secrets_in_use_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "Fwo+token/+=")
    with pytest.raises(StorageError) as caught, explain.explained("https://user:p4ss@host/x?sig=abc", "reading"):
        raise OSError("key hunter2hunter2 and Fwo+token/+= and http://me:pw@proxy/")
    assert not [secret for secret in ("hunter2", "Fwo+", "p4ss", "abc", "me:pw") if secret in str(caught.value)]
