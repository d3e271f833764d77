"""Contrastive losses over the global batch with their gradients, and what a person wants to know of a batch.

Every rank works on its own rows only, in chunks, so memory grows with its share of the batch and never with the square of the
whole:

1. Features of all ranks are gathered, once.
2. Own images against all texts and own texts against all images: similarities, and what each row needs for its softmax.
3. Those numbers, two per pair, are gathered as well.
4. The similarities are computed once more; with the numbers of both sides each rank has the whole gradient of its own features.

The towers then go backwards from that gradient, so gathering needs no gradient of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from job.runtime.world import ALONE, World

CHUNK_ELEMENTS = 1 << 24
"""Similarities in memory at a time: 64 MB in float32."""


@dataclass(frozen=True)
class LossGradients:
    """The loss of a global batch, and its gradient with respect to what this rank has computed."""

    image: Tensor
    text: Tensor
    """(b, D) both."""
    logit_scale: Tensor
    """This rank's part, a scalar; the parts of all ranks add up. So do those of logit_bias."""
    logit_bias: Tensor
    figures: Tensor
    """(4,) this rank's parts of: the loss, the accuracies image to text and text to image, the probability of the right
    caption, each a mean over the global batch."""
    pairs: Tensor
    """Valid pairs of the global batch, a scalar."""


