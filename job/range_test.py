"""The learning rate that suits a model and its data, from a range test of single steps: --lr auto. A part of train.py by rank."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from job.attempt import Attempt
from job.checkpoint.state import TrainState
from job.config import Config, starts_random
from job.data.batches import Batch
from job.data.order import steps_in
from job.errors import ConfigError, TrainingError
from job.model.build import ClipModel
from job.model.step import batch_loss, train_step
from job.start import new_state, step_settings

log = logging.getLogger(__name__)

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Tried along each direction."""
COST = 1 + len(RATES) / 3
"""Of one direction, in steps of the towers: forward and backward once, then forward, a third of that, at each rate."""
LARGEST_SHARE = 0.03
"""Of the run's steps, that the test may cost."""
MOST_DIRECTIONS = 8
RATE_OF_NEW_WEIGHTS = 5e-4
"""Random weights have no direction to measure. Source: open_clip's default and, for ViT-B/32, CLIP (arXiv:2103.00020, Table 20)."""

_SMALL_RATE = 1e-3
"""Of the step that gives a direction: far enough to be exact in float32, and not so far that logit_scale meets its bound."""
_TRIES = 16
"""Of a step in fp16, whose scaler halves from 65536 after each gradient that overflows."""
_LOGIT_SCALES = tuple(1.4**power for power in range(16))
"""From 1 to 156."""


def check_range_test(config: Config, *, row_count: int) -> None:
    """Raises: ConfigError, when --lr auto would cost more than it may."""
    if config.lr < 0 and not starts_random(config.to_json()):
        batch_size, most = config.global_batch_size, config.max_steps
        _directions_in(steps_in(epochs=config.epochs, row_count=row_count, global_batch_size=batch_size, max_steps=most))


def find_lr(
    config: Config,
    attempt: Attempt,
    state: TrainState,
    clip: ClipModel,
    make_batches: Callable[..., Generator[Batch]],
    *,
    towers: nn.Module,
    steps: int,
) -> bool:
    """For --lr auto: puts the learning rate of weights as they are into state.range_test. All ranks must call it.

    Args: make_batches: see training_batches; takes start and steps.
    Returns: False if a signal came on the way.
    """
    if starts_random(config.to_json()):
        state.range_test = {"lr": RATE_OF_NEW_WEIGHTS}
        log.info("learning rate, the usual one of random weights", extra=state.range_test)
        return True
    directions = _directions_in(steps)
    log.info("trying learning rates", extra={"batches": 2 * directions})
    with attempt.ledger.within("evaluate"), contextlib.closing(make_batches(start=0, steps=2 * directions)) as batches:
        state.range_test = _range_test(config, attempt, clip, batches, towers=towers, directions=directions)
    return bool(state.range_test)


def _directions_in(steps: int) -> int:
    """How many directions the test of a run of so many steps takes. Raises: ConfigError, when one would cost more than it may."""
    count = math.floor(LARGEST_SHARE * steps / COST + 1e-9)
    if not count:
        raise ConfigError(
            f"--lr auto measures for {COST:g} steps, more than {LARGEST_SHARE:.0%} of a run of {steps}. Give --lr (1e-5 suits a "
            f"large pre-trained model, 1e-3 a small one), or {math.ceil(COST / LARGEST_SHARE)} steps or more."
        )
    return min(MOST_DIRECTIONS, count)


