"""How people see an attempt: metrics, the live line or log lines, what slows it down. A part of train.py by rank."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from job.attempt import Attempt, versions
from job.checkpoint.state import TrainState
from job.config import Config
from job.data.batches import DecodeTally
from job.data.captions import Captions
from job.data.pixels import View
from job.model.build import ClipModel
from job.model.flops import peak_flops, training_flops
from job.model.step import take_row
from job.runtime.board import check_board
from job.runtime.device import cores_of_rank, decode_threads, device_memory
from job.runtime.metrics import Metrics
from job.runtime.progress import Progress
from job.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)


def make_metrics(config: Config, *, watchdog: Watchdog, is_first: bool) -> Metrics:
    """Rank 0's are seen; the others count for nobody. Close it."""
    if config.tensorboard:
        check_board(config.tensorboard)
    of_what_runs = versions()
    of_what_runs["version"] = of_what_runs.pop("clipjob")
    textfile = None
    if config.metrics_textfile and is_first:
        textfile = Path(config.metrics_textfile) / f"clipjob-{hashlib.sha256(config.run.encode()).hexdigest()[:12]}.prom"
    return Metrics(
        port=config.metrics_port if is_first else 0,
        host=config.metrics_host,
        run=config.run,
        textfile=textfile,
        board=Path(config.tensorboard) if config.tensorboard and is_first else None,
        watchdog=watchdog,
        build=of_what_runs,
    )


def start_metrics(config: Config, attempt: Attempt, captions: Captions, clip: ClipModel, *, step: int, steps: int) -> None:
    """Tells the metrics which run this is, and from where to where it goes."""
    attempt.metrics.start_run(
        model=config.model,
        pretrained=config.pretrained,
        step=step,
        steps=steps,
        samples_per_step=config.global_batch_size,
        flops_share=_flops_share(config, attempt, captions, clip),
    )


def _flops_share(config: Config, attempt: Attempt, captions: Captions, clip: ClipModel) -> float | None:
    """What one sample per second uses of the arithmetic that all GPUs could do; None where that is not known."""
    if attempt.device.type != "cuda" or config.precision == "fp32":
        return None
    peak = peak_flops(torch.cuda.get_device_name(attempt.device))
    if peak is None:
        return None
    found = captions.tokens(captions.sample(256)).groups
    tokens = round(sum(group.numel() for group in found) / sum(len(group) for group in found))
    return training_flops(clip, tokens_per_text=tokens) / (peak * attempt.world.size)


class Telemetry:
    """Tells of steps, saves and evaluations to whoever looks: a terminal or a log, and /metrics. Close it.

    Args: tally: what the pipeline counts. state: takes from each row what a restart must know.
    """

    def __init__(
        self,
        config: Config,
        attempt: Attempt,
        state: TrainState,
        *,
        view: View,
        tally: DecodeTally,
        steps: int,
        steps_per_epoch: float,
    ) -> None:
        self._state, self._metrics, self._device, self._ledger = state, attempt.metrics, attempt.device, attempt.ledger
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._batch_size = config.global_batch_size
        ranks = attempt.world.ranks
        threads, cores = decode_threads(config.threads, ranks=ranks), cores_of_rank(ranks)
        gpu = "none" if attempt.device.type != "cuda" else "decodes" if config.jpeg_decoder == "gpu" else "idle"
        self._progress = Progress(
            steps=steps,
            done=state.step,
            every=config.log_every,
            steps_per_epoch=steps_per_epoch,
            seconds_by_state=lambda: attempt.ledger.seconds,
            remedy=lambda: tally.remedy(threads=threads, cores=cores, view=view, gpu=gpu),
            live=attempt.world.is_first,
        )
        self.evaluating = self._progress.evaluating
        self.close = self._progress.close

    def row(self, row: dict[str, Any]) -> None:
        """A step that has been read."""
        nonfinite = self._state.nonfinite_steps
        take_row(self._state, row)
        self._ledger.skipped_samples += row["bad_samples"]
        self._ledger.nonfinite_steps += self._state.nonfinite_steps - nonfinite
        self._progress.step(row, samples=self._batch_size)
        self._metrics.row(row, steps=self._steps, steps_per_epoch=self._steps_per_epoch)
        self._metrics.memory(device_memory(self._device))

    def evaluated(self, step: int, scores: dict[str, float], *, best: bool) -> None:
        self._progress.evaluated(step, scores, best=best)
        self._metrics.evaluated(scores)

    def saved(self, step: int, seconds: float, **figures: Any) -> None:
        """A checkpoint that is durable now."""
        self._progress.saved(step, seconds, **figures)
        self._metrics.saved(step, seconds, **figures)