def contrastive_loss(
    image_bD: Tensor,
    text_bD: Tensor,
    *,
    valid_b: Tensor,
    text_id_b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    loss: str = "clip",
    soft_targets: float = 0.0,
    tags_bK: Tensor | None = None,
    world: World = ALONE,
) -> LossGradients:
    """The loss over the pairs of all ranks, and its gradient. All ranks must call it, with equally many rows.

    clip: the mean of the two cross-entropies over the similarities (CLIP, arXiv:2103.00020, Fig. 3). siglip: the sum over all
    similarities of the logistic loss of right or wrong, over the number of pairs (SigLIP, arXiv:2303.15343, Algorithm 1). Neither
    is additive over micro-batches: every pair's negatives are the whole global batch. Equal captions need no special care in
    clip: they have equal features, so the gradient is that of uniform targets over them.

    Args:
        image_bD, text_bD: unit length, row i of each is one pair.
        valid_b: bool; rows that are not valid are as if they were not there. Fewer than two valid pairs in all: nothing to learn
            from, and the loss and its gradients are not a number.
        text_id_b: int64, equal for equal captions; right answers are counted by them.
        logit_scale: scalar > 0, not its logarithm. logit_bias: added to every similarity.
        soft_targets: of clip, the share of each pair's target that goes to all pairs by the tags they share, see Overlap.
        tags_bK: int64, the tags of each pair, 0 where there are fewer; with soft_targets.
    """
    rows, own = len(image_bD), world.rank * len(image_bD)
    image_ND, text_ND = world.gather(torch.cat([image_bD, text_bD], dim=1)).chunk(2, dim=1)
    valid_N, text_id_N = world.gather(torch.stack([valid_b.long(), text_id_b], dim=1)).unbind(dim=1)
    valid_N = valid_N.bool()
    pairs = valid_N.sum()
    share = valid_b.to(image_bD.dtype) / torch.where(pairs > 1, pairs, torch.nan)  # of each own row in a mean over the batch
    step = max(1, CHUNK_ELEMENTS // len(image_ND))
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def similarities(own_bD: Tensor, other_ND: Tensor, chunk: slice) -> Tensor:
        logits = logit_scale * own_bD[chunk] @ other_ND.T
        return (logits if logit_bias is None else logits + logit_bias).masked_fill_(~valid_N, -torch.inf)

    def diagonal(logits: Tensor, chunk: slice) -> Tensor:
        return logits.diagonal(own + chunk.start)

    overlap = (
        Overlap(tags_bK, valid_N, chunks, weight=soft_targets, dtype=image_bD.dtype, world=world)
        if soft_targets and tags_bK is not None
        else None
    )
    figures = image_bD.new_zeros(4)
    normaliser_b2 = image_bD.new_empty(rows, 2)
    for chunk in chunks:
        weight, right = share[chunk], text_id_b[chunk, None] == text_id_N
        for side, (mine, others) in enumerate(((image_bD, text_ND), (text_bD, image_ND))):
            logits = similarities(mine, others, chunk)
            normaliser_b2[chunk, side] = logits.logsumexp(dim=1)
            hit = right.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
            figures[1 + side] += (weight * hit).sum()
            matched = diagonal(logits, chunk).masked_fill(~valid_b[chunk], 0.0)
            if overlap:
                matched = (1 - soft_targets) * matched + overlap.of_rows(chunk).mul_(logits.masked_fill(~valid_N, 0.0)).sum(dim=1)
            if loss == "clip":
                figures[0] += (weight * (normaliser_b2[chunk, side] - matched)).sum() / 2
            elif side == 0:
                figures[0] += (weight * (F.softplus(logits).sum(dim=1) - matched)).sum()
            if side == 0:
                probability = ((logits - normaliser_b2[chunk, :1]).exp_() * right).sum(dim=1)
                figures[3] += (weight * probability).sum()

    gradients = torch.empty_like(image_bD), torch.empty_like(text_bD)
    bias_gradient = image_bD.new_zeros(())
    normaliser_N2 = world.gather(normaliser_b2) if loss == "clip" else normaliser_b2
    for chunk in chunks:
        for side, (mine, others) in enumerate(((image_bD, text_ND), (text_bD, image_ND))):
            logits = similarities(mine, others, chunk)
            if loss == "clip":
                of_rows = (logits - normaliser_b2[chunk, side, None]).exp()
                of_columns = logits.sub_(normaliser_N2[:, 1 - side]).exp_()
                slope = of_rows.add_(of_columns).div_(2)
            else:
                slope = logits.sigmoid_()
            diagonal(slope, chunk).sub_(1 - soft_targets)
            if overlap:
                slope.sub_(overlap.mean_of_both(chunk))
            slope.mul_(share[chunk, None])
            gradients[side][chunk] = logit_scale * (slope @ others)
            if side == 0 and loss == "siglip":  # a softmax does not feel it
                bias_gradient += slope.sum()
    scale_gradient = (image_bD * gradients[0]).sum() / logit_scale
    return LossGradients(*gradients, scale_gradient, bias_gradient, figures, pairs)


def losses_at(
    image_bD: Tensor, text_bD: Tensor, *, valid_b: Tensor, logit_scales: Sequence[float], world: World = ALONE
) -> list[float]:
    """The clip loss at each of these scales, from the similarities of one pass. Arguments as those of contrastive_loss."""
    rows, own = len(image_bD), world.rank * len(image_bD)
    image_ND, text_ND = world.gather(torch.cat([image_bD, text_bD], dim=1)).chunk(2, dim=1)
    valid_N = world.gather(valid_b.long()[:, None])[:, 0].bool()
    pairs = valid_N.sum()
    step = max(1, CHUNK_ELEMENTS // len(image_ND))
    sums = image_bD.new_zeros(len(logit_scales))
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        for mine, others in ((image_bD, text_ND), (text_bD, image_ND)):
            similarities = mine[chunk] @ others.T
            matched = similarities.diagonal(own + start)
            for at, scale in enumerate(logit_scales):
                normaliser = (scale * similarities).masked_fill_(~valid_N, -torch.inf).logsumexp(dim=1)
                sums[at] += (normaliser - scale * matched).masked_fill(~valid_b[chunk], 0.0).sum() / 2
    losses: list[float] = (world.total(sums) / torch.where(pairs > 1, pairs, torch.nan)).tolist()
    return losses


class Overlap:
    """Soft targets: weight times the Jaccard index of two pairs' tags, over the sum of a pair's indices with all pairs.

    On a GPU the host waits for the distinct tags of each chunk. All ranks must make one.

    Args: tags_bK: of this rank's pairs. chunks: of its rows.
    """

    def __init__(
        self, tags_bK: Tensor, valid_N: Tensor, chunks: Sequence[slice], *, weight: float, dtype: torch.dtype, world: World
    ) -> None:
        self._tags_NK = world.gather(tags_bK)
        self._count_N = (self._tags_NK != 0).sum(dim=1).to(dtype)
        self._valid_N, self._weight = valid_N, weight
        self._own = world.rank * len(tags_bK)
        own_sums = torch.cat([self._indices(chunk).sum(dim=1) for chunk in chunks])
        self._sum_N = world.gather(own_sums).clamp_(min=1e-9)  # 0: of a pair that is not valid

    def _indices(self, chunk: slice) -> Tensor:
        """(rows, N) Jaccard indices of own pairs with all; a pair without tags shares them with itself. U: tags of these rows."""
        rows = slice(self._own + chunk.start, self._own + chunk.stop)
        tags_U = self._tags_NK[rows].unique()
        at_NK = torch.searchsorted(tags_U, self._tags_NK).clamp_(max=len(tags_U) - 1)
        hit_NK = (tags_U[at_NK] == self._tags_NK) & (self._tags_NK != 0)
        has_NU = self._count_N.new_zeros(len(at_NK), len(tags_U)).scatter_add_(1, at_NK, hit_NK.to(self._count_N.dtype))
        shared = has_NU[rows] @ has_NU.T
        indices = shared / (self._count_N[rows, None] + self._count_N - shared).clamp_(min=1.0)
        indices.diagonal(rows.start).masked_fill_(self._count_N[rows] == 0, 1.0)
        return indices.masked_fill_(~self._valid_N, 0.0)

    def of_rows(self, chunk: slice) -> Tensor:
        """(rows, N) targets of own pairs."""
        rows = slice(self._own + chunk.start, self._own + chunk.stop)
        return self._indices(chunk).mul_(self._weight / self._sum_N[rows, None])

    def mean_of_both(self, chunk: slice) -> Tensor:
        """(rows, N) mean of the targets of own pairs and, of all pairs, of what these give to own ones."""
        rows = slice(self._own + chunk.start, self._own + chunk.stop)
        return self._indices(chunk).mul_(self._weight / 2).mul_(1 / self._sum_N[rows, None] + 1 / self._sum_N)