def _range_test(
    config: Config, attempt: Attempt, clip: ClipModel, batches: Iterator[Batch], *, towers: nn.Module, directions: int
) -> dict[str, Any]:
    """Finds the peak learning rate for weights as they are, and leaves them so.

    AdamW's first step goes as far along a line as its rate says. So one gradient gives the weights after a step at any rate, and
    the loss of another batch tells which rate was best. It is the least loss over all logit_scales: a model that is too sure of
    itself on new data would else gain most by forgetting all it knows. docs/decisions/0017-range-test.md has what was measured.

    Args: batches: this rank's shares of 2 * directions global batches.
    Returns: "lr", "rates" and "losses", the curve (None: not finite); nothing if a signal came on the way.
    Raises: TrainingError, when nothing could be measured.
    """
    began, world, module = time.monotonic(), attempt.world, clip.module
    before = {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()}
    found: list[list[float]] = []
    try:
        for _ in range(directions):
            one, other = next(batches, None), next(batches, None)
            if _stops(attempt) or one is None or other is None:
                return {}
            slopes = _direction(config, attempt, clip, one, towers=towers, before=before)
            losses = list(_losses_along(config, attempt, clip, other, towers=towers, slopes=slopes)) if slopes else []
            module.load_state_dict(before)
            if _stops(attempt):
                return {}
            if any(map(math.isfinite, losses)):
                found.append([loss if math.isfinite(loss) else math.inf for loss in losses])
    finally:
        module.load_state_dict(before)
        module.zero_grad(set_to_none=True)
    if not found:
        raise TrainingError(
            f"--lr auto found no finite loss in {2 * directions} batches. Look at the data with `clipjob check`, or give --lr."
        )
    mean = np.mean(np.array(found), axis=0).tolist()
    lr = world.share("learning rate", lambda: best_rate(RATES, mean))
    curve = {"lr": lr, "rates": list(RATES), "losses": [loss if math.isfinite(loss) else None for loss in mean]}
    log.info("learning rate", extra={**curve, "seconds": round(time.monotonic() - began, 3)})
    if lr in (RATES[0], RATES[-1]):
        log.warning("the learning rate found is at an end of those tried; another may be better", extra={"lr": lr})
    return curve


def _stops(attempt: Attempt) -> bool:
    """Whether a signal has come to any rank. A sign of life, too."""
    attempt.watchdog.beat("trying learning rates")
    return attempt.world.any(attempt.stop.requested)


def _direction(
    config: Config, attempt: Attempt, clip: ClipModel, batch: Batch, *, towers: nn.Module, before: dict[str, Tensor]
) -> dict[str, Tensor]:
    """How far each weight moves in AdamW's first step, per rate; nothing if the gradient is not finite. Afterwards the weights are
    those of a step at _SMALL_RATE."""
    trial = new_state(config, clip)
    for _ in range(_TRIES if trial.scaler else 1):
        report = train_step(trial, batch, towers=towers, lr=_SMALL_RATE, settings=step_settings(config), world=attempt.world)
        if report.read()["gradient_norm"] is not None:
            break
        attempt.watchdog.beat("trying learning rates")
    else:
        return {}
    del trial  # its moments make room for the directions
    clip.module.zero_grad(set_to_none=True)
    return {name: (weight.detach() - before[name].to(weight.device)) / _SMALL_RATE for name, weight in _learning(clip)}


def _losses_along(
    config: Config, attempt: Attempt, clip: ClipModel, batch: Batch, *, towers: nn.Module, slopes: dict[str, Tensor]
) -> Iterator[float]:
    """The batch's loss after the step at each of RATES; a signal ends it. Weights stay where the last rate has put them."""
    settings = step_settings(config)
    at = _SMALL_RATE
    for rate in RATES:
        if _stops(attempt):
            return
        with torch.no_grad():
            for name, weight in _learning(clip):
                weight.add_(slopes[name], alpha=rate - at)
        at = rate
        yield min(batch_loss(clip.module, batch, towers=towers, settings=settings, world=attempt.world, logit_scales=_LOGIT_SCALES))


def _learning(clip: ClipModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in clip.module.named_parameters() if weight.requires_grad)


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where the parabola through the least loss and its neighbours is least, over the logarithm of the rate; to two digits.

    Args: losses: those that are not finite are as bad as can be.
    """
    known = np.where(np.isfinite(losses), losses, np.inf)
    at = int(known.argmin())
    if at in (0, len(rates) - 1) or not np.isfinite(known[at - 1 : at + 2]).all():
        return rates[at]
    x = np.log(rates[at - 1 : at + 2])
    square, slope, _ = np.polyfit(x, losses[at - 1 : at + 2], 2)
    best = math.exp(float(np.clip(-slope / (2 * square), x[0], x[2]))) if square > 0 else rates[at]
    return float(f"{best:.1e}")
