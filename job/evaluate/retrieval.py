"""Held-out retrieval, both ways, with several captions per image and several images per caption.

Metric names are CLIP_benchmark's: image_retrieval_recall@k asks texts for images, text_retrieval_recall@k images for texts.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from job.data.batches import ImageSource, Samples, load_images
from job.data.captions import Captions
from job.model.build import ClipModel
from job.model.towers import encode_images, encode_texts
from job.runtime.world import ALONE, World

RANKS = (1, 5, 10)
CHUNK_ELEMENTS = 1 << 26
"""Similarities in memory at a time: 256 MB in float32, whatever the number of images."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out images and texts, each once, and which belong together."""

    keys: list[str]
    texts: list[str]
    pairs: Tensor
    """int64 (P, 2): image and text, sorted, each pair once."""


def group_pairs(captioned: Iterable[tuple[str, list[str]]]) -> HeldOut:
    """Groups rows by image and by identical caption. captioned: (image key, captions) of each row."""
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    pairs = {
        (images.setdefault(key, len(images)), texts.setdefault(text, len(texts)))
        for key, captions in captioned
        for text in captions
    }
    return HeldOut(list(images), list(texts), torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2))


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
    encoded = encode_held_out(
        clip,
        held_out.keys,
        held_out.texts,
        images=images,
        captions=captions,
        batch_size=batch_size,
        threads=threads,
        autocast=autocast,
        stopping=stopping,
        progress=progress,
        world=world,
    )
    if encoded is None:
        return None
    image_ID, decoded_I, text_TD = encoded.images, encoded.decoded, encoded.texts
    if not decoded_I.any():
        return {}
    place_I = torch.where(decoded_I, decoded_I.cumsum(0) - 1, -1)
    pairs = held_out.pairs.to(image_ID.device)
    pairs = torch.stack([place_I[pairs[:, 0]], pairs[:, 1]], dim=1)
    module: Any = clip.module
    scale = module.logit_scale.detach().exp()
    scores = retrieval_scores(image_ID[decoded_I], text_TD, pairs[pairs[:, 0] >= 0], logit_scale=scale, world=world)
    return {name: round(value, 6) for name, value in scores.items()}


@dataclass(frozen=True)
class Encoded:
    """Unit features of held-out images and texts, on the model's device."""

    images: Tensor
    """(I, D) float32; zeros where the image can't be decoded."""
    decoded: Tensor
    """(I,) bool."""
    texts: Tensor
    """(T, D) float32"""


def encode_held_out(
    clip: ClipModel,
    keys: list[str],
    texts: list[str],
    *,
    images: ImageSource,
    captions: Captions,
    batch_size: int,
    threads: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool],
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    world: World = ALONE,
) -> Encoded | None:
    """The features of all of these images and texts. All ranks must call it; each encodes its share. Args: see evaluate_retrieval.

    Returns: None if stopping() became true on the way.
    """
    device = clip.shift.device
    module: Any = clip.module
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    images_here, texts_here = world.part(len(keys)), world.part(len(texts))
    total = len(images_here) + len(texts_here)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            image_features: list[Tensor] = []
            found: list[int] = []
            impatient = stopping if world.size == 1 else lambda: False  # a rank must not leave the others in their transfers
            batches = load_images(
                _samples(images_here, batch_size),
                keys=keys,
                images=images,
                view=clip.view,
                threads=threads,
                finish=lambda _asked, loaded: loaded,
                stopping=impatient,
            )
            with contextlib.closing(batches):
                for at in range(0, world.largest_part(len(keys)), batch_size):
                    loaded = next(batches, None) if at < len(images_here) else None
                    if stopping():
                        return None
                    if loaded is not None:
                        if len(loaded.pixels):
                            pixels = loaded.pixels.to(device)
                            image_features.append(encode_images(module, pixels, shift=clip.shift, scale=clip.scale))
                        found.extend(images_here[at + int(place)] for place in loaded.good)
                        progress(at + len(loaded.good) + len(loaded.bad), total)
            text_features = []
            for at in range(0, world.largest_part(len(texts)), batch_size):
                if stopping():
                    return None
                here = texts_here[at : at + batch_size]
                if here:
                    chunk = captions.tokens(texts[here.start : here.stop])
                    features = encode_texts(module, [tokens.to(device) for tokens in chunk.groups])
                    text_features.append(features[chunk.text_of.to(device)])
                    progress(len(images_here) + at + len(here), total)
            if not (image_features and text_features):  # more ranks than images: an empty part must still have the right width
                nothing = encode_texts(module, [torch.ones(1, 1, dtype=torch.int64, device=device)])[:0]
                image_features, text_features = image_features or [nothing], text_features or [nothing]
        image_ID, decoded_I = _assembled(image_features, found, count=len(keys), world=world)
        text_TD, _ = _assembled(text_features, texts_here, count=len(texts), world=world)
        return Encoded(image_ID, decoded_I, text_TD)
    finally:
        for part, training in modes:  # each by itself: a locked tower is not in training
            part.training = training


