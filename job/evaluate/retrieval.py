"""Held-out retrieval, both ways, with several captions per image and several images per caption.

Metric names are CLIP_benchmark's: image_retrieval_recall@k asks texts for images, text_retrieval_recall@k images for texts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from job.data.batches import ImageSource, Loaded, Samples, load_images
from job.data.captions import Captions
from job.model.build import ClipModel
from job.model.towers import encode_images, encode_texts

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
) -> dict[str, float] | None:
    """Recall@1/5/10 both ways and the probability of the right captions.

    Images that can't be decoded are left out, with the texts that then belong to none.

    Returns: metrics; None if stopping() became true on the way. NaN never: without any pair the metrics are empty.
    """
    device = clip.shift.device
    module: Any = clip.module
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    total = len(held_out.keys) + len(held_out.texts)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            image_features = []
            kept: list[int] = []
            batches = _image_batches(
                held_out, images=images, view=clip.view, batch_size=batch_size, threads=threads, stopping=stopping
            )
            for start, loaded in batches:
                if len(loaded.pixels):
                    pixels = loaded.pixels.to(device)
                    image_features.append(encode_images(module, pixels, shift=clip.shift, scale=clip.scale))
                kept.extend(start + int(at) for at in loaded.good)
                progress(start + len(loaded.good) + len(loaded.bad), total)
            if stopping():
                return None
            text_features = []
            for start in range(0, len(held_out.texts), batch_size):
                if stopping():
                    return None
                chunk = captions.tokens(held_out.texts[start : start + batch_size])
                features = encode_texts(module, [tokens.to(device) for tokens in chunk.groups])
                text_features.append(features[chunk.text_of.to(device)])
                progress(len(held_out.keys) + start + len(chunk.text_of), total)
        if not image_features:
            return {}
        place = torch.full((len(held_out.keys),), -1, dtype=torch.int64)
        place[torch.tensor(kept)] = torch.arange(len(kept))
        pairs = torch.stack([place[held_out.pairs[:, 0]], held_out.pairs[:, 1]], dim=1)
        scores = retrieval_scores(
            torch.cat(image_features),
            torch.cat(text_features),
            pairs[pairs[:, 0] >= 0].to(device),
            logit_scale=module.logit_scale.exp(),
        )
        return {name: round(value, 6) for name, value in scores.items()}
    finally:
        for part, training in modes:  # each by itself: a locked tower is not in training
            part.training = training


def _image_batches(
    held_out: HeldOut, *, images: ImageSource, view: Any, batch_size: int, threads: int, stopping: Callable[[], bool]
) -> Any:
    places = np.arange(len(held_out.keys), dtype=np.int64)
    samples = (Samples(places[at : at + batch_size], places[at : at + batch_size]) for at in range(0, len(places), batch_size))

    def finish(asked: Samples, loaded: Loaded) -> tuple[int, Loaded]:
        return int(asked.rows[0]), loaded

    return load_images(samples, keys=held_out.keys, images=images, view=view, threads=threads, finish=finish, stopping=stopping)


def retrieval_scores(image_ID: Tensor, text_TD: Tensor, pairs_P2: Tensor, *, logit_scale: Tensor) -> dict[str, float]:
    """Recall both ways over all images and texts that belong to a pair.

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
    ranks, probability = _ranks(image_ID, text_TD, pairs_P2, logit_scale=logit_scale)
    scores |= {f"text_retrieval_recall@{k}": (ranks < k).double().mean().item() for k in RANKS}
    ranks, _ = _ranks(text_TD, image_ID, pairs_P2.flip(1), logit_scale=logit_scale)
    scores |= {f"image_retrieval_recall@{k}": (ranks < k).double().mean().item() for k in RANKS}
    scores["mean_recall"] = sum(scores.values()) / len(scores)
    scores["right_caption_probability"] = probability.double().nan_to_num(0.0).mean().item()
    return scores


def _ranks(query_QD: Tensor, answer_AD: Tensor, pairs_P2: Tensor, *, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) wrong answers at or above the best right one, and (Q,) probability of all right answers together."""
    ranks, probabilities = [], []
    rows = max(1, CHUNK_ELEMENTS // len(answer_AD))
    order = pairs_P2[pairs_P2[:, 0].argsort(stable=True)]
    for start in range(0, len(query_QD), rows):
        similarity_qA = query_QD[start : start + rows] @ answer_AD.T
        mine = order[(order[:, 0] >= start) & (order[:, 0] < start + rows)]
        right_qA = torch.zeros_like(similarity_qA, dtype=torch.bool)
        right_qA[mine[:, 0] - start, mine[:, 1]] = True
        best_q1 = similarity_qA.masked_fill(~right_qA, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity_qA < best_q1) & ~right_qA).sum(dim=1))  # so written, what is not a number is no hit
        probabilities.append(((logit_scale * similarity_qA).softmax(dim=1) * right_qA).sum(dim=1))
    return torch.cat(ranks), torch.cat(probabilities)
