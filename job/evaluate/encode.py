"""Held-out images and texts -> unit features, each encoded once, by the code that training uses."""

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
from job.model.text import encode_texts
from job.model.towers import encode_images
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
    module: Any = clip.module
    device = clip.shift.device
    images_here, texts_here = world.part(len(held_out.keys)), world.part(len(held_out.texts))
    total = len(images_here) + len(texts_here)
    with evaluating(clip, autocast=autocast):
        image_features: list[Tensor] = []
        found: list[int] = []
        impatient = stopping if world.size == 1 else lambda: False  # a rank must not leave the others in their transfers
        batches = load_images(
            _samples(images_here, batch_size),
            keys=held_out.keys,
            images=images,
            view=clip.view,
            threads=threads,
            finish=lambda _asked, loaded: loaded,
            stopping=impatient,
        )
        with contextlib.closing(batches):
            for at in range(0, world.largest_part(len(held_out.keys)), batch_size):
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
        for at in range(0, world.largest_part(len(held_out.texts)), batch_size):
            if stopping():
                return None
            here = texts_here[at : at + batch_size]
            if here:
                text_features.append(encode_captions(clip, held_out.texts[here.start : here.stop], captions=captions))
                progress(len(images_here) + at + len(here), total)
        if not (image_features and text_features):  # more ranks than images: an empty part must still have the right width
            nothing = encode_texts(module, [torch.ones(1, 1, dtype=torch.int64, device=device)])[:0]
            image_features, text_features = image_features or [nothing], text_features or [nothing]
    image_KD, decoded_K = _assembled(image_features, found, count=len(held_out.keys), world=world)
    text_TD, _ = _assembled(text_features, texts_here, count=len(held_out.texts), world=world)
    image_ID = image_KD if decoded_K.all() else image_KD[decoded_K]  # of a million, a copy would be 2 GB
    return Features(image_ID, text_TD, torch.where(decoded_K, decoded_K.cumsum(0) - 1, -1))


def encode_captions(clip: ClipModel, texts: Sequence[str], *, captions: Captions) -> Tensor:
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
