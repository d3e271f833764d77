"""How many pairs at a time fit the GPU's memory, and whether compiling pays, found by trying a step's heaviest part."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from job.model.build import ClipModel
from job.model.step import parts_of
from job.model.towers import Towers, set_compiled

log = logging.getLogger(__name__)

SPARE = 0.05
"""Share of the GPU's memory that a trial leaves alone, for what a run needs besides: libraries of several ranks, odd batches."""
TRIALS = 3
WORTH_IT = 0.97
"""Time of a compiled step over that of one as it is, at most."""
BYTES_OF_OPTIMIZER = 8
"""AdamW's two moments of each weight that learns, in float32."""


def fitting_micro_batch(clip: ClipModel, groups: Sequence[Tensor], *, rows: int, autocast: torch.dtype | None) -> int:
    """The value of --micro-batch for this GPU, at most rows; 0 (all) where there is no GPU.

    Trials start with all of them and halve. Uses up no state that training reads: weights are only read, gradients removed.

    Args:
        clip: on the device, set up for training (what is locked or recomputed needs less).
        groups: tokens of a typical batch, see TokenGroups.groups.
        rows: pairs of this rank in a step.
    Raises: torch.OutOfMemoryError, when not even one pair fits.
    """
    if clip.shift.device.type != "cuda":
        return 0
    found = largest_that_fits(rows, lambda count: try_step(clip, groups, rows=rows, at_most=count, autocast=autocast))
    log.info("micro-batch", extra={"pairs": found, "of": rows})
    return found


def largest_that_fits(rows: int, trial: Callable[[int], None]) -> int:
    """rows, or the first of its halves, quarters, … for which the trial finds memory. Raises: what the trial of one raises."""
    count = rows
    while True:
        try:
            trial(count)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        else:
            return count
        finally:
            torch.cuda.empty_cache()
        count = -(-count // 2)


def compile_where_faster(
    clip: ClipModel, groups: Sequence[Tensor], *, rows: int, at_most: int, autocast: torch.dtype | None
) -> bool:
    """Whether a step's heaviest part is faster with compiled blocks; they are compiled afterwards if so. Args: see try_step."""

    def seconds() -> float:
        found = []
        for _ in range(1 + TRIALS):  # the first one compiles
            began = time.perf_counter()
            try_step(clip, groups, rows=rows, at_most=at_most, autocast=autocast)
            if clip.shift.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return min(found[1:])

    before = seconds()
    set_compiled(clip.module, on=True)
    try:
        after = seconds()
    except torch.OutOfMemoryError:  # which the step as it is had
        after = math.inf
    pays = after <= WORTH_IT * before
    set_compiled(clip.module, on=pays)
    figures = {"seconds_compiled": round(after, 4), "seconds_as_it_is": round(before, 4)}
    log.info("compiled" if pays else "not compiled", extra=figures)
    return pays


def try_step(clip: ClipModel, groups: Sequence[Tensor], *, rows: int, at_most: int, autocast: torch.dtype | None) -> None:
    """Takes the memory that a step takes at its height. Raises: torch.OutOfMemoryError."""
    device, module = clip.shift.device, clip.module
    towers = Towers(clip)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held = [torch.empty(BYTES_OF_OPTIMIZER * parameter.numel(), dtype=torch.uint8, device=device) for parameter in learning]
    if device.type == "cuda":
        held.append(
            torch.empty(int(SPARE * torch.cuda.get_device_properties(device).total_memory), dtype=torch.uint8, device=device)
        )
    pixels = torch.zeros(rows, 3, clip.view.height, clip.view.width, dtype=torch.uint8, device=device)
    part = parts_of(rows, [tokens.to(device) for tokens in groups], at_most=at_most)[-1]  # it has the longest texts
    try:
        for _ in range(2):  # the second time, the gradients of the first are there as well
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                outputs: tuple[Any, ...] = towers(pixels[part.images], part.groups)
            outputs = tuple(output for output in outputs if output.requires_grad)
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
            del outputs
    finally:
        module.zero_grad(set_to_none=True)
        del held
