"""Pixels and tokens -> unit features. Text is computed on real tokens only, exactly as open_clip's `encode_text` to rounding."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.model.build import ClipModel
from job.runtime.world import World

_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters


class Towers(nn.Module):
    """Both towers in one forward pass, which is what DDP needs to see to know when a gradient is complete."""

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.model: Any = clip.module
        self._shift, self._scale = clip.shift, clip.scale

    def forward(self, pixels_BCHW: Tensor, groups: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Image features (B, D), text features (U, D), logit_scale's exponential, and logit_bias where the model has one.

        Args: pixels_BCHW, groups: see encode_images and encode_texts.
        """
        image_BD = encode_images(self.model, pixels_BCHW, shift=self._shift, scale=self._scale)
        text_UD = encode_texts(self.model, groups) if groups else image_BD.new_zeros(0, image_BD.shape[1])
        bias = getattr(self.model, "logit_bias", None)
        biases = () if bias is None else (bias.reshape(()),)
        return image_BD, text_UD, self.model.logit_scale.exp().reshape(()), *biases


def make_towers(clip: ClipModel, *, world: World) -> nn.Module:
    """The towers; with several ranks their gradients become the sum over all, while the backward pass is still at work.

    DDP takes the mean: what goes backwards has to be multiplied by the number of ranks.
    """
    towers = Towers(clip)
    if world.size == 1:
        return towers
    options: dict[str, Any] = {next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_OPTIONS): False}
    parallel = DistributedDataParallel(
        towers,
        gradient_as_bucket_view=True,
        find_unused_parameters=type(clip.module) not in (CLIP, CustomTextCLIP),  # CoCa's decoder, for one, learns nothing here
        **options,
    )
    _settle_buckets(parallel, clip)
    return parallel


def _settle_buckets(parallel: nn.Module, clip: ClipModel) -> None:
    """One pass with nothing to learn. DDP orders its buckets anew after the first one, and sums of three or more ranks depend on
    that order: so a run that goes on would differ in the last bits from one that was never interrupted."""
    modes = [(part, part.training) for part in parallel.modules()]
    parallel.eval()  # keeps running statistics as they are
    device = clip.shift.device
    pixels = torch.zeros(1, 3, clip.view.height, clip.view.width, dtype=torch.uint8, device=device)
    tokens = torch.ones(1, 1, dtype=torch.int64, device=device)
    for _ in range(2):
        outputs = [output for output in parallel(pixels, [tokens]) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    parallel.zero_grad(set_to_none=True)
    for part, training in modes:
        part.training = training


def encode_images(model: Any, pixels_BCHW: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Unit features of images.

    Args:
        pixels_BCHW: uint8 on the model's device.
        shift, scale: the model's normalisation, see ClipModel.
    Returns: (B, D), float32 or better.
    """
    normalised = (
        pixels_BCHW.to(shift.dtype, memory_format=torch.contiguous_format).sub_(shift).mul_(scale)
    )  # one copy in float, not three
    return _unit(model.encode_image(normalised))


def encode_texts(model: Any, groups: Sequence[Tensor]) -> Tensor:
    """Unit features of texts given as groups of (u, L) tokens, in the order of the groups.

    Returns: (U, D), U the sum of all u; float32 or better.
    """
    tower = _cuttable_tower(model)
    features = [_encode_cut(tower, tokens) if tower is not None else model.encode_text(tokens) for tokens in groups]
    return _unit(torch.cat(features))


def _unit(features: Tensor) -> Tensor:
    """Unit length, in float32 where the towers computed in less."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def lengths_of(model: Any) -> Callable[[Tensor], Tensor] | None:
    """How many positions of a row of tokens the text tower needs: those up to the one that it pools at.

    Only a causal tower that pools at the end-of-text token can be cut. Returns None for any other: it needs them all.
    """
    tower = _cuttable_tower(model)
    if tower is None:
        return None
    pool_type, eos_id = _pooling(tower)

    def lengths(tokens_NL: Tensor) -> Tensor:
        at = tokens_NL.argmax(dim=-1) if pool_type == "argmax" else (tokens_NL == eos_id).int().argmax(dim=-1)
        if pool_type == "eos":  # without any end token, argmax over zeros points at position 0, as it does in open_clip
            return torch.where((tokens_NL == eos_id).any(dim=-1), at + 1, tokens_NL.shape[1])
        return at + 1

    return lengths


def _cuttable_tower(model: Any) -> Any:
    """The module that holds the text tower's parts if its causal mask allows to cut rows at the end of text; else None."""
    if type(model) is CLIP:
        tower: Any = model
    elif (
        type(model) is CustomTextCLIP
        and type(model.text) is TextTransformer
        and model.text.cls_emb is None
        and not model.text.output_tokens
    ):
        tower = model.text
    else:
        return None
    return tower if tower.attn_mask is not None and _pooling(tower)[0] in ("argmax", "eos") else None


def _pooling(tower: Any) -> tuple[str, int]:
    if type(tower) is CLIP:
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def _encode_cut(tower: Any, tokens_UL: Tensor) -> Any:
    """open_clip's text forward on the first L positions. Exact, because no position sees a later one."""
    length = tokens_UL.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens_UL).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    pool_type, eos_id = _pooling(tower)
    pooled = text_global_pool(tower.ln_final(x), tokens_UL, pool_type, eos_token_id=eos_id)
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
