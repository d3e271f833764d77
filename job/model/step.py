"""One step: batch -> features -> loss and its gradient -> update. The only place where the position of a run moves."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.order import derived_key
from job.model.loss import LossGradients, contrastive_loss, losses_at
from job.runtime.world import World

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
_COUNTS = ("pairs", "bad_samples")


@dataclass(frozen=True)
class StepSettings:
    """What is the same in every step of a run."""

    global_batch_size: int
    grad_clip: float
    """0: none."""
    seed: int
    """Of what is random inside the model (dropout), which depends on it, the step and the rank alone."""
    autocast: torch.dtype | None = None
    """dtype of the towers' arithmetic; None: float32."""
    loss: str = "clip"
    soft_targets: float = 0.0
    """These two: see contrastive_loss."""
    micro_batch: int = 0
    """Pairs that go through the towers at a time; 0: all of this rank's."""


@dataclass(frozen=True)
class StepReport:
    """What a step did. Its numbers are on their way from the device until they are read: the next step can be queued first."""

    step: int
    """The number of this step, from 1."""
    lr: float
    values: Tensor
    """float32, in the order of _FIELDS and _COUNTS; on the host, once `arrived` has happened."""
    arrived: torch.cuda.Event | None = None

    def read(self) -> dict[str, Any]:
        """The row of the history; a number that is not finite becomes None. Waits for this step, but for none after it."""
        if self.arrived:
            self.arrived.synchronize()
        numbers = dict(zip(_FIELDS + _COUNTS, self.values.tolist(), strict=True))
        row: dict[str, Any] = {"step": self.step, "lr": self.lr, **{name: round(numbers[name]) for name in _COUNTS}}
        return row | {name: numbers[name] if math.isfinite(numbers[name]) else None for name in _FIELDS}


@dataclass(frozen=True)
class Part:
    """Images and texts that go through the towers together."""

    images: slice
    texts: slice
    groups: list[Tensor]
    """The tokens of texts, in groups of similar length."""


def train_step(
    state: TrainState, batch: Batch, *, towers: nn.Module, lr: float, settings: StepSettings, world: World
) -> StepReport:
    """Consumes one global batch, of which `batch` is this rank's share, and moves the position by one. All ranks must call it.

    A gradient that is not finite changes nothing but the position; the report shows it. The same goes for a global batch with
    fewer than two pairs, which has nothing to learn from.

    Args: towers: from make_towers.
    """
    state.step += 1
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    model: Any = state.model
    device = model.logit_scale.device
    images, groups, text_of, valid, text_id, tags = _on_device(
        batch, rows=world.largest_part(settings.global_batch_size), device=device
    )
    parts = parts_of(len(images), groups, at_most=settings.micro_batch)
    forward = partial(_forward, towers, images, settings=settings, random=(state.step - 1, world.rank))
    if len(parts) == 1:
        outputs = forward(parts[0])
        image_bD, text_UD = outputs[0].detach(), outputs[1].detach()
    else:
        outputs = ()
        image_bD, text_UD = _cached(forward, parts)
    bias = getattr(model, "logit_bias", None)
    gradients = contrastive_loss(
        _padded(image_bD, len(valid)),
        _padded(text_UD[text_of], len(valid)),
        valid_b=valid,
        text_id_b=text_id,
        logit_scale=model.logit_scale.detach().exp().reshape(()),
        logit_bias=None if bias is None else bias.detach().reshape(()),
        loss=settings.loss,
        soft_targets=settings.soft_targets,
        tags_bK=tags,
        world=world,
    )
    state.optimizer.zero_grad(set_to_none=True)
    text_gradient_UD = _summed(gradients.text[: len(text_of)], text_of, len(text_UD))
    for part in parts:
        last = part is parts[-1]
        unsynchronised = towers.no_sync() if isinstance(towers, DistributedDataParallel) and not last else contextlib.nullcontext()
        with unsynchronised:
            outputs = outputs or forward(part)
            slopes = [gradients.image[: len(images)][part.images], text_gradient_UD[part.texts]]
            if last:  # once: the gradients of these two are those of the whole batch
                slopes += [gradients.logit_scale, gradients.logit_bias]
            _backward(outputs, slopes, scaler=state.scaler, world=world)
            outputs = ()
    norm = _update(state, settings.grad_clip)
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
        return StepReport(state.step, lr, *_sent(_figures(gradients, norm, model, bad=len(batch.bad), world=world)))


@torch.no_grad()
def batch_loss(
    model: Any, batch: Batch, *, towers: nn.Module, settings: StepSettings, world: World, logit_scales: Sequence[float]
) -> list[float]:
    """The softmax loss of a global batch at each of these scales, with the weights as they are. All ranks must call it; all get
    the same. Not a number, with fewer than two good pairs."""
    rows = world.largest_part(settings.global_batch_size)
    images, groups, text_of, valid, *_ = _on_device(batch, rows=rows, device=model.logit_scale.device)
    forward = partial(_forward, towers, images, settings=settings, random=(0, world.rank))
    image_bD, text_UD = _cached(forward, parts_of(len(images), groups, at_most=settings.micro_batch))
    image_bD, text_bD = _padded(image_bD, rows), _padded(text_UD[text_of], rows)
    return losses_at(image_bD, text_bD, valid_b=valid, logit_scales=logit_scales, world=world)


