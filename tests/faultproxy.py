"""An HTTP proxy between a client and an S3 server that does chosen things wrong, and counts what it did.

    with running_proxy(server.endpoint) as proxy:
        rule = proxy.add(error(503, "SlowDown"), "GET .*/x", times=2)
        ...                                     # clients use proxy.endpoint
        assert rule.happened == 2               # else the test has shown nothing

The Host header goes through unchanged, for it is signed. A fault is a function that carries out one exchange.
"""

import contextlib
import http.client
import random
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE_SECONDS = 60
"""How long the proxy itself waits for either side. Above every limit that a test sets."""
FOREVER = 10**9
"""Seconds, or times."""
_PIECE_BYTES = 2**16

Fault = Callable[["Exchange"], None]
Change = Callable[["Exchange", Iterable[bytes], int], Iterator[bytes]]
"""(exchange, pieces of a body, bytes in all) -> the pieces that go on."""


@dataclass
class Rule:
    """A fault and the requests that it hits.

    Args:
        match: regular expression, searched in "METHOD /path?query" as it is sent.
        header: another, searched in each line "name: value"; empty: any request.
        first: the first of the matching requests that is hit, counted from 1. times: how many are hit from there on.
        probability: of each of these to be hit, with dice of seed.
    """

    fault: Fault
    match: str = ""
    header: str = ""
    first: int = 1
    times: float = 1
    probability: float = 1.0
    seed: int = 0
    matched: int = 0
    """Requests that matched so far."""
    hit: int = 0
    """How many of these it was let loose on."""
    happened: int = 0
    """How often the fault really occurred: a body shorter than the place to cut it at goes through unharmed."""
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def hits(self, line: str, headers: Iterable[str]) -> bool:
        if not re.search(self.match, line) or (self.header and not any(re.search(self.header, text) for text in headers)):
            return False
        self.matched += 1
        if self.matched < self.first or self.hit >= self.times or self.dice.random() >= self.probability:
            return False
        self.hit += 1
        return True


