"""What the base model and the exported one say of the same held-out images: a gallery, the worst mistakes, a reliability curve.

All of it is in one JSON object, thumbnails too, so that a report needs neither images nor torch.
"""

import base64
import hashlib
import heapq
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from job.data.batches import ImageSource, Read
from job.data.captions import Captions
from job.data.pixels import BadImage, Encoded, decode
from job.evaluate.calibration import reliability
from job.evaluate.encode import HeldOut, encode_held_out, group_pairs
from job.model.build import ClipModel
from job.model.weights import load_weights

IMAGES, TEXTS = 2000, 2000
"""At most so many are looked at."""
BUDGET_SECONDS = 60.0
"""Of the first model; then no more images are taken, and the second model gets the same ones."""
CHUNK = 64
"""Images between two looks at the clock."""
SHOWN, MISTAKES, TOP = 24, 8, 5
CAPTION_LETTERS, CAPTIONS = 300, 5
"""Of a caption, and of an image's right captions, as many are kept."""
THUMBNAIL_PIXELS, THUMBNAIL_BYTES = 160, 30_000


@dataclass(frozen=True)
class Judged:
    """What one model says of I images among T texts, on the CPU."""

    probability: Tensor
    """(I, T) softmax over the texts at the model's own logit_scale."""
    rank: Tensor
    """(I,) wrong texts that score at least as high as the best right one."""


def make_gallery(
    clip: ClipModel,
    held_out: HeldOut,
    *,
    before: Path,
    after: Path,
    images: ImageSource,
    captions: Captions,
    batch_size: int,
    threads: int,
    autocast: torch.dtype | None,
    stopping: Callable[[], bool],
) -> dict[str, Any] | None:
    """Compares two weights files of one model. Other than `evaluate_retrieval`, one rank does it alone.

    Args: clip: its weights are replaced. before, after: weights files of it. Others: see `evaluate_retrieval`.
    Returns: JSON values; None if stopping() became true on the way. Raises: DataError, when weights can't be loaded.
    """
    module: Any = clip.module
    sample = choose(held_out)
    count, deadline, judged = len(sample.keys), time.monotonic() + BUDGET_SECONDS, {}
    decoded = torch.ones(0, dtype=torch.bool)
    for name, weights in (("after", after), ("before", before)):
        if stopping():
            return None
        load_weights(module, str(weights), model=str(weights))
        image_parts, text_parts, decoded_parts, texts_done, done = [], [], [], 0, 0
        while done < count:
            until = min(done + CHUNK, count)
            texts_until = _texts_of_first(sample, until)
            found = encode_held_out(
                clip,
                HeldOut(sample.keys[done:until], sample.texts[texts_done:texts_until], sample.pairs[:0]),
                images=images,
                captions=captions,
                batch_size=batch_size,
                threads=threads,
                autocast=autocast,
                stopping=stopping,
            )
            if found is None:
                return None
            image_parts.append(found.images.cpu())
            text_parts.append(found.texts.cpu())
            decoded_parts.append(found.place_of.cpu() >= 0)
            done, texts_done = until, texts_until
            if name == "after" and time.monotonic() > deadline:
                count = done
        if not count:
            return _empty(held_out)
        decoded = torch.cat(decoded_parts)
        right_IT = torch.zeros(count, texts_done, dtype=torch.bool)
        pairs = sample.pairs[sample.pairs[:, 0] < count]
        right_IT[pairs[:, 0], pairs[:, 1]] = True
        scale = float(module.logit_scale.detach().exp())
        judged[name] = judge(torch.cat(image_parts), torch.cat(text_parts), right_IT[decoded], logit_scale=scale)
    if not decoded.any():
        return _empty(held_out)
    keys = [key for key, good in zip(sample.keys, decoded.tolist(), strict=False) if good]
    return _described(keys, sample.texts, right_IT[decoded], judged, images=images) | _counts(held_out, right_IT[decoded])


def choose(held_out: HeldOut) -> HeldOut:
    """At most IMAGES images, by hash of their keys, whatever the order of the CSV, and at most TEXTS texts that belong to them."""
    numbers = range(len(held_out.keys))
    chosen = heapq.nsmallest(IMAGES, numbers, key=lambda number: hashlib.sha256(held_out.keys[number].encode()).digest())
    mine = held_out.pairs[torch.isin(held_out.pairs[:, 0], torch.tensor(chosen, dtype=torch.int64))].tolist()
    texts_of: dict[int, list[str]] = {}
    for image, text in mine:
        texts_of.setdefault(image, []).append(held_out.texts[text])
    rows, seen = list[tuple[str, list[str]]](), set[str]()
    for number in chosen:
        texts = texts_of.get(number, [])[:TEXTS]
        if rows and len(seen.union(texts)) > TEXTS:
            break
        seen.update(texts)
        rows.append((held_out.keys[number], texts))
    return group_pairs(rows)