def _samples(here: range, batch_size: int) -> Iterator[Samples]:
    places = np.array(here, dtype=np.int64)
    return (Samples(places[at : at + batch_size], places[at : at + batch_size]) for at in range(0, len(places), batch_size))


def _assembled(features: list[Tensor], places: Sequence[int], *, count: int, world: World) -> tuple[Tensor, Tensor]:
    """(count, D) the features of all ranks, each in its place, and (count,) whether there is one."""
    own = torch.cat(features)
    index = torch.tensor(list(places), dtype=torch.int64, device=own.device)
    whole = own.new_zeros(count, own.shape[1]).index_copy_(0, index, own)
    there = own.new_zeros(count).index_fill_(0, index, 1.0)
    return world.total(whole), world.total(there) > 0


def retrieval_scores(
    image_ID: Tensor, text_TD: Tensor, pairs_P2: Tensor, *, logit_scale: Tensor, world: World = ALONE
) -> dict[str, float]:
    """Recall both ways over all images and texts that belong to a pair. All ranks must call it; each ranks its share of queries.

    A rank counts the wrong candidates that score at least as high as the best right one, so equal scores never help: a model
    that gives the same feature to everything scores 0.

    Args:
        image_ID, text_TD: unit features.
        pairs_P2: int64 (image, text) that belong together; an image may have several texts and the reverse.
    """
    texts, text_P = pairs_P2[:, 1].unique(return_inverse=True)  # those left when images could not be decoded
    pairs_P2 = torch.stack([pairs_P2[:, 0], text_P], dim=1)
    text_TD = text_TD[texts]
    scores: dict[str, float] = {}
    ranks, probability = _ranks(image_ID, text_TD, pairs_P2, logit_scale=logit_scale, queries=world.part(len(image_ID)))
    scores |= _shares("text_retrieval_recall", ranks, count=len(image_ID), world=world)
    right = world.total(probability.double().nan_to_num(0.0).sum()) / len(image_ID)
    ranks, _ = _ranks(text_TD, image_ID, pairs_P2.flip(1), logit_scale=logit_scale, queries=world.part(len(text_TD)))
    scores |= _shares("image_retrieval_recall", ranks, count=len(text_TD), world=world)
    scores["mean_recall"] = sum(scores.values()) / len(scores)
    scores["right_caption_probability"] = right.item()
    return scores


def _shares(name: str, ranks: Tensor, *, count: int, world: World) -> dict[str, float]:
    """Recall at each of RANKS, from the ranks of this rank's queries. Args: count: of the queries of all."""
    hits = world.total(torch.stack([(ranks < k).sum() for k in RANKS]))
    return {f"{name}@{k}": hit / count for k, hit in zip(RANKS, hits.tolist(), strict=True)}


def _ranks(query_QD: Tensor, answer_AD: Tensor, pairs_P2: Tensor, *, logit_scale: Tensor, queries: range) -> tuple[Tensor, Tensor]:
    """Of these q queries, (q,) wrong answers at or above the best right one, and (q,) probability of all right answers together."""
    ranks, probabilities = [pairs_P2.new_zeros(0)], [query_QD.new_zeros(0)]
    rows = max(1, CHUNK_ELEMENTS // len(answer_AD))
    order = pairs_P2[pairs_P2[:, 0].argsort(stable=True)]
    for start in range(queries.start, queries.stop, rows):
        stop = min(start + rows, queries.stop)
        similarity_qA = query_QD[start:stop] @ answer_AD.T
        mine = order[(order[:, 0] >= start) & (order[:, 0] < stop)]
        right_qA = torch.zeros_like(similarity_qA, dtype=torch.bool)
        right_qA[mine[:, 0] - start, mine[:, 1]] = True
        best_q1 = similarity_qA.masked_fill(~right_qA, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity_qA < best_q1) & ~right_qA).sum(dim=1))  # so written, what is not a number is no hit
        probabilities.append(((logit_scale * similarity_qA).softmax(dim=1) * right_qA).sum(dim=1))
    return torch.cat(ranks), torch.cat(probabilities)
