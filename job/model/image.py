"""Pixels -> unit features of images; open_clip's `encode_image` to rounding."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from job.model.blocks import are_plain, pooled_output
from job.model.text import unit


def encode_images(model: Any, pixels_BCHW: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Unit features of images.

    Args:
        pixels_BCHW: uint8 on the model's device.
        shift, scale: the model's normalisation, see ClipModel.
    Returns: (B, D), float32 or better.
    """
    if is_plain(model):
        return unit(_encode_plain(model.visual, pixels_BCHW, shift=shift, scale=scale))
    normalised = (
        pixels_BCHW.to(shift.dtype, memory_format=torch.contiguous_format).sub_(shift).mul_(scale)
    )  # one copy in float, not three
    return unit(model.encode_image(normalised))


def is_plain(model: Any) -> bool:
    """Whether the image tower is a ViT of open_clip's usual blocks that pools its class token."""
    tower: Any = getattr(model, "visual", None)
    if type(model) not in (CLIP, CustomTextCLIP) or type(tower) is not VisionTransformer:
        return False
    conv = tower.conv1
    return bool(
        tower.attn_pool is None
        and tower.pool_type == "tok"
        and not tower.output_tokens
        and type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride
        and conv.bias is None
        and are_plain(tower.transformer.resblocks)
    )


def _encode_plain(tower: Any, pixels_BCHW: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """open_clip's forward. The patches are one matrix, for torch's backward of a convolution takes longer than the product."""
    (high, wide), width = tower.conv1.kernel_size, tower.conv1.out_channels
    batch, colours, height, breadth = pixels_BCHW.shape
    normalised = pixels_BCHW.to(shift.dtype, memory_format=torch.contiguous_format).sub_(shift).mul_(scale)
    cut = normalised[:, :, : height // high * high, : breadth // wide * wide]
    patches = cut.reshape(batch, colours, height // high, high, breadth // wide, wide).permute(0, 2, 4, 1, 3, 5)
    x_BLW = F.linear(patches.reshape(batch, -1, colours * high * wide), tower.conv1.weight.view(width, -1))
    class_token = tower.class_embedding.to(x_BLW.dtype).expand(batch, 1, width)
    x_BLW = torch.cat([class_token, x_BLW], dim=1) + tower.positional_embedding.to(x_BLW.dtype)
    x_BLW = tower.patch_dropout(x_BLW)
    shapes = [(batch, x_BLW.shape[1])]
    x_TW = tower.ln_pre(x_BLW.reshape(-1, width))  # no view, so the first block is like the others to a compiler
    first = torch.zeros(batch, dtype=torch.int64, device=x_TW.device)
    pooled = tower.ln_post(pooled_output(tower.transformer, x_TW, shapes, at_N=first, causal=False))
    return cast(Tensor, pooled if tower.proj is None else pooled @ tower.proj)
