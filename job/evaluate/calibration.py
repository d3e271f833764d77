"""Whether the probabilities of image -> text matching can be believed, and the logit_scale at which they can.

An image's probabilities are the softmax of logit_scale times its similarities over all texts of the set.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from job.evaluate.retrieval import best_right, similarities

BINS = 15
SCALES = (1.0, 1000.0)
"""Bounds of the search. A temperature is 1 / logit_scale."""
TRIES, ROUNDS = 17, 4
"""Scales tried at once, and how often the search closes in: to within 0.03 %."""
MOST_SEARCHED = 20_000
"""Images that a scale is looked for with, evenly among all; each is asked of all texts. One number needs no more."""


@dataclass(frozen=True)
class Bin:
    """Images whose most probable text has a probability in ((number - 1)/15, number/15]."""

    confidence: float
    """Mean probability of that text; 0 for an empty bin."""
    accuracy: float
    """Share of images for which it is right."""
    count: int


@dataclass(frozen=True)
class Calibration:
    logit_scale: float
    ece: float
    """Expected calibration error: mean over images of |confidence - accuracy| of their bin."""
    nll: float
    """Mean of -log of the probability of all right texts together."""
    bins: list[Bin]

    def warning(self) -> str:
        """What is wrong with a scale that was looked for; empty if nothing is."""
        low, high = self.logit_scale <= SCALES[0] * 1.001, self.logit_scale >= SCALES[1] * 0.999
        if not (low or high):
            return ""
        return (
            f"The best logit_scale lies at an end of the range searched, {SCALES[0]:g} to {SCALES[1]:g}: the validation pairs are "
            f"too few, or too {'hard' if low else 'easy'} for the model, to calibrate by."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibration_at(image_ID: Tensor, text_TD: Tensor, pairs_P2: Tensor, *, logit_scale: float) -> Calibration:
    """Args: image_ID, text_TD: unit features. pairs_P2: int64 (image, text); each image is in one at least. Source: Guo et al.,
    arXiv:1706.04599."""
    confidence, correct = [], []
    for similarity_qT, right_qT in similarities(image_ID, text_TD, pairs_P2):
        confidence.append((logit_scale * similarity_qT).softmax(dim=1).amax(dim=1).double())
        correct.append((best_right(similarity_qT, right_qT)[1] == 0).double())
    bins, ece = reliability(torch.cat(confidence).cpu(), torch.cat(correct).cpu())
    return Calibration(logit_scale, ece, _nll(image_ID, text_TD, pairs_P2, [logit_scale])[0], bins)


def reliability(confidence_I: Tensor, correct_I: Tensor) -> tuple[list[Bin], float]:
    """Bins of equal width, and the expected calibration error. Args: float64, on the CPU; correct: 1 or 0."""
    bin_I = (confidence_I * BINS).ceil().clamp(1, BINS).long() - 1
    count = bin_I.bincount(minlength=BINS)
    sums = [bin_I.bincount(weights=values, minlength=BINS) for values in (confidence_I, correct_I)]
    means = [(total / count.clamp(min=1)).tolist() for total in sums]
    ece = (sums[0] - sums[1]).abs().sum().item() / len(confidence_I)
    return [Bin(*values) for values in zip(*means, count.tolist(), strict=True)], ece


def best_scale(image_ID: Tensor, text_TD: Tensor, pairs_P2: Tensor) -> float:
    """The logit_scale within SCALES at which the right texts are most probable (least NLL): many are tried at once, then again
    around the best one. Of more than MOST_SEARCHED images every second, third … one is asked."""
    stride = -(-len(image_ID) // MOST_SEARCHED)
    image_ID, pairs_P2 = image_ID[::stride], pairs_P2[pairs_P2[:, 0] % stride == 0]
    pairs_P2 = torch.stack([pairs_P2[:, 0] // stride, pairs_P2[:, 1]], dim=1)
    low, high = (math.log(scale) for scale in SCALES)
    for _ in range(ROUNDS):
        tried = torch.linspace(low, high, TRIES, dtype=torch.float64).tolist()
        nll = _nll(image_ID, text_TD, pairs_P2, [math.exp(value) for value in tried])
        at = nll.index(min(nll))
        low, high = tried[max(at - 1, 0)], tried[min(at + 1, TRIES - 1)]
    return math.exp(tried[at])


def _nll(image_ID: Tensor, text_TD: Tensor, pairs_P2: Tensor, scales: list[float]) -> list[float]:
    total = torch.zeros(len(scales), dtype=torch.float64)
    for similarity_qT, right_qT in similarities(image_ID, text_TD, pairs_P2):
        wrong_out_qT = similarity_qT.masked_fill(~right_qT, -torch.inf)
        for at, scale in enumerate(scales):
            nll_q = (scale * similarity_qT).logsumexp(dim=1) - (scale * wrong_out_qT).logsumexp(dim=1)
            total[at] += nll_q.double().sum().item()
    return (total / len(image_ID)).tolist()
