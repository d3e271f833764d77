"""Metrics for Prometheus, in a registry of their own, on /metrics; and whether the job is alive, on /healthz and /readyz."""

import errno
import json
import logging
import math
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app, write_to_textfile
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from job.errors import ConfigError
from job.runtime.board import Board
from job.runtime.totals import Totals
from job.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)

STALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TEXTFILE_SECONDS = 10.0
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
UPLOAD_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What a job tells Prometheus. Thread-safe. Close it: it owns the server.

    Args:
        port: of /metrics. Taken: a free one, which `port` then names. 0: no server.
        host: the address to listen on.
        run: what this is a job of.
        textfile: written every TEXTFILE_SECONDS with the same, for node_exporter where nothing scrapes jobs, each series labelled
            with the run; it stays if the run is complete.
        board: folder for TensorBoard's event files.
        watchdog: whose heartbeat /healthz shows: 503 when it is too old. /readyz is 200 once steps are taken.
        build: versions, for clipjob_build_info.
    """

    def __init__(
        self,
        *,
        port: int,
        host: str = "127.0.0.1",
        run: str = "",
        textfile: Path | None = None,
        board: Path | None = None,
        watchdog: Watchdog | None = None,
        build: Mapping[str, str] | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._watchdog = watchdog or Watchdog(limit_seconds=0)
        self._run = run
        self._at = 0
        self._mfu: Gauge | None = None
        self._flops_share = 0.0
        self._board: Board | None = None
        Info("clipjob_build", "Versions of what runs.", registry=self._registry).info(dict(build or {}))
        self._gauge("clipjob_last_heartbeat_timestamp_seconds", "When the job last got on.").set_function(lambda: self._watchdog.at)
        self._step = self._gauge("clipjob_step", "Global batches consumed.")
        self._steps = self._gauge("clipjob_steps_planned", "Global batches of the whole run.")
        self._epoch = self._gauge("clipjob_epoch", "Passes over the training rows, with fraction.")
        self._eta = self._gauge("clipjob_eta_seconds", "Time to the last step at the present rate.")
        self._loss = self._gauge("clipjob_train_loss", "Loss of the last step.")
        self._accuracy = self._gauge("clipjob_train_accuracy_ratio", "Right matches within the batch.", ("direction",))
        self._right = self._gauge("clipjob_right_caption_probability_ratio", "Probability of the right caption within the batch.")
        self._lr = self._gauge("clipjob_learning_rate", "Of the last step.")
        self._norm = self._gauge("clipjob_gradient_norm", "Before clipping.")
        self._scale = self._gauge("clipjob_logit_scale", "1 / temperature.")
        self._duration = self._histogram("clipjob_step_duration_seconds", "Time of a step.", STEP_BUCKETS)
        self._rate = self._gauge("clipjob_samples_per_second", "Of the last step.")
        self._staged = self._counter("clipjob_staging_bytes", "Bytes of remote files that have come to scratch.")
        self._planned = self._gauge("clipjob_staging_bytes_planned", "Bytes of the remote files that this attempt needs.", start=0)
        self._saves = self._counter("clipjob_checkpoint_saves", "Tries to send a checkpoint: ok, failed.", ("result",))
        self._stall = self._histogram("clipjob_checkpoint_stall_seconds", "What a save cost the training thread.", STALL_BUCKETS)
        self._upload = self._histogram("clipjob_checkpoint_upload_seconds", "Time that sending a save took.", UPLOAD_BUCKETS)
        self._bytes = self._gauge("clipjob_checkpoint_bytes", "Size of the last checkpoint.")
        self._saved_at = self._gauge("clipjob_checkpoint_last_success_timestamp_seconds", "When one last became durable.")
        self._saved_step = self._gauge("clipjob_checkpoint_last_success_step", "Step of the last durable checkpoint.")
        waiting = "Checkpoints that wait on scratch because storage fails."
        self.waiting = self._gauge("clipjob_checkpoints_waiting", waiting, start=0)
        self._resumed = self._gauge("clipjob_resume_duration_seconds", "From the start of this attempt to its first step.")
        self._recall = self._gauge("clipjob_eval_recall_ratio", "Held-out recall.", ("direction", "k"))
        self._guard = self._gauge("clipjob_guard_recall_ratio", "Recall on the guard data.", ("direction", "k"))
        self._memory = self._gauge("clipjob_device_memory_bytes", "Of the GPU.", ("kind",))
        self._completed = self._gauge("clipjob_run_completed_timestamp_seconds", "When the run became complete; 0 before.", start=0)
        for result in ("ok", "failed"):
            self._saves.labels(result=result)
        self._totals = Totals()
        self._registry.register(self._totals)
        self._is_complete = False
        self._seen: dict[str, int] = {}
        self._plans: dict[str, int] = {}
        self._lock = threading.Lock()
        self.ready = False
        """Whether steps are being taken."""
        self._server, self._thread, self.port = _serve(port, host, self._answer)
        self._closed = threading.Event()
        self._board_folder = board
        self._textfile = textfile
        self._writer = threading.Thread(target=self._write_textfile, name="textfile", daemon=True)
        self._writer.start()

    def start_run(
        self,
        *,
        model: str,
        pretrained: str,
        step: int,
        steps: int,
        samples_per_step: int,
        flops_share: float | None = None,
    ) -> None:
        """What is known once the run has been claimed and its newest checkpoint restored.

        Args: flops_share: what one sample per second uses of all the arithmetic that the devices could do; None: unknown.
        """
        if self._board_folder:
            self._board = Board(self._board_folder, step=step)
        if flops_share:
            self._mfu = self._gauge("clipjob_mfu_ratio", "Arithmetic that the model needed, of what the devices could have done.")
            self._flops_share = flops_share
        which = Info("clipjob_run", "Which run this is.", registry=self._registry)
        which.info({"run": self._run, "model": model, "pretrained": pretrained})
        self._totals.samples_per_step = samples_per_step
        self._at = step
        self._step.set(step)
        self._steps.set(steps)

    def start_training(self, seconds: float) -> None:
        """The first step begins, so many seconds after the attempt."""
        self.ready = True
        self._resumed.set(seconds)

    def row(self, row: Mapping[str, Any], *, steps: int, steps_per_epoch: float) -> None:
        """A step, as the history has it."""
        self._at = row["step"]
        self._step.set(row["step"])
        self._epoch.set(row["step"] / steps_per_epoch)
        self._eta.set((steps - row["step"]) * row["seconds"])
        self._lr.set(row["lr"])
        self._duration.observe(row["seconds"])
        rate = self._totals.samples_per_step / max(row["seconds"], 1e-9)
        self._rate.set(rate)
        if self._mfu:
            self._mfu.set(rate * self._flops_share)
        if self._board:
            self._board.row(row, samples_per_second=rate)
        if row["loss"] is None or row["gradient_norm"] is None:
            return
        self._loss.set(row["loss"])
        self._norm.set(row["gradient_norm"])
        self._scale.set(row["logit_scale"])
        self._right.set(row["right_caption_probability"])
        for direction in ("image_to_text", "text_to_image"):
            self._accuracy.labels(direction=direction).set(row[f"accuracy_{direction}"])

    def evaluated(self, scores: Mapping[str, float]) -> None:
        """Held-out metrics, by CLIP_benchmark's names."""
        for name, value in scores.items():
            kind, _, k = name.removeprefix("guard_").partition("_retrieval_recall@")
            if k:
                direction = {"text": "image_to_text", "image": "text_to_image"}[kind]
                (self._guard if name.startswith("guard_") else self._recall).labels(direction=direction, k=k).set(value)
        if self._board:
            self._board.evaluated(scores, step=self._at)

    def memory(self, kinds: Mapping[str, int]) -> None:
        """Bytes of the GPU: allocated, reserved, peak."""
        for kind, size in kinds.items():
            self._memory.labels(kind=kind).set(size)

    def complete(self) -> None:
        self._is_complete = True
        self._completed.set(time.time())

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

    def restored(self, step: int, *, at: float) -> None:
        """An earlier attempt's checkpoint, of that time, is the last one so far. Args: at: seconds since 1970."""
        self._saved_at.set(at)
        self._saved_step.set(step)

    def save_failed(self) -> None:
        """A try to send a checkpoint failed; it will be tried again."""
        self._saves.labels(result="failed").inc()

    def tell(self, beacon: Mapping[str, Any]) -> None:
        """What the run's beacon says: the counters of all attempts."""
        self._totals.beacon = beacon

    def close(self) -> None:
        self._closed.set()
        self._writer.join(TEXTFILE_SECONDS)  # or it could put a file back that has been removed
        if self._board:
            self._board.close()
        if self._textfile and self._is_complete:
            self._write_once(self._textfile)
        elif self._textfile:
            self._textfile.unlink(missing_ok=True)  # this job is no more; the run's next attempt may be on another node
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _write_textfile(self) -> None:
        while self._textfile and not self._closed.wait(TEXTFILE_SECONDS):
            self._write_once(self._textfile)

    def _write_once(self, textfile: Path) -> None:
        try:
            write_to_textfile(str(textfile), _OfRun(self._registry, self._run))
        except OSError as error:
            log.warning("--metrics-textfile could not be written", extra={"file": str(textfile), "reason": error.strerror})

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The WSGI application."""
        path = environ.get("PATH_INFO", "")
        if path not in ("/healthz", "/readyz"):
            return make_wsgi_app(self._registry)(environ, start_response)
        good = self._watchdog.is_alive and (self.ready or path == "/healthz")
        status = {"phase": self._watchdog.phase, "heartbeat_age_seconds": round(self._watchdog.age_seconds, 3), "ready": self.ready}
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(status).encode() + b"\n"]

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = (), *, start: float = math.nan) -> Gauge:
        """Not a number until it is known: a loss of 0 after a restart would be a lie."""
        made = Gauge(name, text, labels, registry=self._registry)
        if not labels:
            made.set(start)
        return made

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=buckets)


class _OfRun(Collector):
    """All series of a registry, labelled with the run: node_exporter drops what several runs' textfiles would say alike."""

    def __init__(self, registry: CollectorRegistry, run: str) -> None:
        self._registry, self._run = registry, run

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels={**sample.labels, "run": self._run}) for sample in metric.samples]
            yield metric


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""


def _serve(port: int, host: str, application: Any) -> tuple[Any, Any, int]:
    """(server, its thread, its port); a port that is taken is met by a free one. Raises: ConfigError, for another host."""
    if not port:
        return None, None, 0
    try:
        server = make_server(host, port, application, _Server, _Silent)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"--metrics-host {host} can't be listened on: {error.strerror}. Give an address of this machine, or 0.0.0.0."
            ) from None
        server = make_server(host, 0, application, _Server, _Silent)
        log.warning("the port of /metrics is taken, so another one is used", extra={"asked": port, "port": server.server_port})
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread, int(server.server_port)