def _texts_of_first(sample: HeldOut, images: int) -> int:
    """How many texts belong to the first so many images: texts are numbered as these name them."""
    mine = sample.pairs[sample.pairs[:, 0] < images, 1]
    return int(mine.max()) + 1 if len(mine) else 0


def judge(image_ID: Tensor, text_TD: Tensor, right_IT: Tensor, *, logit_scale: float) -> Judged:
    """Args: image_ID, text_TD: unit features. right_IT: bool, which texts belong to which image; at least one for each."""
    similarity_IT = image_ID @ text_TD.T
    best_I1 = similarity_IT.masked_fill(~right_IT, -torch.inf).amax(dim=1, keepdim=True)
    rank = (~(similarity_IT < best_I1) & ~right_IT).sum(dim=1)
    return Judged((logit_scale * similarity_IT).softmax(dim=1).nan_to_num(0.0), rank)


def reliability_of(judged: Judged, right_IT: Tensor) -> dict[str, Any]:
    """How often the preferred text is right, by the probability that the model gives it. See `calibration.reliability`."""
    confidence, choice = judged.probability.max(dim=1)
    hit = right_IT.gather(1, choice[:, None])[:, 0]
    bins, ece = reliability(confidence.double(), hit.double())
    return {"bins": [asdict(one) for one in bins], "ece": round(ece, 5), "accuracy": round(hit.float().mean().item(), 5)}


def _described(
    keys: list[str], texts: list[str], right_IT: Tensor, judged: dict[str, Judged], *, images: ImageSource
) -> dict[str, Any]:
    after = judged["after"]
    lead = after.probability.amax(dim=1) - (after.probability * right_IT).amax(dim=1)
    order = sorted(range(len(keys)), key=lambda at: (-int(after.rank[at]), -float(lead[at]), at))
    worst = [at for at in order[:MISTAKES] if after.rank[at] > 0]
    with images.reading() as read:
        entries = {at: _entry(at, keys[at], right_IT, judged, read=read) for at in {*range(min(SHOWN, len(keys))), *worst}}
    named = sorted({text for entry in entries.values() for text in _texts_in(entry)})
    return {
        "texts": {str(text): shortened(texts[text]) for text in named},
        "gallery": [entries[at] for at in range(min(SHOWN, len(keys)))],
        "mistakes": [entries[at] for at in worst],
        "reliability": {name: reliability_of(judged[name], right_IT) for name in ("before", "after")},
    }


def _entry(at: int, key: str, right_IT: Tensor, judged: dict[str, Judged], *, read: Read) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "key": shortened(key),
        "thumbnail": thumbnail(read(key) or b""),
        "right": right_IT[at].nonzero()[:CAPTIONS, 0].tolist(),
    }
    for name, one in judged.items():
        values, places = one.probability[at].topk(min(TOP, len(one.probability[at])))
        top = [
            {"text": text, "probability": round(value, 5), "right": bool(right_IT[at, text])}
            for value, text in zip(values.tolist(), places.tolist(), strict=True)
        ]
        entry[name] = {"top": top, "rank": int(one.rank[at])}
    return entry


def _texts_in(entry: dict[str, Any]) -> list[int]:
    return [*entry["right"], *(item["text"] for name in ("before", "after") for item in entry[name]["top"])]


def shortened(text: str) -> str:
    return text if len(text) <= CAPTION_LETTERS else text[: CAPTION_LETTERS - 1] + "…"


def thumbnail(data: Encoded) -> str:
    """A small JPEG as a data URI; empty, if it is no image."""
    try:
        image = Image.fromarray(decode(data))
    except BadImage:
        return ""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    for quality in (82, 60, 30):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        if stream.tell() <= THUMBNAIL_BYTES:
            return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return ""


def _counts(held_out: HeldOut, right_IT: Tensor) -> dict[str, Any]:
    images, texts = right_IT.shape
    return {"images": images, "candidates": texts, "of_images": len(held_out.keys), "of_texts": len(held_out.texts)}


def _empty(held_out: HeldOut) -> dict[str, Any]:
    nothing = torch.zeros(0, 0)
    return {"texts": {}, "gallery": [], "mistakes": [], "reliability": {}} | _counts(held_out, nothing)
