"""What a store can't do is known before the job starts, and the probe leaves nothing behind."""

import json
import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faultproxy
import fsspec
import pytest
import system
import tiny
from botocore.retries.standard import ExponentialBackoff
from fsspec.implementations.memory import MemoryFileSystem
from s3server import BUCKET, KEY, SECRET, S3Server, s3_environment, use_s3

from job.errors import AccessError, StorageError
from job.storage import files, options, parallel, remote, s3
from job.storage.probe import Finding, check_storage, probe

EVERYWHERE = ["write", "create-only", "read", "read-range", "list", "delete"]
ON_S3 = [*EVERYWHERE[:-1], "checksum", "multipart", "list-uploads", "abort-upload", "delete"]
DENIED = faultproxy.error(403, "AccessDenied")


class Careless(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem that knows no create-only writes, as some are: it replaces what is there."""

    protocol = "careless"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        super().pipe_file(path, value)


class Strict(Careless):
    """Another that says so."""

    protocol = "strict"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode != "overwrite":
            raise NotImplementedError("only overwrites")
        super().pipe_file(path, value)


for kind in (Careless, Strict):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[faultproxy.Proxy]:
    """Between this process and the server, with limits so short that the end of all patience comes within seconds."""
    monkeypatch.setattr(parallel, "TRIES", 4)
    monkeypatch.setattr(parallel, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.02)
    with faultproxy.running_proxy(s3_server.endpoint) as running:
        use_s3(monkeypatch, running.endpoint)
        yield running
        remote.close()


@pytest.fixture
def remote_options() -> Iterator[None]:
    """fsspec's own client of local files makes no folders unless it is told to."""
    remote.close()
    options.configure({"auto_mkdir": "true"})
    yield
    options.configure({})
    remote.close()


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.operation: finding.state for finding in findings}


def found(findings: list[Finding], operation: str) -> Finding:
    return next(finding for finding in findings if finding.operation == operation)


def test_a_good_store_can_do_everything_and_is_left_as_it_was(s3_uri: str) -> None:
    files.write_bytes(files.join(s3_uri, "config.json"), b"{}")
    assert states(probe(s3_uri)) == dict.fromkeys(ON_S3, "ok")
    check_storage(s3_uri)
    assert files.list_files(s3_uri) == {"config.json": 2}
    assert not list(s3.open_uploads(s3_uri))


@pytest.mark.parametrize("kind", ["path", "local", "memory"])
def test_other_places_are_probed_too_and_left_as_they_were(tmp_path: Path, kind: str, remote_options: None) -> None:
    uri = {"path": str(tmp_path / "a" / "run"), "local": f"local://{tmp_path}/a/run", "memory": f"memory://{uuid.uuid4().hex}"}[
        kind
    ]
    assert states(probe(uri)) == dict.fromkeys(EVERYWHERE, "ok")
    assert files.list_files(uri) == {}
    assert kind != "path" or not (tmp_path / "a").exists()
    check_storage(uri)
    assert files.list_files(uri) == {}


