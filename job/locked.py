"""What a locked tower makes of the training data, computed once instead of in every epoch. A part of train.py by rank."""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from job.attempt import Attempt, pairs_at_once
from job.config import Config
from job.data.captions import Captions, Known
from job.data.dataset import Dataset
from job.evaluate.encode import encode_captions, encode_keys, feature_width
from job.model.build import ClipModel
from job.runtime.device import autocast_dtype, decode_threads

log = logging.getLogger(__name__)

LARGEST_BYTES = 1 << 32
"""Of the features of one tower, in the memory of each rank: two million rows of 512 numbers. More are computed as they are met."""
PIECE = 1 << 15
"""Features computed between two moves from the device."""


@dataclass(frozen=True)
class LockedFeatures:
    """None: of a tower that learns, or whose features would be of no use."""

    images: Known | None = None
    captions: Known | None = None


def locked_features(
    config: Config, attempt: Attempt, dataset: Dataset, captions: Captions, clip: ClipModel, *, samples: int
) -> LockedFeatures | None:
    """Features of every training image, every training caption, or neither. All ranks must call it; each encodes its share.

    They follow from the config and the data, so a run that goes on computes the same ones again: one pass forward over the data.

    Args: samples: of the whole run. Where no row comes twice there is nothing to gain.
    Returns: None if a signal came on the way.
    """
    if not (config.lock_image or config.lock_text) or samples <= len(dataset.train_rows):
        return LockedFeatures()
    world = attempt.world
    how: dict[str, Any] = {
        "batch_size": pairs_at_once(world, global_batch_size=config.global_batch_size, micro_batch=config.micro_batch),
        "autocast": autocast_dtype(config.precision),
        "stopping": lambda: world.any(attempt.stop.requested),
        "world": world,
    }
    threads = decode_threads(config.threads, ranks=world.ranks)
    most = LARGEST_BYTES // (4 * feature_width(clip))

    def encode_images(part: list[str], told: Callable[[int], None]) -> tuple[Tensor, Tensor] | None:
        return encode_keys(clip, part, images=dataset.images, threads=threads, progress=told, **how)

    def encode_texts(part: list[str], told: Callable[[int], None]) -> tuple[Tensor, Tensor] | None:
        found = encode_captions(clip, part, captions=captions, progress=told, **how)
        return None if found is None else (found, torch.ones(len(part), dtype=torch.bool))

    images, texts = None, None
    rows = dataset.train_rows
    if config.lock_image and config.crop_scale < 1:
        log.info("the image tower is locked: with --crop-scale 1 its features would be computed once, not in every epoch")
    elif config.lock_image:
        keys = _distinct(((dataset.manifest.keys[int(row)],) for row in rows), attempt, most=most, tower="image")
        if keys and (images := _known("image", keys, encode_images, attempt)) is None:
            return None
    if config.lock_text:
        choices = _distinct((captions.choices(int(row)) for row in rows), attempt, most=most, tower="text")
        if choices and (texts := _known("text", choices, encode_texts, attempt)) is None:
            return None
    return LockedFeatures(images, texts)


def _distinct(names: Iterable[Iterable[str]], attempt: Attempt, *, most: int, tower: str) -> list[str]:
    """Every name once, in order; none, if there are more than `most`."""
    found: dict[str, None] = {}
    for count, several in enumerate(names):
        found.update(dict.fromkeys(several))
        if count % PIECE == 0:
            attempt.watchdog.beat("listing what a locked tower encodes")
        if len(found) > most:
            log.info("features of the locked %s tower are computed in every epoch: there are more than fit in memory", tower)
            return []
    return list(found)


def _known(
    tower: str,
    names: list[str],
    encode: Callable[[list[str], Callable[[int], None]], tuple[Tensor, Tensor] | None],
    attempt: Attempt,
) -> Known | None:
    """Args: encode: (n, D) features of names, and (n,) which there are; None when a signal came."""
    parts: list[Tensor] = []
    place_of: dict[str, int] = {}
    silent = not (attempt.world.is_first and sys.stderr.isatty())
    description = f"features of the locked {tower} tower"
    with tqdm(total=len(names), desc=description, dynamic_ncols=True, file=sys.stderr, leave=False, disable=silent) as bar:
        for start in range(0, len(names), PIECE):
            part = names[start : start + PIECE]

            def told(done: int, start: int = start) -> None:
                attempt.watchdog.beat("encoding for a locked tower")
                bar.update(start + done * attempt.world.size - bar.n)

            found = encode(part, told)
            if found is None:
                return None
            features, there = (tensor.cpu() for tensor in found)
            parts.append(features[there])
            encoded = [name for name, is_there in zip(part, there.tolist(), strict=True) if is_there]
            place_of.update(zip(encoded, range(len(place_of), len(place_of) + len(encoded)), strict=True))
    log.info(description, extra={"computed": len(place_of)})
    return Known(place_of, torch.cat(parts))
