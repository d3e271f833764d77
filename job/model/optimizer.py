"""AdamW for fine-tuning, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from job.errors import ConfigError

_BLOCK = re.compile(r"(.*\.(?:resblocks|blocks|layers?)\.\d+)\.")
_EMBEDDINGS = re.compile(r"(conv1|ln_pre|embedding|patch_embed|cls_token|pos_embed)")


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW in groups: matrices decay; 1-D parameters (biases, norms) and logit_scale do not.

    The fused implementation skips its update on the device when told of a gradient that is not finite, so the host need not look.

    Args: layer_decay: see layer_scales; a group's "lr_scale" is what its learning rate is multiplied by.
    """
    scales = layer_scales([name for name, parameter in model.named_parameters() if parameter.requires_grad], layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2
            new = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scales[name]}
            groups.setdefault((-scales[name], not decays), new)["params"].append(parameter)
    fused = next(model.parameters()).device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW([groups[key] for key in sorted(groups)], lr=lr, betas=betas, eps=eps, fused=fused)


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by. Args: names: of what learns.

    1 above the blocks of a tower, `decay` in its last block, decay² in the one below, and so on down to its embeddings.
    Source: BEiT, arXiv:2106.08254, appendix.

    Raises: ConfigError, when a tower is no stack of blocks.
    """
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    scales = {}
    for tower in (True, False):
        mine = [name for name in names if name.startswith("visual.") == tower]
        blocks = list(dict.fromkeys(match[1] for name in mine if (match := _BLOCK.match(name))))
        has_weights = any("." in name for name in mine)
        if has_weights and (not blocks or any(".stages." in name for name in mine)):
            raise ConfigError(f"--layer-decay needs towers of equal blocks, and the {'image' if tower else 'text'} tower is none.")
        for name in mine:
            match = _BLOCK.match(name)
            above = len(blocks) - blocks.index(match[1]) if match else len(blocks) + 1 if _EMBEDDINGS.search(name) else 0
            scales[name] = decay**above
    return scales


def warmup_steps(asked: int, steps: int) -> int:
    """The steps of linear warm-up; -1 asks for the lesser of 500 and a tenth of all."""
    return min(500, steps // 10) if asked < 0 else asked


def lr_at(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The learning rate of the update that follows `step` updates: linear warm-up to the peak, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
