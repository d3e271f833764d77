"""Held-out images and texts -> unit features, each encoded once, by the code that training uses."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from job.data.batches import ImageSource, Keys, Samples, load_images
from job.data.captions import Captions
from job.model.build import ClipModel
from job.model.image import encode_images
from job.model.text import encode_texts
from job.runtime.world import ALONE, World


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


@dataclass(frozen=True)
class Features:
    """Of all ranks, on the model's device."""

    images: Tensor
    """(I, D) of the images that could be decoded, in the order of HeldOut.keys. Texts: (T, D), all."""
    texts: Tensor
    place_of: Tensor
    """int64 (K,): where the image of each key stands in images; -1 if it could not be decoded."""

    def placed(self, pairs_P2: Tensor) -> Tensor:
        """Pairs (key, something) as (row of images, something), without those whose image could not be decoded."""
        pairs_P2 = pairs_P2.to(self.place_of.device)
        placed = torch.stack([self.place_of[pairs_P2[:, 0]], pairs_P2[:, 1]], dim=1)
        return placed[placed[:, 0] >= 0]


def encode_held_out(
    clip: ClipModel,
    held_out: HeldOut,
    *,
    images: ImageSource,
    captions: Captions,
    batch_size: int,
    threads: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    world: World = ALONE,
) -> Features | None:
    """Features of all held-out images and texts. All ranks must call it; each encodes its share.

    Args: batch_size: of one rank. stopping: the same answer on every rank, when all ask.
    Returns: None if stopping() became true on the way.
    """
    images_here, texts_here = (len(world.part(len(things))) for things in (held_out.keys, held_out.texts))
    total = images_here + texts_here
    how: dict[str, Any] = {"batch_size": batch_size, "autocast": autocast, "stopping": stopping, "world": world}
    told = lambda done: progress(done, total)  # noqa: E731
    encoded = encode_keys(clip, held_out.keys, images=images, threads=threads, progress=told, **how)
    if encoded is None:
        return None
    image_KD, decoded_K = encoded
    told = lambda done: progress(images_here + done, total)  # noqa: E731
    text_TD = encode_captions(clip, held_out.texts, captions=captions, progress=told, **how)
    if text_TD is None:
        return None
    image_ID = image_KD if decoded_K.all() else image_KD[decoded_K]  # of a million, a copy would be 2 GB
    return Features(image_ID, text_TD, torch.where(decoded_K, decoded_K.cumsum(0) - 1, -1))


def encode_keys(
    clip: ClipModel,
    keys: Keys,
    *,
    images: ImageSource,
    batch_size: int,
    threads: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _done: None,
    world: World = ALONE,
) -> tuple[Tensor, Tensor] | None:
    """(K, D) features of the images of these keys, and (K,) bool, which could be decoded. See encode_held_out."""
    device = clip.shift.device
    here = world.part(len(keys))
    features: list[Tensor] = []
    found: list[int] = []
    impatient = stopping if world.size == 1 else lambda: False  # a rank must not leave the others in their transfers
    batches = load_images(
        _samples(here, batch_size),
        keys=keys,
        images=images,
        view=clip.view,
        threads=threads,
        finish=lambda _asked, loaded: loaded,
        stopping=impatient,
    )
    with evaluating(clip, autocast=autocast), contextlib.closing(batches):
        for at in range(0, world.largest_part(len(keys)), batch_size):
            loaded = next(batches, None) if at < len(here) else None
            if stopping():
                return None
            if loaded is not None:
                if len(loaded.pixels):
                    pixels = loaded.pixels.to(device)
                    features.append(encode_images(clip.module, pixels, shift=clip.shift, scale=clip.scale))
                found.extend(here[at + int(place)] for place in loaded.good)
                progress(at + len(loaded.good) + len(loaded.bad))
        return _assembled(features or [_no_features(clip)], found, count=len(keys), world=world)


def encode_captions(
    clip: ClipModel,
    texts: Sequence[str],
    *,
    captions: Captions,
    batch_size: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _done: None,
    world: World = ALONE,
) -> Tensor | None:
    """(T, D) features of these texts. See encode_held_out."""
    here = world.part(len(texts))
    features = []
    with evaluating(clip, autocast=autocast):
        for at in range(0, world.largest_part(len(texts)), batch_size):
            if stopping():
                return None
            now = here[at : at + batch_size]
            if now:
                features.append(encode_at_once(clip, texts[now.start : now.stop], captions=captions))
                progress(at + len(now))
        return _assembled(features or [_no_features(clip)], here, count=len(texts), world=world)[0]


def feature_width(clip: ClipModel) -> int:
    """D of the model's features."""
    with evaluating(clip, autocast=None):
        return _no_features(clip).shape[1]


def _no_features(clip: ClipModel) -> Tensor:
    """(0, D): of a rank that has nothing to encode, because there are more ranks than images."""
    return encode_texts(clip.module, [torch.ones(1, 1, dtype=torch.int64, device=clip.shift.device)])[:0]


def encode_at_once(clip: ClipModel, texts: Sequence[str], *, captions: Captions) -> Tensor:
    """(N, D) features of these texts. Call it within `evaluating`."""
    device = clip.shift.device
    tokens = captions.tokens(texts)
    features = encode_texts(clip.module, [group.to(device) for group in tokens.groups])
    return features[tokens.text_of.to(device)]


@contextlib.contextmanager
def evaluating(clip: ClipModel, *, autocast: torch.dtype | None) -> Iterator[None]:
    """In here the model is in evaluation mode, without gradients; afterwards in the mode that it was in."""
    modes = [(part, part.training) for part in clip.module.modules()]
    clip.module.eval()
    try:
        with torch.no_grad(), torch.autocast(clip.shift.device.type, dtype=autocast, enabled=autocast is not None):
            yield
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
