"""Pixels and tokens -> unit features, in one pass that DDP can follow."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.model.build import ClipModel
from job.model.image import encode_images, is_plain
from job.model.text import encode_texts, plain_text_tower
from job.runtime.world import World

_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters


class Towers(nn.Module):
    """Both towers in one forward pass, which is what DDP needs to see to know when a gradient is complete."""

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.model: Any = clip.module
        self._shift, self._scale = clip.shift, clip.scale

    def forward(self, images: Tensor, texts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Image features (B, D), text features (U, D), logit_scale's exponential, and logit_bias where the model has one.

        Args: images, texts: pixels and groups of tokens, see encode_images and encode_texts; or features, which stay as they are.
        """
        image_BD = images if images.is_floating_point() else encode_images(self.model, images, shift=self._shift, scale=self._scale)
        if not texts:
            text_UD = image_BD.new_zeros(0, image_BD.shape[1])
        else:
            text_UD = torch.cat(tuple(texts)) if texts[0].is_floating_point() else encode_texts(self.model, texts)
        bias = getattr(self.model, "logit_bias", None)
        biases = () if bias is None else (bias.reshape(()),)
        return image_BD, text_UD, self.model.logit_scale.exp().reshape(()), *biases


def set_compiled(model: Any, *, on: bool) -> int:
    """Has the blocks of both towers compiled, or not. Returns: towers whose blocks can be; others stay as they are."""
    towers = [model.visual] if is_plain(model) else []
    towers += [tower] if (tower := plain_text_tower(model)) is not None else []
    for tower in towers:
        tower.transformer.compiled = on
    return len(towers)


def _is_compiled(model: Any) -> bool:
    return any(getattr(part, "compiled", False) for part in model.modules())


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
    modes, compiled = [(part, part.training) for part in parallel.modules()], _is_compiled(clip.module)
    set_compiled(clip.module, on=False)  # these sizes come once
    parallel.eval()  # keeps running statistics as they are
    device = clip.shift.device
    pixels = torch.zeros(1, 3, clip.view.height, clip.view.width, dtype=torch.uint8, device=device)
    tokens = torch.ones(1, 1, dtype=torch.int64, device=device)
    for _ in range(2):
        outputs = [output for output in parallel(pixels, [tokens]) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    parallel.zero_grad(set_to_none=True)
    set_compiled(clip.module, on=compiled)
    for part, training in modes:
        part.training = training
