"""One step: batch -> loss -> gradient -> update. The only place where the position of a run moves."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.order import derived_key
from job.model.build import ClipModel
from job.model.loss import batch_scores, clip_logits, clip_loss
from job.model.towers import encode_images, encode_texts

MAX_LOG_LOGIT_SCALE = math.log(100)
MODEL_STREAM = 3
_FIELDS = (
    "loss",
    "accuracy_image_to_text",
    "accuracy_text_to_image",
    "right_caption_probability",
    "gradient_norm",
    "logit_scale",
)


@dataclass(frozen=True)
class StepReport:
    """What a step did. Its numbers stay on the device until they are read, so that the next step can be queued first."""

    step: int
    """The number of this step, from 1."""
    lr: float
    pairs: int
    values: Tensor | None
    """(6,) float32 in the order of _FIELDS; None: too few images were left to learn from."""

    def read(self) -> dict[str, Any]:
        """The row of the history; a number that is not finite becomes None. Waits for the device."""
        numbers = self.values.tolist() if self.values is not None else [math.nan] * len(_FIELDS)
        row: dict[str, Any] = {"step": self.step, "lr": self.lr, "pairs": self.pairs}
        return row | {name: number if math.isfinite(number) else None for name, number in zip(_FIELDS, numbers, strict=True)}


def train_step(
    state: TrainState, batch: Batch, *, clip: ClipModel, lr: float, grad_clip: float, autocast: torch.dtype | None, seed: int
) -> StepReport:
    """Consumes one global batch and moves the position by one.

    A gradient that is not finite changes nothing but the position; the report shows it.

    Args:
        autocast: dtype of the towers' arithmetic; None: float32.
        seed: of what is random inside the model (dropout), which depends on it and on the step alone.
    """
    torch.manual_seed(derived_key(seed, MODEL_STREAM, state.step))
    state.step += 1
    state.bad_samples += len(batch.bad)
    pairs = len(batch.pixels)
    if pairs < 2:  # a single pair has no negatives: nothing to learn from
        return StepReport(state.step, lr, pairs, None)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    device = clip.shift.device
    pixels = batch.pixels.to(device, non_blocking=batch.pixels.is_pinned())
    groups = [tokens.to(device) for tokens in batch.tokens.groups]
    text_of = batch.tokens.text_of.to(device)
    model: Any = state.model
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        image_BD = encode_images(model, pixels, shift=clip.shift, scale=clip.scale)
        text_UD = encode_texts(model, groups)
    logits_BB = clip_logits(image_BD, text_UD[text_of], model.logit_scale.exp())
    loss = clip_loss(logits_BB)
    gradient_norm = _update(state, loss, grad_clip)
    scores = batch_scores(logits_BB.detach(), text_of)  # after the backward pass has given its memory back
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
        values = torch.stack([loss.detach(), *scores, gradient_norm, model.logit_scale.exp().reshape(())])
    return StepReport(state.step, lr, pairs, values)


def _update(state: TrainState, loss: Tensor, grad_clip: float) -> Tensor:
    """One update of the weights, skipped on the device if the gradient is not finite. Returns: the norm before clipping."""
    optimizer: Any = state.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    if state.scaler:
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(optimizer)
    else:
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    if state.scaler:
        state.scaler.step(optimizer)
        state.scaler.update()
    else:
        # The fused optimiser takes these two from GradScaler; set by hand they skip the update without asking the host.
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        optimizer.step()
    return norm


def count_nonfinite(state: TrainState, row: dict[str, Any]) -> None:
    """Keeps count of steps whose loss or gradient was not finite, from a row that was read."""
    if row["pairs"] >= 2 and (row["loss"] is None or row["gradient_norm"] is None):
        state.nonfinite_steps += 1
        state.nonfinite_in_a_row += 1
    else:
        state.nonfinite_in_a_row = 0
