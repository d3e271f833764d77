"""Held-out retrieval, both ways, with several captions per image and several images per caption.

Metric names are CLIP_benchmark's: image_retrieval_recall@k asks texts for images, text_retrieval_recall@k images for texts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from job.data.batches import ImageSource
from job.data.captions import Captions
from job.evaluate.encode import HeldOut, encode_held_out
from job.model.build import ClipModel
from job.runtime.world import ALONE, World

RANKS = (1, 5, 10)
CHUNK_ELEMENTS = 1 << 26
"""Similarities in memory at a time: 256 MB in float32, whatever the number of images."""


def evaluate_retrieval(
    clip: ClipModel,
    held_out: HeldOut,
    *,
    images: ImageSource,
    captions: Captions,
    batch_size: int,
    threads: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool],
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    world: World = ALONE,
) -> dict[str, float] | None:
    """Recall@1/5/10 both ways and the probability of the right captions. All ranks must call it; each encodes its share.

    Images that can't be decoded are left out, with the texts that then belong to none.

    Args: batch_size: of one rank. stopping: the same answer on every rank, when all ask.
    Returns: metrics; None if stopping() became true on the way. NaN never: without any pair the metrics are empty.
    """
    features = encode_held_out(
        clip,
        held_out,
        images=images,
        captions=captions,
        batch_size=batch_size,
        threads=threads,
        autocast=autocast,
        stopping=stopping,
        progress=progress,
        world=world,
    )
    if features is None:
        return None
    if not len(features.images):
        return {}
    module: Any = clip.module
    with torch.no_grad():
        scale = module.logit_scale.exp()
        scores = retrieval_scores(features.images, features.texts, features.placed(held_out.pairs), logit_scale=scale, world=world)
    return {name: round(value, 6) for name, value in scores.items()}


def retrieval_scores(
    image_ID: Tensor,
    text_TD: Tensor,
    pairs_P2: Tensor,
    *,
    logit_scale: Tensor,
    median_ranks: bool = False,
    world: World = ALONE,
) -> dict[str, float]:
    """Recall both ways over all images and texts that belong to a pair. All ranks must call it; each ranks its share of queries.

    A rank counts the wrong candidates that score at least as high as the best right one, so equal scores never help: a model
    that gives the same feature to everything scores 0.

    Args:
        image_ID, text_TD: unit features.
        pairs_P2: int64 (image, text) that belong together; an image may have several texts and the reverse.
        median_ranks: also the median rank both ways, of which 1 is the best.
    """
    text_TD, pairs_P2 = texts_in_pairs(text_TD, pairs_P2)
    scores: dict[str, float] = {}
    medians: dict[str, float] = {}
    text_ranks, probability = _ranks(image_ID, text_TD, pairs_P2, logit_scale=logit_scale, world=world)
    right = world.total(probability.double().nan_to_num(0.0).sum()) / len(image_ID)
    image_ranks, _ = _ranks(text_TD, image_ID, pairs_P2.flip(1), logit_scale=logit_scale, world=world)
    for name, ranks in (("text_retrieval", text_ranks), ("image_retrieval", image_ranks)):
        scores |= {f"{name}_recall@{k}": int((ranks < k).sum()) / len(ranks) for k in RANKS}
        medians[f"{name}_median_rank"] = float(np.median(ranks.cpu().numpy())) + 1
    scores["mean_recall"] = sum(scores.values()) / len(scores)
    scores["right_caption_probability"] = right.item()
    return scores | medians if median_ranks else scores


def recall_at_5(scores: dict[str, float]) -> float:
    """The mean of both ways."""
    return (scores["image_retrieval_recall@5"] + scores["text_retrieval_recall@5"]) / 2


def texts_in_pairs(text_TD: Tensor, pairs_P2: Tensor) -> tuple[Tensor, Tensor]:
    """The texts that belong to an image, and the pairs with their new numbers: some images may not have been decodable."""
    texts, text_P = pairs_P2[:, 1].unique(return_inverse=True)
    texts_TD = text_TD if len(texts) == len(text_TD) else text_TD[texts]  # a copy of a million would be 2 GB
    return texts_TD, torch.stack([pairs_P2[:, 0], text_P], dim=1)


def similarities(
    query_QD: Tensor, answer_AD: Tensor, pairs_P2: Tensor, *, queries: range | None = None, at_once: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of so many queries at a time as fit: (q, A) similarities, and (q, A) bool, which answers are right.

    Args: pairs_P2: int64 (query, right answer). queries: which ones; None: all. at_once: similarities; 0: CHUNK_ELEMENTS.
    """
    queries = range(len(query_QD)) if queries is None else queries
    rows = max(1, (at_once or CHUNK_ELEMENTS) // len(answer_AD))
    starts = [*queries[::rows], queries.stop]
    order = pairs_P2[pairs_P2[:, 0].argsort(stable=True)]
    bounds = torch.searchsorted(order[:, 0].contiguous(), torch.tensor(starts, device=order.device)).tolist()
    for at, start in enumerate(starts[:-1]):
        similarity_qA = query_QD[start : starts[at + 1]] @ answer_AD.T
        mine = order[bounds[at] : bounds[at + 1]]
        right_qA = torch.zeros_like(similarity_qA, dtype=torch.bool)
        right_qA[mine[:, 0] - start, mine[:, 1]] = True
        yield similarity_qA, right_qA


def best_right(similarity_qA: Tensor, right_qA: Tensor) -> tuple[Tensor, Tensor]:
    """(q, 1) similarity of the best right answer, and (q,) wrong answers that reach it."""
    best_q1 = similarity_qA.masked_fill(~right_qA, -torch.inf).amax(dim=1, keepdim=True)
    return best_q1, (~(similarity_qA < best_q1) & ~right_qA).sum(dim=1)  # so written, what is not a number is no hit


def _ranks(query_QD: Tensor, answer_AD: Tensor, pairs_P2: Tensor, *, logit_scale: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """(Q,) wrong answers at or above the best right one, for the queries of all ranks, and (q,) probability of all right answers
    together, for this rank's."""
    queries = world.part(len(query_QD))
    ranks, probabilities = [pairs_P2.new_zeros(0)], [query_QD.new_zeros(0)]
    for similarity_qA, right_qA in similarities(query_QD, answer_AD, pairs_P2, queries=queries):
        ranks.append(best_right(similarity_qA, right_qA)[1])
        probabilities.append(((logit_scale * similarity_qA).softmax(dim=1) * right_qA).sum(dim=1))
    whole = pairs_P2.new_zeros(len(query_QD))
    whole[queries.start : queries.stop] = torch.cat(ranks)
    return world.total(whole), torch.cat(probabilities)
