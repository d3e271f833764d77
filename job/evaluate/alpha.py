"""Between the base model and the tuned one: weights on the straight line from one to the other, and how far to go.

Source: WiSE-FT, arXiv:2109.01903. docs/decisions/0013-alpha.md says why the rule is as it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from job.errors import ConfigError, ResumeError
from job.evaluate.retrieval import recall_at_5

ALPHAS = tuple(number / 10 for number in range(11))
GUARD_LIMIT = 0.01
"""Recall@5 (mean of both ways) that the guard data may lose against the base."""


@dataclass(frozen=True)
class Scored:
    """One alpha's retrieval scores; empty where there is no such data."""

    alpha: float
    validation: dict[str, float]
    guard: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "validation": self.validation, "guard": self.guard}


def parse_alpha(text: str) -> float | None:
    """A number from 0 to 1; None for auto. Raises: ConfigError."""
    if text == "auto":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha must be auto or a number from 0 (the base) to 1 (the tuned model); found {text!r}.")
    return alpha


def mix(base: Path, tuned: Path, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) of the base and alpha of the tuned weights, logit_scale included, computed in float32.

    What both have in common (a locked tower), and either end, stay as they are, bit for bit. Whole numbers are the tuned model's.

    Args: base, tuned: safetensors files of the same model. Raises: ResumeError, if they are not.
    """
    ends = load_file(base), load_file(tuned)
    if alpha in (0, 1):
        return ends[int(alpha)]
    shapes = [{name: tensor.shape for name, tensor in end.items()} for end in ends]
    if shapes[0] != shapes[1]:
        raise ResumeError(f"{base} and {tuned} don't hold the weights of the same model, so there is nothing between them.")
    return {
        name: torch.lerp(ends[0][name].float(), tensor.float(), alpha).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in ends[1].items()
    }


def sweep(alphas: Sequence[float], score: Callable[[float], tuple[dict[str, float], dict[str, float]]]) -> list[Scored]:
    """Args: score: alpha -> scores on validation and guard data."""
    return [Scored(alpha, *score(alpha)) for alpha in alphas]


def largest_within_guard(scored: Sequence[Scored]) -> float:
    """The largest alpha whose guard recall@5 is at most GUARD_LIMIT below the base's. Args: scored: alpha 0 among them."""
    recalls = {row.alpha: recall_at_5(row.guard) for row in scored}
    return max(alpha for alpha, recall in recalls.items() if recall >= recalls[0] - GUARD_LIMIT - 1e-9)