def _forward(
    towers: nn.Module, images: Tensor, part: Part, *, settings: StepSettings, random: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Features of a part, and what else the loss needs. Args: random: step and rank, of which dropout depends."""
    torch.manual_seed(derived_key(settings.seed, MODEL_STREAM, *random, part.images.start))
    with torch.autocast(images.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
        outputs: tuple[Tensor, ...] = towers(images[part.images], part.groups)
        return outputs


@torch.no_grad()
def _cached(forward: Callable[[Part], tuple[Tensor, ...]], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Features of the images and texts of all parts."""
    features = [forward(part) for part in parts]
    return torch.cat([of_part[0] for of_part in features]), torch.cat([of_part[1] for of_part in features])


def _on_device(batch: Batch, *, rows: int, device: torch.device) -> tuple[Any, ...]:
    """(images, token groups, text_of, valid, text_id, tags). The last three have `rows` rows, as many on each rank.

    A rank without a single good image computes a blank one, so that it takes part in every transfer.
    """
    good = len(batch.images)
    images, groups, text_of = batch.images, batch.tokens.groups, batch.tokens.text_of
    if not good:
        images, text_of = images.new_zeros(1, *images.shape[1:]), torch.zeros(1, dtype=torch.int64)
        groups = (groups[0].new_zeros(1, groups[0].shape[1]),) if groups else (torch.ones(1, 1, dtype=torch.int64),)

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=tensor.is_pinned())

    valid = torch.arange(rows, device=device) < good
    padded = (_padded(put(tensor), rows) for tensor in (batch.tokens.text_id, batch.tokens.tags))
    return put(images), [put(group) for group in groups], put(text_of), valid, *padded


def parts_of(images: int, groups: list[Tensor], *, at_most: int) -> list[Part]:
    """Divides images, and texts in as many parts; of few texts the last part has some, for it completes the gradients.

    Args: groups: ordered by length. at_most: images of a part; 0: all in one.
    """
    count = max(1, -(-images // at_most)) if at_most else 1
    texts = sum(len(tokens) for tokens in groups)
    return [
        Part(
            slice(at * images // count, (at + 1) * images // count),
            slice(at * texts // count, (at + 1) * texts // count),
            _cut(groups, at * texts // count, (at + 1) * texts // count),
        )
        for at in range(count)
    ]


def _cut(groups: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """The texts start … stop-1, counted through all groups."""
    found, before = [], 0
    for tokens in groups:
        own = tokens[max(0, start - before) : max(0, stop - before)]
        if len(own):
            found.append(own)
        before += len(tokens)
    return found


def _padded(rows: Tensor, count: int) -> Tensor:
    """Zeros after the rows, up to count of them."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])[:count]


def _summed(gradient_bD: Tensor, text_of_b: Tensor, texts: int) -> Tensor:
    """(U, D): the gradient of each distinct text, from those of the captions that it is."""
    summed = gradient_bD.new_zeros(texts, gradient_bD.shape[1])
    if summed.is_cuda:  # here index_add_ adds in any order, and index_put_ sorts first; on a CPU it is the other way round
        return summed.index_put_((text_of_b,), gradient_bD, accumulate=True)
    return summed.index_add_(0, text_of_b, gradient_bD)


def _backward(outputs: tuple[Tensor, ...], slopes: list[Tensor], *, scaler: Any, world: World) -> None:
    """Adds to the gradients of all weights. Args: slopes: gradient of the loss with respect to each output, as far as given."""
    pairs = [(output, slope * world.size) for output, slope in zip(outputs, slopes, strict=False) if output.requires_grad]
    factors = [scaler.scale(slope) if scaler else slope for _, slope in pairs]
    torch.autograd.backward([output for output, _ in pairs], factors)


def _update(state: TrainState, grad_clip: float) -> Tensor:
    """One update of the weights, skipped on the device if the gradient is not finite. Returns: the norm before clipping."""
    optimizer: Any = state.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state.scaler:
        state.scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    largest = grad_clip or math.inf
    if state.scaler:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        state.scaler.step(optimizer)
        state.scaler.update()
    else:
        # The fused optimiser takes these two from GradScaler. Set by hand, one clips in the pass that updates, the other skips the
        # update without asking the host.
        optimizer.grad_scale, optimizer.found_inf = (norm / largest).clamp(min=1.0).float(), (~torch.isfinite(norm)).float()
        optimizer.step()
    return norm


def _figures(gradients: LossGradients, norm: Tensor, model: Any, *, bad: int, world: World) -> Tensor:
    own = torch.cat([gradients.figures.float(), gradients.figures.new_full((1,), bad, dtype=torch.float32)])
    *scores, bad_samples = world.total(own).unbind()
    scale = model.logit_scale.exp().reshape(())
    return torch.stack([*scores, norm.float(), scale.float(), gradients.pairs.float(), bad_samples])


def _sent(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(values on the host, when they have arrived there). Asked for later, they would come behind the next step."""
    if not values.is_cuda:
        return values, None
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def take_row(state: TrainState, row: dict[str, Any]) -> None:
    """Counts what went wrong in a step, from its row once that was read."""
    state.bad_samples += row["bad_samples"]
    if row["pairs"] >= 2 and (row["loss"] is None or row["gradient_norm"] is None):
        state.nonfinite_steps += 1
        state.nonfinite_in_a_row += 1
    else:
        state.nonfinite_in_a_row = 0
