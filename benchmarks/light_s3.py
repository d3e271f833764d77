"""A stand-in for S3 that costs next to nothing: what is measured against it is the client. It verifies the checksums it is sent.

SeaweedFS takes 11 CPU-seconds for a GiB that it stores, so on few cores every client waits for it alike.
"""

import base64
import os
import re
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from awscrt.checksums import crc32c, crc64nvme

BLOCK_BYTES = 2**20
CHECKS: dict[str, tuple[Callable[..., int], int]] = {
    "x-amz-checksum-crc64nvme": (crc64nvme, 8),
    "x-amz-checksum-crc32": (zlib.crc32, 4),
    "x-amz-checksum-crc32c": (crc32c, 4),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _place(self) -> tuple[Path, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        return self.folder / urllib.parse.quote(urllib.parse.unquote(parts.path), safe=""), query

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        path, _ = self._place()
        if not path.is_file():
            return self._reply(404 if "/" in self.path.strip("/") else 200)  # any bucket is there
        self.send_response_only(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        return self.end_headers()

    def do_GET(self) -> None:
        path, query = self._place()
        if not path.is_file():
            listing = "list-type" in query or "uploads" in query
            return self._reply(200, self._listing(query)) if listing else self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        size = path.stat().st_size
        match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(match[1]), min(int(match[2] or size), size - 1)) if match else (0, size - 1)
        self.send_response_only(206 if match else 200)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            while start <= end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start + 1)
        return None

    def _listing(self, query: dict[str, str]) -> bytes:
        if "uploads" in query:
            return b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
        bucket = urllib.parse.quote("/" + urllib.parse.urlsplit(self.path).path.strip("/") + "/", safe="")
        found = ""
        for path in sorted(self.folder.glob(bucket + "*")):
            name = urllib.parse.unquote(path.name.removeprefix(bucket))
            if name.startswith(query.get("prefix", "")):
                found += (
                    f"<Contents><Key>{name}</Key><Size>{path.stat().st_size}</Size>"
                    '<ETag>"1"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>'
                )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()

    def do_PUT(self) -> None:
        path, query = self._place()
        if "If-None-Match" in self.headers and path.exists():
            self.rfile.read(int(self.headers["Content-Length"]))
            return self._reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        if "partNumber" in query:
            path = path.with_name(f"{path.name}.{query['partNumber']}")
        wanted = {name: self.headers[name] for name in CHECKS if name in self.headers}
        sums = dict.fromkeys(wanted, 0)
        buffer, left = memoryview(bytearray(BLOCK_BYTES)), int(self.headers["Content-Length"])
        with path.open("wb") as file:
            while left and (came := self.rfile.readinto(buffer[: min(left, BLOCK_BYTES)])):  # type: ignore[attr-defined]
                left -= came
                for name in sums:
                    sums[name] = CHECKS[name][0](buffer[:came], sums[name])
                file.write(buffer[:came])
        good = all(base64.b64encode(sums[name].to_bytes(CHECKS[name][1], "big")).decode() == wanted[name] for name in sums)
        if not good:
            return self._reply(400, b"<Error><Code>BadDigest</Code></Error>")
        return self._reply(200, ETag=f'"{path.stat().st_mtime_ns}"')

    def do_POST(self) -> None:
        path, query = self._place()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "delete" in query:
            return self._reply(200, b"<DeleteResult></DeleteResult>")
        if "uploads" in query:
            return self._reply(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        parts = sorted(path.parent.glob(path.name + ".*"), key=lambda part: int(part.name.rpartition(".")[2]))
        path.write_bytes(b"")
        os.truncate(path, sum(part.stat().st_size for part in parts))  # nobody reads them again: a real store would not copy either
        for part in parts:
            part.unlink()
        return self._reply(200, b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>")

    def do_DELETE(self) -> None:
        self._place()[0].unlink(missing_ok=True)
        self._reply(204)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up as they like."""


def _serve(folder: str, pipe: Any) -> None:
    Handler.folder = Path(folder)
    server = Server(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def light_server() -> Iterator[tuple[str, Path]]:
    """(endpoint, the folder of its objects), in memory where /dev/shm is there; gone afterwards."""
    memory = Path("/dev/shm")
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(folder, theirs), daemon=True)
        process.start()
        try:
            yield f"http://127.0.0.1:{ours.recv()}", Path(folder)
        finally:
            process.kill()
            process.join()


def object_file(folder: Path, bucket: str, key: str) -> Path:
    """Where the server keeps an object."""
    return folder / urllib.parse.quote(f"/{bucket}/{key}", safe="")
