"""AdamW for fine-tuning, and the learning rate as a function of the step."""

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW in groups: matrices decay; 1-D parameters (biases, norms) and logit_scale do not.

    The fused implementation skips its update on the device when told of a gradient that is not finite, so the host need not look.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learning if parameter.ndim >= 2]
    others = [parameter for parameter in learning if parameter.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, weight_decay), (others, 0.0))
        if parameters
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def warmup_steps(asked: int, steps: int) -> int:
    """The steps of linear warm-up; -1 asks for the lesser of 500 and a tenth of all."""
    return min(500, steps // 10) if asked < 0 else asked


def lr_at(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The learning rate of the update that follows `step` updates: linear warm-up to the peak, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
