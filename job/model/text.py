"""Tokens -> unit features of text, computed on real tokens only; open_clip's `encode_text` to rounding.

A causal tower that pools at the end of text needs no position behind it, so rows are cut there and put into groups of similar
length; see job/model/blocks.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from job.model.blocks import are_plain, pooled_output


def encode_texts(model: Any, groups: Sequence[Tensor]) -> Tensor:
    """Unit features of texts given as groups of (u, L) tokens, in the order of the groups.

    Returns: (U, D), U the sum of all u; float32 or better.
    """
    tower = _cuttable_tower(model)
    if tower is None:
        return unit(torch.cat([model.encode_text(tokens) for tokens in groups]))
    if plain_text_tower(model) is not None:
        return unit(_encode_packed(tower, groups))
    return unit(torch.cat([_encode_cut(tower, tokens) for tokens in groups]))


def plain_text_tower(model: Any) -> Any:
    """The module that holds the text tower's parts, if texts of all lengths go through it in one pass; else None."""
    tower = _cuttable_tower(model)
    return tower if tower is not None and are_plain(tower.transformer.resblocks) else None


def unit(features: Tensor) -> Tensor:
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


def _encode_packed(tower: Any, groups: Sequence[Tensor]) -> Tensor:
    """open_clip's text forward on all groups in one pass. T: tokens of all groups; W: the tower's width."""
    shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in groups]
    dtype = tower.transformer.get_cast_dtype()
    positions = tower.positional_embedding.to(dtype)
    width = positions.shape[1]
    x_TW = tower.token_embedding(torch.cat([tokens.flatten() for tokens in groups])).to(dtype)
    x_TW = x_TW + torch.cat([positions[:length].expand(rows, length, width).reshape(-1, width) for rows, length in shapes])
    pool_type, eos_id = _pooling(tower)
    at = [tokens.argmax(dim=-1) if pool_type == "argmax" else (tokens == eos_id).int().argmax(dim=-1) for tokens in groups]
    pooled_NW = pooled_output(tower.transformer, x_TW, shapes, at_N=torch.cat(at), causal=True)
    return cast(Tensor, _project(tower, tower.ln_final(pooled_NW)))


def _encode_cut(tower: Any, tokens_UL: Tensor) -> Any:
    """open_clip's text forward on the first L positions of one group. Exact, because no position sees a later one."""
    length = tokens_UL.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens_UL).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    pool_type, eos_id = _pooling(tower)
    return _project(tower, text_global_pool(tower.ln_final(x), tokens_UL, pool_type, eos_token_id=eos_id))


def _project(tower: Any, pooled_UW: Tensor) -> Any:
    projection = tower.text_projection
    if projection is None:
        return pooled_UW
    return projection(pooled_UW) if isinstance(projection, nn.Linear) else pooled_UW @ projection
