"""Metrics for Prometheus, in a registry of their own, on /metrics."""

import errno
import logging
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

log = logging.getLogger(__name__)

STALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
UPLOAD_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What a job tells Prometheus. Thread-safe. Close it: it owns the server.

    Args:
        port: of /metrics. Taken: a free one, which `port` then names. 0: no server.
    """

    def __init__(self, *, port: int, host: str = "0.0.0.0") -> None:  # noqa: S104  a scraper comes from another machine
        self._registry = CollectorRegistry()
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
        self._server, self._thread, self.port = _serve(port, host, self._registry)

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

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=buckets)


def _serve(port: int, host: str, registry: CollectorRegistry) -> tuple[Any, Any, int]:
    """(server, its thread, its port); a port that is taken is met by a free one."""
    if not port:
        return None, None, 0
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        server, thread = start_http_server(0, host, registry)
        log.warning("the port of /metrics is taken, so another one is used", extra={"asked": port, "port": server.server_port})
    return server, thread, int(server.server_port)
