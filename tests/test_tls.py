"""TLS with a private authority, and proxies: both clients find them where every S3 client looks, and say what is wrong."""

import datetime as dt
import ipaddress
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from s3server import BUCKET, S3Server, running_server, use_s3

from job.errors import AccessError, StorageError
from job.storage import files, parallel, remote

PEM = serialization.Encoding.PEM


def make_certificate(folder: Path, *, name: str = "127.0.0.1", days: int = 1) -> Path:
    """Writes authority.pem, and server.pem with server.key signed by it. Args: days: until it expires."""
    folder.mkdir(parents=True, exist_ok=True)
    now = dt.datetime.now(dt.UTC)
    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of ours")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    begun, last = now - dt.timedelta(days=3), now + dt.timedelta(days=3)
    authority = (
        x509.CertificateBuilder(issuer, issuer, root.public_key(), x509.random_serial_number(), begun, last)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .sign(root, hashes.SHA256())
    )
    try:
        known_as: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        known_as = x509.DNSName(name)
    subject, ends = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), now + dt.timedelta(days=days)
    server = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), begun, ends)
        .add_extension(x509.SubjectAlternativeName([known_as]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(root, hashes.SHA256())
    )
    (folder / "authority.pem").write_bytes(authority.public_bytes(PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(key.private_bytes(PEM, *plain))
    return folder


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[S3Server]:
    files_of = (f"-s3.cert.file={certificate / 'server.pem'}", f"-s3.key.file={certificate / 'server.key'}")
    with running_server(tmp_path_factory.mktemp("tls"), *files_of, authority=certificate / "authority.pem") as server:
        yield server


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without this machine's own proxies and authorities, and with short patience."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel, "TRIES", 2)
    yield
    remote.close()


class Tunnel:
    """A proxy that counts: CONNECT to anywhere, and plain requests, which it answers by passing the bytes on."""

    def __init__(self) -> None:
        self.connects: list[str] = []
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self._open: list[socket.socket] = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        except OSError:
            return

    def _serve(self, client: socket.socket) -> None:
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (block := client.recv(65536)):
                    return
                head += block
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            if method == "CONNECT":
                self.connects.append(target)
                place = target
            else:
                self.requests.append(f"{method} {target}")
                place, _, path = target.removeprefix("http://").partition("/")
                head = head.replace(target.encode(), b"/" + path.encode(), 1)
                # One request per connection: the next may be for another place.
                head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            host, _, port = place.rpartition(":")
            server = socket.create_connection((host, int(port)), timeout=30)
            self._open.append(server)
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                server.sendall(head)
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            _pump(server, client)
        except OSError:
            client.close()

    def close(self) -> None:
        for connection in self._open:
            connection.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while block := source.recv(65536):
            target.sendall(block)
    except OSError:
        pass
    finally:
        for connection in (source, target):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture
def tunnel() -> Iterator[Tunnel]:
    running = Tunnel()
    yield running
    running.close()


def through_both_clients(uri: str, folder: Path) -> list[Callable[[], object]]:
    """The same bytes, written and read by s3fs and by the client that moves large files."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(b"bytes" * 1000)
    return [
        lambda: files.write_bytes(files.join(uri, "x"), b"1"),
        lambda: files.read_bytes(files.join(uri, "x")),
        lambda: files.list_files(uri),
        lambda: files.upload(source, files.join(uri, "y")),
        lambda: files.download(files.join(uri, "y"), target),
    ]


def test_a_private_authority_works_with_aws_ca_bundle(
    tls_server: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate / "authority.pem"))
    use_s3(monkeypatch, tls_server.endpoint)
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    for operation in through_both_clients(uri, tmp_path):
        operation()
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def refuses(operations: list[Callable[[], object]], says: str, kind: type[Exception] = AccessError) -> None:
    for operation in operations:
        with pytest.raises(kind, match=rf"s3://{BUCKET}.*{says}"):
            operation()


def test_an_authority_that_is_not_trusted_is_77_and_names_aws_ca_bundle(
    tls_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_s3(monkeypatch, tls_server.endpoint)
    refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "certificate is not trusted here.*AWS_CA_BUNDLE")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_bundle_that_is_none_is_77(
    tls_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content:
        (tmp_path / "bundle.pem").write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "bundle.pem"))
    use_s3(monkeypatch, tls_server.endpoint)
    refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "AWS_CA_BUNDLE names no file of certificates.*bundle.pem")


def test_a_server_under_another_name_is_77(
    tls_server: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate / "authority.pem"))
    use_s3(monkeypatch, tls_server.endpoint.replace("127.0.0.1", "localhost"))
    refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "for another host name.*in the certificate")


def test_a_certificate_out_of_date_is_77(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = make_certificate(tmp_path / "old", days=-1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(old / "server.pem", old / "server.key")
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(old / "authority.pem"))
        use_s3(monkeypatch, f"https://127.0.0.1:{listener.getsockname()[1]}")
        refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "certificate is out of date")
        remote.close()
        listener.shutdown(socket.SHUT_RDWR)


def test_http_to_a_port_of_https_is_77(tls_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, tls_server.endpoint.replace("https://", "http://"))
    refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "speaks https.*Begin AWS_ENDPOINT_URL with https://")


def test_https_to_a_port_of_http_is_77(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, s3_server.endpoint.replace("http://", "https://"))
    refuses(through_both_clients(f"s3://{BUCKET}/x", tmp_path), "speaks http,.*Begin AWS_ENDPOINT_URL with http://")


def test_an_unknown_host_is_69(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, "http://no-such-host.invalid:9000")
    operations = through_both_clients(f"s3://{BUCKET}/x", tmp_path)
    refuses([operations[0], operations[3]], r"host name is unknown.*DNS", StorageError)


def test_https_goes_through_https_proxy(
    tls_server: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tunnel: Tunnel
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate / "authority.pem"))
    monkeypatch.setenv("HTTPS_PROXY", tunnel.url)
    use_s3(monkeypatch, tls_server.endpoint)
    for operation in through_both_clients(f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path):
        before = len(tunnel.connects)
        remote.close()
        operation()
        assert len(tunnel.connects) > before
    assert set(tunnel.connects) == {tls_server.endpoint.removeprefix("https://")}
    assert not tunnel.requests


def test_http_goes_through_http_proxy_unless_no_proxy_names_the_host(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tunnel: Tunnel
) -> None:
    monkeypatch.setenv("HTTP_PROXY", tunnel.url)
    use_s3(monkeypatch, s3_server.endpoint)
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    for operation in through_both_clients(uri, tmp_path):
        before = len(tunnel.requests)
        operation()
        assert len(tunnel.requests) > before
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote.close()
    before = len(tunnel.requests)
    for operation in through_both_clients(uri, tmp_path):
        operation()
    assert len(tunnel.requests) == before


def test_a_proxy_out_of_reach_is_69_and_its_password_stays_hidden(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:hunter2@127.0.0.1:1")
    use_s3(monkeypatch, s3_server.endpoint)
    operations = through_both_clients(f"s3://{BUCKET}/x", tmp_path)
    for operation in (operations[0], operations[3]):
        with pytest.raises(StorageError, match=r"unreachable, for its proxy is.*HTTPS_PROXY.*NO_PROXY") as caught:
            operation()
        assert "hunter2" not in str(caught.value)
