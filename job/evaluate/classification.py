"""Zero-shot classification: names of classes become texts, and an image belongs to the classes whose texts are nearest.

Metric names are CLIP_benchmark's. With one class per image they mean the same; with several, see `classification_scores`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.captions import Captions
from job.errors import DataError
from job.evaluate import retrieval
from job.evaluate.encode import encode_at_once, evaluating
from job.evaluate.retrieval import best_right, similarities
from job.model.build import ClipModel

TOP = (1, 5)
PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class Labels:
    names: list[str]
    """Of the classes."""
    pairs: Tensor
    """int64 (L, 2): image, counted among the keys, and class; sorted, each once."""


def labels_of(tagged: Iterable[tuple[str, list[str]]], *, keys: Sequence[str], names: Sequence[str] | None) -> Labels:
    """Which image belongs to which classes.

    Args:
        tagged: (image key, tags) of each row. keys: all images.
        names: of the classes; tags that are none of them are left out. None: each distinct tag is a class.
    Raises: DataError, when no tag is the name of a class.
    """
    number = {key: at for at, key in enumerate(keys)}
    classes = {name: at for at, name in enumerate(dict.fromkeys(names or ()))}
    pairs = set()
    for key, tags in tagged:
        for tag in tags:
            if names is None:
                classes.setdefault(tag, len(classes))
            if tag in classes:
                pairs.add((number[key], classes[tag]))
    if not pairs:
        raise DataError(
            "No image has a tag that is the name of a class. Check --classes (spelling and case must be those of the CSV) and "
            "--tag-separator."
        )
    return Labels(list(classes), torch.tensor(sorted(pairs), dtype=torch.int64))


def class_features(
    clip: ClipModel, names: Sequence[str], *, templates: Sequence[str], captions: Captions, autocast: torch.dtype | None
) -> Tensor:
    """(C, D) unit features: of each class the mean over templates of its prompts' features."""
    at_once = max(1, PROMPTS_AT_ONCE // len(templates))
    features = []
    with evaluating(clip, autocast=autocast):
        for at in range(0, len(names), at_once):
            here = names[at : at + at_once]
            prompts = [template.replace("{}", name) for name in here for template in templates]
            of_prompts = encode_at_once(clip, prompts, captions=captions)
            features.append(F.normalize(of_prompts.view(len(here), len(templates), -1).mean(dim=1), dim=-1))
    return torch.cat(features)


def classification_scores(image_ID: Tensor, class_CD: Tensor, labels_L2: Tensor) -> dict[str, float]:
    """How well the classes of images are found. Equal scores never help, as in retrieval.

    acc1, acc5: share of images with a right class among the 1, 5 nearest (acc5 only with 5 classes or more).
    mean_per_class_recall: an image with n classes is put into the n nearest; of each class the share of its images that are put
    there, averaged over classes. mean_average_precision: of each class, images ordered by score; averaged over classes.

    Images without a class, and classes without an image, count nowhere.

    Args: image_ID, class_CD: unit features. labels_L2: int64 (image, class), each once.
    """
    images, image_L = labels_L2[:, 0].unique(return_inverse=True)
    image_ID, labels_L2 = image_ID[images], torch.stack([image_L, labels_L2[:, 1]], dim=1)
    ranks, found = [], torch.zeros(len(class_CD), dtype=torch.float64, device=image_ID.device)
    for similarity_qC, right_qC in similarities(image_ID, class_CD, labels_L2, at_once=_sorted_at_once()):
        ranks.append(best_right(similarity_qC, right_qC)[1])
        found += (_among_the_nearest(similarity_qC, right_qC) & right_qC).sum(dim=0)
    of_class = labels_L2[:, 1].bincount(minlength=len(class_CD))
    seen = of_class > 0
    top = {f"acc{k}": (torch.cat(ranks) < k).double().mean().item() for k in TOP if k <= len(class_CD)}
    return {
        **top,
        "mean_per_class_recall": (found[seen] / of_class[seen]).mean().item(),
        "mean_average_precision": average_precisions(image_ID, class_CD, labels_L2)[seen].mean().item(),
    }


def average_precisions(image_ID: Tensor, class_CD: Tensor, labels_L2: Tensor) -> Tensor:
    """(C,) float64 mean over a class's images of the precision among all images that score at least as high; 0 without images."""
    found = []
    at_once = max(1, _sorted_at_once() // len(image_ID))
    for at in range(0, len(class_CD), at_once):
        mine = labels_L2[(labels_L2[:, 1] >= at) & (labels_L2[:, 1] < at + at_once)]
        similarity_cI = (class_CD[at : at + at_once] @ image_ID.T).nan_to_num(-2.0)
        right_cI = torch.zeros_like(similarity_cI, dtype=torch.bool)
        right_cI[mine[:, 1] - at, mine[:, 0]] = True
        distance_cI, order = (-similarity_cI).sort(dim=1)
        right_cI = right_cI.gather(1, order)
        reached = torch.searchsorted(distance_cI, distance_cI, right=True)  # images that score as high or higher
        right_so_far = right_cI.cumsum(dim=1).gather(1, reached - 1)
        precision = (right_so_far.double() / reached * right_cI).sum(dim=1)
        found.append(precision / right_cI.sum(dim=1).clamp(min=1))
    return torch.cat(found)


def _sorted_at_once() -> int:
    """Similarities that are sorted at a time: their places take four times the memory."""
    return max(1, retrieval.CHUNK_ELEMENTS // 4)


def _among_the_nearest(similarity_qC: Tensor, right_qC: Tensor) -> Tensor:
    """(q, C) bool: the class is one of the n nearest of an image with n classes, whatever the order of equal ones."""
    count_q1 = right_qC.sum(dim=1, keepdim=True)
    distance_qC, order = (-similarity_qC.nan_to_num(-2.0)).sort(dim=1)
    reached = torch.searchsorted(distance_qC, distance_qC, right=True)
    return torch.zeros_like(right_qC).scatter(1, order, reached <= count_q1)
