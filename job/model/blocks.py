"""open_clip's usual transformer block on sequences of several lengths, part by part, with nothing computed that nobody reads.

What looks at one position at a time (nearly all of the work) is computed on the tokens of all sequences at once, attention within
each group of sequences of one length. A tower that pools one position of each sequence reads one row of the last block's output, so
the last block computes queries, output and MLP for these rows alone: five sixths less of one block, forward and backward.

T: tokens of all sequences, one sequence after the other; W: the width; N: sequences.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Shapes = Sequence[tuple[int, int]]
"""Sequences and their length, of each group, in the order of T."""


def are_plain(blocks: Any) -> bool:
    """Whether these are open_clip's usual blocks, whose parts are called one by one here."""
    return all(
        type(block) is ResidualAttentionBlock
        and type(block.attn) is nn.MultiheadAttention
        and block.attn.in_proj_weight is not None
        and block.attn.bias_k is None
        and not block.attn.add_zero_attn
        and not block.attn.dropout
        and not hasattr(block, "ln_1_kv")
        for block in blocks
    )


def pooled_output(transformer: Any, x_TW: Tensor, shapes: Shapes, *, at_N: Tensor, causal: bool) -> Tensor:
    """(N, W): what all blocks of a transformer make of one position of each sequence. Args: at_N: int64, that position.

    Where something is learnt, a transformer that is marked `compiled` (see set_compiled) has what surrounds attention compiled:
    norms, activations and sums then join the products before them.
    """
    *before, last = transformer.resblocks
    learns = torch.is_grad_enabled()
    around = _compiled() if learns and getattr(transformer, "compiled", False) else _Around(_before_attention, _after_attention)
    for block in before:
        if transformer.grad_checkpointing and learns:
            x_TW = checkpoint(_block, block, x_TW, shapes, causal, around, use_reentrant=False)
        else:
            x_TW = _block(block, x_TW, shapes, causal, around)
    return _last_block(last, x_TW, shapes, at_N=at_N, causal=causal)


class _Around(NamedTuple):
    """What a block does before and after attention, each token by itself."""

    before: Callable[[Any, Tensor], Tensor]
    after: Callable[[Any, Tensor, Tensor], Tensor]


@cache
def _compiled() -> _Around:
    """One graph each for all blocks of a width: the weights go in, and the number of tokens may differ."""
    return _Around(torch.compile(_before_attention, dynamic=True), torch.compile(_after_attention, dynamic=True))


def _block(block: Any, x_TW: Tensor, shapes: Shapes, causal: bool, around: _Around) -> Tensor:
    heads = block.attn.num_heads
    mixed = []
    for part, (rows, length) in zip(around.before(block, x_TW).split(_tokens(shapes)), shapes, strict=True):
        q, k, v = part.view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed.append(_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(rows * length, -1))
    return around.after(block, x_TW, _joined(mixed))


def _last_block(block: Any, x_TW: Tensor, shapes: Shapes, *, at_N: Tensor, causal: bool) -> Tensor:
    attn = block.attn
    width = x_TW.shape[1]
    starts, before = [], 0
    for rows, length in shapes:
        starts.append(torch.arange(before, before + rows * length, length, device=at_N.device))
        before += rows * length
    index_N = torch.cat(starts) + at_N
    h_TW = block.ln_1(x_TW)
    biases = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split([width, 2 * width])
    weight_q, weight_kv = attn.in_proj_weight.split([width, 2 * width])
    q_NW = F.linear(h_TW.index_select(0, index_N), weight_q, biases[0])
    kv_T2W = F.linear(h_TW, weight_kv, biases[1])
    mixed, first = [], 0
    for part, (rows, length) in zip(kv_T2W.split(_tokens(shapes)), shapes, strict=True):
        k, v = part.view(rows, length, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q_NW[first : first + rows].view(rows, 1, attn.num_heads, -1).transpose(1, 2)
        mask = None
        if causal:
            seen = torch.arange(length, device=at_N.device) <= at_N[first : first + rows, None]
            mask = seen[:, None, None, :]
        mixed.append(_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows, -1))
        first += rows
    return _after_attention(block, x_TW.index_select(0, index_N), _joined(mixed))


def _tokens(shapes: Shapes) -> list[int]:
    return [rows * length for rows, length in shapes]


def _attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """On a CPU in float32 even where all else is bf16: torch's backward of it takes five times as long in bf16 there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)
    return F.scaled_dot_product_attention(q, k, v, **how)


def _joined(mixed: Sequence[Tensor]) -> Tensor:
    return mixed[0] if len(mixed) == 1 else torch.cat(tuple(mixed))


def _before_attention(block: Any, x_TW: Tensor) -> Tensor:
    """(T, 3W): queries, keys and values."""
    return F.linear(block.ln_1(x_TW), block.attn.in_proj_weight, block.attn.in_proj_bias)


def _after_attention(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return cast(Tensor, x + block.ls_2(block.mlp(block.ln_2(x))))
