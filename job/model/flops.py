"""How much arithmetic a pair takes, and how much a GPU could do: their ratio is the model FLOPs utilisation (arXiv:2204.02311)."""

import re
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from job.model.build import ClipModel
from job.model.image import encode_images
from job.model.text import encode_texts

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense bf16 or fp16 operations per second, by NVIDIA's data sheets; the first name counts whose words a device's name contains."""


def peak_flops(device_name: str) -> float | None:
    """Of one GPU in bf16 or fp16; None for one that is not listed."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def training_flops(clip: ClipModel, *, tokens_per_text: int) -> float:
    """Floating-point operations that training on one pair needs: of a tower that learns three forward passes' (one forward, two
    backward), of a locked one a forward pass.

    Counted of matrix products, convolutions and attention, as the towers really run them: text on its real tokens.
    """
    module: Any = clip.module
    device = clip.shift.device
    pixels = torch.zeros(1, 3, clip.view.height, clip.view.width, dtype=torch.uint8, device=device)
    tokens = torch.ones(1, tokens_per_text, dtype=torch.int64, device=device)
    image_learns = any(parameter.requires_grad for parameter in module.visual.parameters())
    text_learns = any(
        parameter.requires_grad for name, parameter in module.named_parameters() if not name.startswith(("visual.", "logit_"))
    )
    modes, fast = [(part, part.training) for part in module.modules()], torch.backends.mha.get_fastpath_enabled()
    module.eval()  # running statistics stay as they are
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know its kernels
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as of_image:
            encode_images(module, pixels, shift=clip.shift, scale=clip.scale)
        with torch.no_grad(), FlopCounterMode(display=False) as of_text:
            encode_texts(module, [tokens])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in modes:
            part.training = training
    passes = {True: 3.0, False: 1.0}
    return passes[image_learns] * float(of_image.get_total_flops()) + passes[text_learns] * float(of_text.get_total_flops())