@pytest.mark.parametrize("protocol", ["careless", "strict"])
def test_a_filesystem_without_create_only_is_degraded_not_refused(protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"{protocol}://box{uuid.uuid4().hex}/run"
    findings = probe(uri)
    assert states(findings) == {**dict.fromkeys(EVERYWHERE, "ok"), "create-only": "unsupported"}
    assert "two attempts" in found(findings, "create-only").text
    remote.close()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_storage(uri)
        assert files.create_bytes(files.join(uri, "claim"), b"mine")
        assert not files.create_bytes(files.join(uri, "claim"), b"theirs")
    assert files.read_bytes(files.join(uri, "claim")) == b"mine"
    assert len([record for record in caplog.records if "does not refuse to overwrite" in record.message]) == 1


def test_a_store_that_compares_no_checksums_and_knows_no_conditions_is_degraded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import boto3  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    bucket = uuid.uuid4().hex  # moto keeps the buckets of all its servers in one process together
    client.create_bucket(Bucket=bucket)
    client.close()
    try:
        with faultproxy.running_proxy(endpoint) as between, caplog.at_level(logging.WARNING):
            use_s3(monkeypatch, between.endpoint)
            between.add(faultproxy.hide("If-None-Match"), header="^If-None-Match:", times=faultproxy.FOREVER)
            findings = probe(f"s3://{bucket}/run")
            assert states(findings) == {**dict.fromkeys(ON_S3, "ok"), "create-only": "unsupported", "checksum": "unsupported"}
            remote.close()
            check_storage(f"s3://{bucket}/run")
            assert files.list_files(f"s3://{bucket}") == {}
            remote.close()
    finally:
        server.stop()
    assert [record.message for record in caplog.records if "compare checksums" in record.message]


def test_a_store_that_lets_nothing_be_removed_is_a_warning(proxy: faultproxy.Proxy, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    proxy.add(DENIED, "^DELETE .*", times=faultproxy.FOREVER)
    findings = probe(uri)
    assert states(findings) == {**dict.fromkeys(ON_S3, "ok"), "abort-upload": "failed", "delete": "failed"}
    assert not [finding for finding in findings if finding.fatal]
    assert "s3:DeleteObject" in found(findings, "delete").text
    assert "pile up" in found(findings, "delete").text
    assert "s3:AbortMultipartUpload" in found(findings, "abort-upload").text
    with caplog.at_level(logging.WARNING):
        check_storage(uri)
    assert [record for record in caplog.records if "pile up" in record.message]


def test_a_store_that_lists_no_uploads_is_a_warning(proxy: faultproxy.Proxy) -> None:
    proxy.add(DENIED, r"^GET .*\?uploads", times=faultproxy.FOREVER)
    findings = probe(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    assert states(findings) == {**dict.fromkeys(ON_S3, "ok"), "list-uploads": "failed"}
    assert not found(findings, "list-uploads").fatal
    assert "AbortIncompleteMultipartUpload" in found(findings, "list-uploads").text


@pytest.mark.parametrize(
    ("request_", "operation", "action"),
    [
        ("^PUT ", "write", "s3:PutObject"),
        ("^GET .*/written", "read", "s3:GetObject"),
        ("^GET .*list-type=2", "list", "s3:ListBucket"),
        ("^POST .*uploads", "multipart", "s3:PutObject"),
    ],
)
def test_what_a_run_needs_and_is_refused_is_an_error(proxy: faultproxy.Proxy, request_: str, operation: str, action: str) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    proxy.add(DENIED, request_, times=faultproxy.FOREVER)
    refused = found(probe(uri), operation)
    assert (refused.state, refused.fatal, type(refused.error)) == ("failed", True, AccessError)
    assert action in refused.text
    proxy.clear()
    assert files.list_files(uri) == {}


def test_the_check_at_the_start_of_a_job_takes_few_requests_and_survives_bad_moments(proxy: faultproxy.Proxy) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    check_storage(uri)
    assert len(proxy.requests) <= 8
    slow_down = proxy.add(faultproxy.error(503, "SlowDown"), "", times=2)
    again = proxy.add(faultproxy.error(500, "InternalError"), "PUT .*/checked", times=2)
    check_storage(uri)
    assert (slow_down.happened, again.happened) == (2, 2)


def test_the_check_at_the_start_of_a_job_ends_with_what_would_end_the_job(proxy: faultproxy.Proxy) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    proxy.add(DENIED, "^PUT ", times=faultproxy.FOREVER)
    with pytest.raises(AccessError, match=r"s3:PutObject"):
        check_storage(uri)
    proxy.clear()
    proxy.add(DENIED, "list-type=2.*delimiter=&", times=faultproxy.FOREVER)
    with pytest.raises(AccessError, match=r"Listing .*s3:ListBucket"):
        check_storage(uri)


def test_a_store_out_of_reach_is_asked_once_not_ten_times(proxy: faultproxy.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, "http://127.0.0.1:1")
    (finding,) = probe(f"s3://{BUCKET}/run")
    assert type(finding.error) is StorageError
    assert "nothing listens there" in finding.text


def _check(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `clipjob check`."""
    command = [sys.executable, "-m", "job", "check", *arguments]
    variables = {**system.clean_environment(), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_check_with_a_run_alone_checks_the_storage_alone(s3_server: S3Server, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    code, output, log = _check("--run", uri, **s3_server.environment)
    assert code == 0, log
    assert output.splitlines()[0].split() == ["storage:", "write", "ok"]
    assert output.endswith("The storage is fit for training: 0 errors, 0 warnings.\n")
    code, output, log = _check("--run", str(tmp_path / "run"), "--json")
    assert code == 0, log
    assert [tried["operation"] for tried in json.loads(output)["storage"]] == EVERYWHERE
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not the secret"}, 77, "secret does not belong"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 77, "no usable credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, 69, "nothing listens there"),
        ({"CLIPJOB_STORAGE_OPTION": "SSECustomerKey=abc"}, 2, "carries credentials"),
    ],
)
def test_check_exits_as_the_job_would(s3_server: S3Server, change: dict[str, str], code: int, says: str) -> None:
    environment = {**s3_environment(s3_server.endpoint), **change}
    ended, output, log = _check("--run", f"s3://{BUCKET}/x", **{name: value for name, value in environment.items() if value})
    assert ended == code, log
    assert says in " ".join((output + log).split())
    assert "not the secret" not in output + log


def test_check_of_data_and_storage_tells_both(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("path|tags\n" + "".join(f"{number}.png|caption {number}\n" for number in range(20)))
    tiny.write_lmdb(tmp_path / "x.lmdb", {f"{number}.png": tiny.picture(number) for number in range(20)})
    data = ["--csv", str(tmp_path / "data.csv"), "--lmdb", str(tmp_path / "x.lmdb"), "--global-batch-size", "4", "--json"]
    run = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    code, output, log = _check(*data, "--run", run, **s3_server.environment)
    assert code == 0, log
    report = json.loads(output)
    assert report["facts"]["rows"] == 20
    assert [tried["state"] for tried in report["storage"]] == ["ok"] * len(ON_S3)
    code, output, log = _check(*data, "--run", run, **{**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    assert code == 77, log
    assert json.loads(output)["facts"]["rows"] == 20
