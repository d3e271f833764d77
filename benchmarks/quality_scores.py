"""A model's answers to held-out queries, one by one, and differences between models with what chance leaves of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from job.commands.evaluate import encoded, machine
from job.evaluate.calibration import BINS, calibration_at
from job.evaluate.pairs import Pairs
from job.evaluate.retrieval import best_right, retrieval_scores, similarities, texts_in_pairs
from job.model.build import load_base

RESAMPLES = 2000
METRICS = ("recall@1", "recall@5", "guard recall@5", "forgotten", "ECE")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """A model's answers to each of I images and T texts."""

    text_ranks: NDArray[np.int64]
    """(I,) wrong texts at or above the image's best right one."""
    image_ranks: NDArray[np.int64]
    """(T,) the other way."""
    gaps: Floats
    """(I,) probability of the image's first text, less 1 if that is right."""
    bins: Floats
    """(I, BINS): 1 at the bin of that probability."""
    shares: Floats
    """(I, T): 1 over the images of a text, at each of them. So a text counts as often as its images do on average."""
    mean_recall: float

    def recall(self, counts_RI: Floats, *, k: int) -> Floats:
        """(R,) recall@k, mean of both ways, with images counted so often."""
        counts_RT = counts_RI @ self.shares
        of_images = counts_RI @ (self.text_ranks < k) / counts_RI.sum(axis=1)
        return (of_images + counts_RT @ (self.image_ranks < k) / counts_RT.sum(axis=1)) / 2

    def ece(self, counts_RI: Floats) -> Floats:
        """(R,) calibration errors."""
        return np.abs((counts_RI * self.gaps) @ self.bins).sum(axis=1) / counts_RI.sum(axis=1)


@torch.no_grad()
def answers(weights: Path, base: Path, pairs: Pairs) -> Answers:
    """By the functions of `clipjob evaluate`, which give the same scores."""
    clip, encode = machine(load_base(base, weights=weights), settings={}, device="cpu", precision="fp32", threads=0, batch_size=256)
    features, held_out = encoded(clip, pairs, encode)
    texts, placed = texts_in_pairs(features.texts, features.placed(held_out.pairs))
    scale: Any = clip.module.logit_scale
    scale = scale.exp()
    [(similarity_IT, right_IT)] = similarities(features.images, texts, placed)
    [(similarity_TI, right_TI)] = similarities(texts, features.images, placed.flip(1))
    confidence_I = (scale * similarity_IT).softmax(dim=1).amax(dim=1).double()
    rank_I, rank_T = best_right(similarity_IT, right_IT)[1], best_right(similarity_TI, right_TI)[1]
    bin_I = (confidence_I * BINS).ceil().clamp(1, BINS).long() - 1
    right = right_IT.double()
    scores = retrieval_scores(features.images, texts, placed, logit_scale=scale)
    found = Answers(
        text_ranks=rank_I.numpy(),
        image_ranks=rank_T.numpy(),
        gaps=(confidence_I - (rank_I == 0).double()).numpy(),
        bins=torch.eye(BINS, dtype=torch.float64)[bin_I].numpy(),
        shares=(right / right.sum(dim=0)).numpy(),
        mean_recall=scores["mean_recall"],
    )
    once = np.ones((1, len(rank_I)))
    of_evaluate = [sum(scores[f"{asked}_retrieval_recall@{k}"] for asked in ("image", "text")) / 2 for k in (1, 5)]
    of_evaluate.append(calibration_at(features.images, texts, placed, logit_scale=float(scale)).ece)
    assert np.allclose([*(found.recall(once, k=k)[0] for k in (1, 5)), found.ece(once)[0]], of_evaluate)
    return found


@dataclass(frozen=True)
class Draws:
    """How often each query and each seed counts, in reality (row 0) and in RESAMPLES draws with replacement; the same for all
    entrants. All are (1 + RESAMPLES, n)."""

    held_out: list[Floats]
    """Of each seed, for each has held out other queries."""
    guard: Floats
    seeds: Floats


def draw(*, held_out: int, guard: int, seeds: int) -> Draws:
    """Args: how many there are."""
    generator = np.random.default_rng(0)

    def counts(n: int) -> Floats:
        return np.vstack([np.ones((1, n)), generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)])

    return Draws([counts(held_out) for _ in range(seeds)], counts(guard), counts(seeds))


def measure(found: Sequence[dict[str, Answers]], base: Sequence[dict[str, Answers]], draws: Draws) -> dict[str, Floats]:
    """(S, 1 + RESAMPLES) of each of METRICS. Args: found, base: of each seed, answers on "held-out" and "guard"."""
    guard = np.stack([one["guard"].recall(draws.guard, k=5) for one in found])
    held_out = [(one["held-out"], counts) for one, counts in zip(found, draws.held_out, strict=True)]
    return {
        "recall@1": np.stack([answered.recall(counts, k=1) for answered, counts in held_out]),
        "recall@5": np.stack([answered.recall(counts, k=5) for answered, counts in held_out]),
        "guard recall@5": guard,
        "forgotten": np.stack([one["guard"].recall(draws.guard, k=5) for one in base]) - guard,
        "ECE": np.stack([answered.ece(counts) for answered, counts in held_out]),
    }


@dataclass(frozen=True)
class Difference:
    """With its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(ours_SR: Floats, theirs_SR: Floats, draws: Draws, *, share: float = 1.0) -> Difference:
    """Ours less so much of theirs, mean over seeds."""
    values = ((ours_SR - share * theirs_SR) * draws.seeds.T).mean(axis=0)
    return Difference(float(values[0]), *(float(end) for end in np.percentile(values[1:], (2.5, 97.5))))
