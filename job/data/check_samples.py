"""The costly part of the preflight: captions are tokenised, images decoded, all of them or a sample."""

import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from job.data.check_report import Findings, Problem
from job.data.images import Images
from job.data.manifest import Column

LARGE_PIXELS = 512 * 512
"""Images above this are decoded several times slower than images packed at a short side of 256 pixels."""

_CHUNK = 256
_FORMATS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"P6", "ppm"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts, by the first word of their characters' names, in which a good tokenizer too needs up to a token per character."""


def check_captions(
    captions: Column, rows: NDArray[np.int64], *, token_lengths: Callable[[list[str]], NDArray[np.int64]], context_length: int
) -> Findings:
    """Lengths in tokens of these rows' captions, and scripts that the tokenizer does not know."""
    lengths = np.zeros(len(rows), np.int64)
    shattered: Counter[str] = Counter()
    for start in range(0, len(rows), 4096):
        texts = [captions[row] for row in rows[start : start + 4096].tolist()]
        lengths[start : start + len(texts)] = token_lengths(texts)
        shattered.update(filter(None, map(_shattered_script, texts, lengths[start : start + len(texts)].tolist())))
    truncated = int((lengths > context_length).sum())
    facts = {
        "captions_tokenized": len(rows),
        "mean_caption_tokens": float(lengths.mean()),
        "percentile_95_caption_tokens": int(np.percentile(lengths, 95)),
        "longest_caption_tokens": int(lengths.max()),
        "context_length_tokens": context_length,
        "truncated_captions_share": truncated / len(rows),
    }
    problems = []
    if truncated:
        longest = captions[int(rows[int(lengths.argmax())])]
        text = (
            f"{truncated} of {len(rows)} captions are longer than the model's {context_length} tokens and lose their end; the "
            f"longest has {lengths.max()}: {longest[:60]!r}. Put what matters first, or use --caption-mode sample if captions "
            "are lists of tags."
        )
        problems.append(Problem("warning", "truncated-captions", text))
    if shattered.total() > 0.05 * len(rows):
        scripts = ", ".join(script for script, _ in shattered.most_common(3))
        text = (
            f"{shattered.total()} of {len(rows)} captions ({scripts}) break into several times the usual number of tokens: the "
            "model's tokenizer does not know their script, and its text tower hardly saw it. Take a multilingual model, such as "
            "--model xlm-roberta-base-ViT-B-32 --pretrained laion5b_s13b_b90k, or nllb-clip-base."
        )
        problems.append(Problem("warning", "shattered-script", text))
    return facts, problems


def _shattered_script(text: str, length: int) -> str:
    """The script of a mostly non-Latin text that needs far more tokens than a tokenizer made for it would; "" for others.

    CLIP's tokenizer needs 0.25 tokens per character of English, 0.8 and more of Cyrillic, 2 of Chinese; that of XLM-R 0.25 and 0.7.
    """
    letters = [letter for letter in text if letter.isalpha()]
    foreign = [letter for letter in letters if ord(letter) > 0x24F]
    if len(foreign) < 4 or 2 * len(foreign) < len(letters):
        return ""
    script = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in foreign).most_common(1)[0][0]
    return script.lower() if (length - 2) / len(text) > (1.2 if script in _WITHOUT_SPACES else 0.6) else ""


@dataclass(frozen=True)
class _Looked:
    """What a chunk of images turned out to be; arrays are aligned with its rows, zero where an image is missing or bad."""

    sizes: NDArray[np.int32]
    digests: NDArray[np.uint64]
    formats: Counter[str]
    bad: list[tuple[str, str]]


def _look(keys: list[str], images: Images, decode: Callable[[bytes], Any]) -> _Looked:
    looked = _Looked(np.zeros((len(keys), 2), np.int32), np.zeros(len(keys), np.uint64), Counter(), [])
    for number, key in enumerate(keys):
        data = images.get(key)
        if data is None:
            continue
        looked.digests[number] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        looked.formats[_format(data)] += 1
        try:
            looked.sizes[number] = decode(data).shape[:2]
        except ValueError as error:
            looked.bad.append((key, str(error)))
    return looked


