"""Metrics for Prometheus, in a registry of their own, on /metrics; and whether the job is alive, on /healthz and /readyz."""

import errno
import json
import logging
import socketserver
import threading
import time
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from job.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)

STALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
UPLOAD_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What a job tells Prometheus. Thread-safe. Close it: it owns the server.

    Args:
        port: of /metrics. Taken: a free one, which `port` then names. 0: no server.
        watchdog: whose heartbeat /healthz shows: 503 when it is too old. /readyz is 200 once steps are taken.
    """

    def __init__(self, *, port: int, host: str = "0.0.0.0", watchdog: Watchdog | None = None) -> None:  # noqa: S104  scraped from afar
        self._registry = CollectorRegistry()
        self._watchdog = watchdog or Watchdog(limit_seconds=0)
        self._gauge("clipjob_last_heartbeat_timestamp_seconds", "When the job last got on.").set_function(lambda: self._watchdog.at)
        self.step = self._gauge("clipjob_step", "Global batches consumed.")
        self._staged = self._counter("clipjob_staging_bytes", "Bytes of remote files that have come to scratch.")
        self._planned = self._gauge("clipjob_staging_bytes_planned", "Bytes of the remote files that this attempt needs.")
        self._saves = self._counter("clipjob_checkpoint_saves", "Tries to send a checkpoint: ok, failed.", labels=("result",))
        self._stall = self._histogram("clipjob_checkpoint_stall_seconds", "What a save cost the training thread.", STALL_BUCKETS)
        self._upload = self._histogram("clipjob_checkpoint_upload_seconds", "Time that sending a save took.", UPLOAD_BUCKETS)
        self._bytes = self._gauge("clipjob_checkpoint_bytes", "Size of the last checkpoint.")
        self._saved_at = self._gauge("clipjob_checkpoint_last_success_timestamp_seconds", "When one last became durable.")
        self._saved_step = self._gauge("clipjob_checkpoint_last_success_step", "Step of the last durable checkpoint.")
        self.waiting = self._gauge("clipjob_checkpoints_waiting", "Checkpoints that wait on scratch because storage fails.")
        self._seen: dict[str, int] = {}
        self._plans: dict[str, int] = {}
        self._lock = threading.Lock()
        self.ready = False
        """Whether steps are being taken."""
        self._server, self._thread, self.port = _serve(port, host, self._answer)

    def staging(self, name: str, done_bytes: int, planned_bytes: int) -> None:
        """So many bytes of a remote file are here."""
        with self._lock:
            self._plans[name] = planned_bytes
            self._planned.set(sum(self._plans.values()))
            self._staged.inc(max(0, done_bytes - self._seen.get(name, 0)))
            self._seen[name] = max(done_bytes, self._seen.get(name, 0))

    def saved(self, step: int, _seconds: float, *, stall_seconds: float, upload_seconds: float, size: int) -> None:
        """A checkpoint that is durable now."""
        self._saves.labels(result="ok").inc()
        self._stall.observe(stall_seconds)
        self._upload.observe(upload_seconds)
        self._bytes.set(size)
        self._saved_at.set(time.time())
        self._saved_step.set(step)

    def save_failed(self) -> None:
        """A try to send a checkpoint failed; it will be tried again."""
        self._saves.labels(result="failed").inc()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The WSGI application."""
        path = environ.get("PATH_INFO", "")
        if path not in ("/healthz", "/readyz"):
            return make_wsgi_app(self._registry)(environ, start_response)
        good = self._watchdog.is_alive and (self.ready or path == "/healthz")
        status = {"phase": self._watchdog.phase, "heartbeat_age_seconds": round(self._watchdog.age_seconds, 3), "ready": self.ready}
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(status).encode() + b"\n"]

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=buckets)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""


def _serve(port: int, host: str, application: Any) -> tuple[Any, Any, int]:
    """(server, its thread, its port); a port that is taken is met by a free one."""
    if not port:
        return None, None, 0
    try:
        server = make_server(host, port, application, _Server, _Silent)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        server = make_server(host, 0, application, _Server, _Silent)
        log.warning("the port of /metrics is taken, so another one is used", extra={"asked": port, "port": server.server_port})
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread, int(server.server_port)
