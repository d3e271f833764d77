"""--storage-option: it goes out with each request that takes it, and never carries a credential."""

import os
from collections.abc import Iterator
from pathlib import Path

import faultproxy
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3server import BUCKET, S3Server, use_s3

from job.errors import ConfigError
from job.storage import files, options, remote


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    yield
    options.configure({})
    remote.close()


def use(text: str) -> None:
    options.configure(options.parse(text))


def test_options_are_pairs_and_a_value_may_hold_an_equals_sign() -> None:
    assert options.parse("") == {}
    assert options.parse(" ServerSideEncryption=aws:kms, SSEKMSKeyId=arn:x/y ,Tagging=a=b&c=d,RequestPayer=requester") == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "arn:x/y",
        "Tagging": "a=b&c=d",
        "RequestPayer": "requester",
    }
    assert options.parse("project=lab,project=lab") == {"project": "lab"}


@pytest.mark.parametrize("text", ["RequestPayer", "RequestPayer=", "=requester", "StorageClass=A,StorageClass=B"])
def test_what_is_no_pair_or_contradicts_itself_is_2(text: str) -> None:
    with pytest.raises(ConfigError, match="--storage-option"):
        options.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        *("key", "Key", "secret", "token", "password", "aws_access_key_id", "aws_session_token", "client_secret", "account_key"),
        *("sas_token", "connection_string", "SSECustomerKey", "SSECustomerAlgorithm", "CopySourceSSECustomerKey"),
    ],
)
def test_credentials_are_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--storage-option {name} carries credentials.*AWS_ACCESS_KEY_ID") as caught:
        options.parse(f"RequestPayer=requester,{name}=hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("ServerSideEncrytion", "Did you mean ServerSideEncryption"), ("Range", "Known for S3")]
)
def test_an_unknown_name_is_2_with_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is not known.*{hint}"):
        options.parse(f"{name}=x")


def test_an_operation_gets_what_it_takes() -> None:
    use("ServerSideEncryption=aws:kms,SSEKMSKeyId=k,BucketKeyEnabled=true,RequestPayer=requester,project=lab")
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k", "BucketKeyEnabled": True}
    payer = {"RequestPayer": "requester"}
    assert options.for_operation("put_object") == options.for_operation("PutObject") == encrypted | payer
    assert options.for_operation("create_multipart_upload") == encrypted | payer
    for name in ("upload_part", "get_object", "head_object", "list_multipart_uploads", "abort_multipart_upload"):
        assert options.for_operation(name) == payer
    assert options.for_protocol("gs") == {"project": "lab"}
    use("")
    assert options.for_operation("put_object") == {}
    assert options.for_protocol("s3") == {}


def _seen(proxy: faultproxy.Proxy, header: str) -> list[faultproxy.Rule]:
    """Counts requests that carry a header, by method."""
    return [
        proxy.add(faultproxy.pass_on, f"^{method} ", header=header, times=0) for method in ("PUT|POST", "GET", "HEAD", "DELETE")
    ]


def _every_operation(uri: str, folder: Path) -> None:
    (folder / "small").write_bytes(b"1")
    (folder / "large").write_bytes(os.urandom(17 * 2**20))
    files.write_bytes(files.join(uri, "written"), b"1")
    assert files.create_bytes(files.join(uri, "created"), b"1")
    for name in ("small", "large"):
        files.upload(folder / name, files.join(uri, name))
        files.download(files.join(uri, name), folder / "back")
    assert files.read_bytes(files.join(uri, "written")) == b"1"
    assert len(files.list_files(uri)) == 4
    files.abort_uploads(uri)
    files.remove_tree(uri)


def test_requester_pays_for_every_request(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use("RequestPayer=requester")
    with faultproxy.running_proxy(s3_server.endpoint) as proxy:
        use_s3(monkeypatch, proxy.endpoint)
        without = proxy.add(faultproxy.pass_on, "", times=0)
        rules = _seen(proxy, "^(?i:x-amz-request-payer): requester")
        _every_operation(f"s3://{BUCKET}/payer", tmp_path)
        remote.close()
    assert without.matched == len(proxy.requests)
    assert sum(rule.matched for rule in rules) == len(proxy.requests)


def test_encryption_is_asked_for_with_every_new_object(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use("ServerSideEncryption=AES256")
    with faultproxy.running_proxy(s3_server.endpoint) as proxy:
        use_s3(monkeypatch, proxy.endpoint)
        writes, *others = _seen(proxy, "^(?i:x-amz-server-side-encryption): AES256")
        _every_operation(f"s3://{BUCKET}/encrypted", tmp_path)
        remote.close()
    assert writes.matched == proxy.count(r"^PUT [^?]*$|^POST .*\?uploads")
    assert not [rule for rule in others if rule.matched]


def test_options_that_are_known_later_reach_new_requests(s3_uri: str) -> None:
    files.write_bytes(files.join(s3_uri, "x"), b"1")
    use("ServerSideEncryption=AES256")
    filesystem, _ = remote.open_uri(s3_uri)
    assert filesystem.s3_additional_kwargs == {"ServerSideEncryption": "AES256"}


def test_options_that_a_store_does_not_get_are_named_in_a_warning(s3_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    use("project=lab,RequestPayer=requester")
    remote.open_uri(s3_uri)
    remote.open_uri(s3_uri)
    assert [record.options for record in caplog.records if "for other stores" in record.message] == [["project"]]  # type: ignore[attr-defined]


def test_options_of_other_protocols_reach_their_client() -> None:
    use("auto_mkdir=true")
    filesystem, _ = remote.open_uri("local:///tmp/x")
    assert filesystem.auto_mkdir is True


class Picky(MemoryFileSystem):  # type: ignore[misc]
    protocol = "picky"

    def __init__(self, *, use_listings_cache: bool, known: str = "") -> None:
        super().__init__(use_listings_cache=use_listings_cache)


def test_an_option_that_a_client_does_not_know_is_2() -> None:
    fsspec.register_implementation("picky", Picky, clobber=True)
    use("known=1")
    remote.open_uri("picky://x")
    remote.close()
    use("unknown=1")
    with pytest.raises(ConfigError, match=r"--storage-option.*picky://.*unknown"):
        remote.open_uri("picky://x")