class Proxy(ThreadingHTTPServer):
    """Close it to end every connection and thread. Use `running_proxy`."""

    daemon_threads = False
    request_queue_size = 100

    def __init__(self, endpoint: str) -> None:
        self.server = endpoint.removeprefix("http://")
        self.rules: list[Rule] = []
        self.requests: list[str] = []
        """"METHOD /path?query" of each request, in order of arrival."""
        self.failures: list[BaseException] = []
        """Bugs of the proxy itself."""
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.resets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, fault: Fault, match: str = "", **limits: Any) -> Rule:
        """From now on, a fault at matching requests; the first rule that hits wins. Args: see Rule."""
        rule = Rule(fault, match, **limits)
        with self.lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forgets all rules: everything is well again."""
        with self.lock:
            self.rules.clear()

    def count(self, match: str) -> int:
        """How many requests matched so far."""
        with self.lock:
            return sum(bool(re.search(match, line)) for line in self.requests)

    def rule_for(self, line: str, headers: Iterable[str]) -> Rule | None:
        with self.lock:
            self.requests.append(line)
            return next((rule for rule in self.rules if rule.hits(line, headers)), None)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
            reset = request in self.resets
            self.resets.discard(request)
        if reset:
            request.close()  # a shutdown before would send FIN, an orderly end
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError | http.client.HTTPException):  # either side hangs up as it likes
            self.failures.append(error)

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


@contextlib.contextmanager
def running_proxy(endpoint: str) -> Iterator[Proxy]:
    """A proxy in front of an endpoint (http://host:port)."""
    with Proxy(endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, name="faultproxy", daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.close()
    assert not proxy.failures, proxy.failures


class _HangUp(Exception):
    """Ends the connection to the client at once."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_SECONDS
    server: Proxy

    def handle_expect_100(self) -> bool:
        return True  # Exchange answers it, unless it is to be silent

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def exchange(self) -> None:
        line, headers = f"{self.command} {self.path}", [f"{name}: {value}" for name, value in self.headers.items()]
        rule = self.server.rule_for(line, headers)
        exchange = Exchange(self, rule)
        try:
            (rule.fault if rule else pass_on)(exchange)
        except _HangUp:
            self.close_connection = True
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            if rule is None and not self.server.closing.is_set() and exchange.server_failed:
                self.server.failures.append(AssertionError(f"the server failed by itself at {line}"))
        finally:
            exchange.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = exchange  # noqa: N815


class Exchange:
    """One request and its reply. Faults are written with these steps."""

    def __init__(self, handler: _Handler, rule: Rule | None) -> None:
        self._handler, self._rule = handler, rule
        self._server = http.client.HTTPConnection(handler.server.server, timeout=PATIENCE_SECONDS)
        self._reply: http.client.HTTPResponse | None = None
        headers = handler.headers
        self._chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self._request_bytes = int(headers.get("Content-Length") or headers.get("X-Amz-Decoded-Content-Length") or 0)
        self._begun = False
        self.server_failed = False
        """The server hung up, or said what is no HTTP."""

    def happened(self) -> None:
        """Counts the fault."""
        if self._rule:
            with self._handler.server.lock:
                self._rule.happened += 1

    def wait(self, seconds: float) -> None:
        """Lets time go by; ends early with the proxy."""
        if self._handler.server.closing.wait(seconds):
            raise _HangUp

    def request_body(self) -> Iterator[bytes]:
        """The rest of what the client sends, without HTTP's own chunks."""
        if self._begun:
            return
        self._begun = True
        if self._handler.headers.get("Expect", "").lower() == "100-continue":
            self._handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._chunked:
            yield from self._read(self._request_bytes)
            return
        while size := int(self._handler.rfile.readline().split(b";")[0], 16):
            yield from self._read(size)
            self._handler.rfile.readline()
        while self._handler.rfile.readline().strip():
            """A trailer."""

    def _read(self, count: int) -> Iterator[bytes]:
        while count > 0:
            piece = self._handler.rfile.read1(min(count, _PIECE_BYTES))  # type: ignore[attr-defined]
            if not piece:
                raise _HangUp  # the client did
            count -= len(piece)
            yield piece

    def drain(self) -> None:
        """Reads the request to its end."""
        for _ in self.request_body():
            pass

    def forward(self, change: Change | None = None, *, without: str = "") -> None:
        """Sends the request to the server. Args: without: a header that is left out."""
        self._server.putrequest(self._handler.command, self._handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self._handler.headers.items():
            if name.lower() not in ("expect", "connection", without.lower()):
                self._server.putheader(name, value)
        self._server.putheader("Connection", "close")
        self._server.endheaders()
        pieces: Iterable[bytes] = self.request_body()
        if change:
            pieces = change(self, pieces, self._request_bytes)
        heard = True
        for piece in pieces:
            try:
                if heard:
                    self._server.send(b"%x\r\n%s\r\n" % (len(piece), piece) if self._chunked else piece)
            except OSError:
                heard = False  # it has answered already, as to a wrong key
        if self._chunked and heard:
            self._server.send(b"0\r\n\r\n")

    def reply(self) -> http.client.HTTPResponse:
        """The server's reply, its body unread."""
        if self._reply is None:
            try:
                self._reply = self._server.getresponse()
            except (OSError, http.client.HTTPException):
                self.server_failed = True
                raise
        return self._reply

    def respond(
        self, change: Change | None = None, *, headers: dict[str, str] | None = None, missing: int = 0, chunked: bool = False
    ) -> None:
        """Sends the server's reply to the client.

        Args: headers: replaced. missing: so much smaller is Content-Length. chunked: sent in chunks, without a length.
        """
        reply, handler = self.reply(), self._handler
        length = reply.getheader("Content-Length")
        total = int(length or 0)
        bodiless = handler.command == "HEAD" or reply.status in (204, 304)
        chunked = (chunked or length is None) and not bodiless
        handler.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                handler.send_header(name, {key.lower(): new for key, new in (headers or {}).items()}.get(name.lower(), value))
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        elif length is not None:
            handler.send_header("Content-Length", str(total - missing))
        handler.end_headers()
        pieces = iter(lambda: reply.read1(_PIECE_BYTES), b"")
        for piece in change(self, pieces, total) if change else pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            handler.wfile.write(b"0\r\n\r\n")

    def answer(self, status: int, body: bytes) -> None:
        """Replies by itself; the server hears nothing."""
        with contextlib.suppress(_HangUp):
            self.drain()
        self._handler.send_response_only(status)
        self._handler.send_header("Content-Type", "application/xml")
        self._handler.send_header("Content-Length", str(len(body)))
        self._handler.end_headers()
        if self._handler.command != "HEAD":
            self._handler.wfile.write(body)

    def hang_up(self, *, reset: bool = False) -> None:
        """Ends the connection to the client: in order, or with RST, as a router or a dying server does."""
        if reset:
            client = self._handler.connection
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with self._handler.server.lock:
                self._handler.server.resets.add(client)
        raise _HangUp

    def client_leaves(self) -> None:
        """Reads what the client sends and answers nothing, until it hangs up."""
        client = self._handler.connection
        client.settimeout(0.05)
        while not self._handler.server.closing.is_set():
            with contextlib.suppress(TimeoutError):
                if not client.recv(_PIECE_BYTES):
                    break
        raise _HangUp

    def close(self) -> None:
        if self._reply is not None:
            self._reply.close()
        self._server.close()


# Faults


def pass_on(exchange: Exchange) -> None:
    """No fault."""
    exchange.forward()
    exchange.respond()


def error(status: int, code: str, message: str = "made by a test") -> Fault:
    """The store's own way to say no: a status with a code. Also 200 with an error in its body."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'

    def fault(exchange: Exchange) -> None:
        exchange.happened()  # before a test can see the answer
        exchange.answer(status, body.encode())

    return fault


def reset(exchange: Exchange) -> None:
    """RST before the reply; the server never hears of the request."""
    exchange.happened()
    exchange.hang_up(reset=True)


def silent(exchange: Exchange) -> None:
    """Takes what is sent and never answers, not even `100 Continue`."""
    exchange.happened()
    exchange.client_leaves()


def lose_reply(exchange: Exchange) -> None:
    """The server does what it is told, and the client never learns of it."""
    exchange.forward()
    exchange.reply().read()
    exchange.happened()
    exchange.hang_up()


def before(action: Callable[[], object]) -> Fault:
    """Something happens to the store just before the request gets there."""

    def fault(exchange: Exchange) -> None:
        action()
        exchange.happened()
        pass_on(exchange)

    return fault


def late(arrives: threading.Event) -> Fault:
    """The request is long on its way, up to an event. The client has perhaps given up; the server does it all the same."""

    def fault(exchange: Exchange) -> None:
        body = list(exchange.request_body())
        while not arrives.is_set():
            exchange.wait(0.05)
        exchange.forward(lambda *_: iter(body))
        exchange.reply().read()
        exchange.happened()
        exchange.hang_up()

    return fault


def hide(header: str) -> Fault:
    """The server does not see a header, as if it knew none of that name. Only where it checks no signature."""

    def fault(exchange: Exchange) -> None:
        exchange.forward(without=header)
        exchange.happened()
        exchange.respond()

    return fault


def headers(**replaced: str) -> Fault:
    """Headers of the reply hold something else: headers(content_range="bytes 0-1/2")."""
    names = {name.replace("_", "-"): value for name, value in replaced.items()}

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        if any(exchange.reply().getheader(name) is not None for name in names):
            exchange.happened()
        exchange.respond(headers=names)

    return fault


def in_request(change: Change) -> Fault:
    """Something happens to the body of the request."""

    def fault(exchange: Exchange) -> None:
        exchange.forward(change)
        exchange.respond()

    return fault


def in_reply(change: Change) -> Fault:
    """Something happens to the body of the reply."""

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        exchange.respond(change)

    return fault


def short(missing: int) -> Fault:
    """The reply ends early, and its Content-Length says that it is as it should be."""

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        enough = int(exchange.reply().getheader("Content-Length") or 0) > missing
        exchange.respond(without_end(missing) if enough else None, missing=missing if enough else 0)

    return fault


def short_chunks(missing: int) -> Fault:
    """The reply comes in chunks and ends early, in order."""

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        exchange.respond(without_end(missing), chunked=True)

    return fault


def torn_chunks(at: float) -> Fault:
    """The reply comes in chunks, and the connection ends without the last one."""

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        exchange.respond(cut(at), chunked=True)

    return fault


# Changes of a body. `at` is a share of it: 0.5 is half way.


def cut(at: float, *, reset: bool = False) -> Change:
    """The connection ends; the length that was promised is not reached."""

    def change(exchange: Exchange, pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
        for reached, piece in _split(pieces, int(at * total)):
            if reached:
                exchange.happened()
                exchange.hang_up(reset=reset)
            yield piece

    return change


def stall(at: float, seconds: float = FOREVER) -> Change:
    """Nothing moves for a while, or ever again."""

    def change(exchange: Exchange, pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
        for reached, piece in _split(pieces, int(at * total)):
            if reached:
                exchange.happened()
                exchange.wait(seconds)
            yield piece

    return change


def flip(at: float) -> Change:
    """One bit is another."""

    def change(exchange: Exchange, pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
        for reached, piece in _split(pieces, int(at * total)):
            if reached:
                exchange.happened()
            yield bytes([piece[0] ^ 1]) + piece[1:] if reached else piece

    return change


def without_end(missing: int) -> Change:
    """All but the last bytes."""

    def change(exchange: Exchange, pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
        for reached, piece in _split(pieces, total - missing):
            if reached:
                exchange.happened()
                return
            yield piece

    return change


def slow(bytes_per_second: float) -> Change:
    """No faster than this."""

    def change(exchange: Exchange, pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
        exchange.happened()
        for piece in pieces:
            step = max(1, int(bytes_per_second / 20))
            for start in range(0, len(piece), step):
                part = piece[start : start + step]
                exchange.wait(len(part) / bytes_per_second)
                yield part

    return change


def _split(pieces: Iterable[bytes], at: int) -> Iterator[tuple[bool, bytes]]:
    """(False, piece), and (True, piece) for the one that begins at this byte."""
    position = 0
    for piece in pieces:
        inside = at - position
        position += len(piece)
        if 0 < inside < len(piece):
            yield False, piece[:inside]
            yield True, piece[inside:]
        else:
            yield inside == 0, piece