def _format(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _FORMATS if data.startswith(magic)), "other")


def check_images(
    keys: Column,
    rows: NDArray[np.int64],
    images: Images,
    *,
    is_held_out: NDArray[np.bool_],
    decode: Callable[[bytes], Any],
    threads: int,
    max_bad_samples: float,
) -> Findings:
    """Formats and sizes of the images of these rows, of which no two have the same key; what can't be decoded; repeated images.

    Args: is_held_out: of each of the rows.
    """
    size = min(_CHUNK, max(1, len(rows) // 64))
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    parts = []
    with (
        ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=len(rows), desc="images", unit="image", file=sys.stderr, disable=None, dynamic_ncols=True) as bar,
    ):
        for part in pool.map(lambda chunk: _look([keys[row] for row in chunk.tolist()], images, decode), chunks):
            bar.update(len(part.digests))
            parts.append(part)
    looked = _Looked(
        sizes=np.concatenate([part.sizes for part in parts]),
        digests=np.concatenate([part.digests for part in parts]),
        formats=sum((part.formats for part in parts), Counter()),
        bad=[bad for part in parts for bad in part.bad],
    )
    return _image_facts(looked), [
        *_bad_images(looked, max_bad_samples=max_bad_samples),
        *_large_images(looked),
        *_repeated_images(looked, is_held_out),
    ]


def _image_facts(looked: _Looked) -> dict[str, Any]:
    sizes = looked.sizes[looked.sizes[:, 0] > 0]
    by_area = sizes[np.argsort(sizes[:, 0].astype(np.int64) * sizes[:, 1], kind="stable")]
    picks = {"smallest_image_pixels": 0, "median_image_pixels": len(sizes) // 2, "largest_image_pixels": -1}
    return {
        "images_decoded": len(sizes),
        "undecodable_images": len(looked.bad),
        "image_formats": dict(looked.formats.most_common()),
        **({name: f"{by_area[pick][1]} x {by_area[pick][0]}" for name, pick in picks.items()} if len(sizes) else {}),
    }


def _bad_images(looked: _Looked, *, max_bad_samples: float) -> list[Problem]:
    count, present = len(looked.bad), int((looked.digests > 0).sum())
    if not count:
        return []
    named = "; ".join(f"{key!r}: {why}" for key, why in looked.bad[:5]) + ("; …" if count > 5 else "")
    text = f"{count} of {present} images looked at can't be decoded: {named}. Replace them or remove their rows"
    if count > max_bad_samples * present:
        return [Problem("error", "undecodable-images", f"{text}; --max-bad-samples allows a share of {max_bad_samples:g}.")]
    return [Problem("warning", "undecodable-images", f"{text}; the job would leave them out.")]


def _large_images(looked: _Looked) -> list[Problem]:
    sizes = looked.sizes[looked.sizes[:, 0] > 0].astype(np.int64)
    if not len(sizes) or (median := float(np.median(sizes[:, 0] * sizes[:, 1]))) <= LARGE_PIXELS:
        return []
    text = (
        f"Half of the images have over {median / 1e6:.1f} million pixels, and decoding them may keep the GPU waiting. Packing them "
        "with clipjob pack --resize 256 makes it several times faster."
    )
    return [Problem("advice", "large-images", text)]


def _repeated_images(looked: _Looked, is_held_out: NDArray[np.bool_]) -> list[Problem]:
    present = looked.digests > 0
    problems = []
    if repeated := int(present.sum()) - len(np.unique(looked.digests[present])):
        text = f"{repeated} of {present.sum()} images looked at have the same bytes as one under another key."
        problems.append(Problem("advice", "repeated-images", f"{text} Use one key per image, so that its captions stay together."))
    if leaked := int(np.isin(looked.digests[present & is_held_out], looked.digests[present & ~is_held_out]).sum()):
        text = f"{leaked} held-out images are also training images under another key, so the evaluation flatters the model."
        problems.append(Problem("warning", "leaked-images", f"{text} Give equal images one key."))
    return problems
