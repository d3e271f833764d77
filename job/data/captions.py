"""Row -> caption -> tokens. Each text is tokenised at most once; padding that the tower need not see is cut off."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.data.order import uniforms

CAPTION_STREAM = 1
LENGTH_STEP = 8
"""Captions are computed in groups of lengths 8, 16, 24, …, so at most 7 positions of a caption are padding."""

CACHED_TEXTS = 1_000_000
"""About 300 bytes each. Beyond it texts are tokenised again when they come back."""

TOKENISED_AT_ONCE = 256

MAX_TAGS = 32
"""Of a caption whose tags are compared; of more, those with the smallest numbers count."""

TAG_SEPARATORS = (", ", ",", "; ", ";", "|", "\t", "/")


class Texts(Protocol):
    def __getitem__(self, row: int) -> str: ...
    def __len__(self) -> int: ...


Tokenizer = Callable[[list[str]], Tensor]
"""open_clip's tokenizers: n texts -> (n, context_length) integers, cut and padded to the context length."""


@dataclass(frozen=True)
class Known:
    """Features of a locked tower, computed once for the whole run."""

    place_of: Mapping[str, int]
    """Image key or caption -> row of features. A key that is not there could not be decoded."""
    features: Tensor
    """float32 (N, D), in host memory."""


@dataclass(frozen=True)
class TokenGroups:
    """Tokens of U distinct texts, in groups of similar length; or, of a locked text tower, what it makes of them."""

    groups: tuple[Tensor, ...]
    """Each int64 (u, L); the u of all groups add up to U. Or one float32 (U, D): features."""
    text_of: Tensor
    """int64 (B,): the text, counted through all groups, that each caption asked for is."""
    text_id: Tensor
    """int64 (B,): the same number for the same caption, in every batch and process."""
    tags: Tensor
    """int64 (B, K): the same number for the same tag; 0 behind the last one. K is 0 where nobody asks for tags."""

    def pinned(self) -> "TokenGroups":
        """The same in pinned memory, from which a GPU takes it without the host's waiting."""
        rest = (tensor.pin_memory() for tensor in (self.text_of, self.text_id, self.tags))
        return TokenGroups(tuple(group.pin_memory() for group in self.groups), *rest)


class Captions:
    """The captions of the rows of a CSV, as text and as tokens. Thread-safe: a lost race costs one tokenisation.

    Args:
        texts: the caption column.
        tokenizer: see Tokenizer.
        lengths_of: (n, context_length) tokens -> (n,) lengths beyond which the text tower needs nothing; None when the
            tower looks at all positions.
        mode: whole, or sample (one tag at random per visit, from the numbers that belong to the sample's position).
        tag_separator: a string; only used by mode sample and with_tags.
        with_tags: also give the tags of each caption, for targets by what captions share.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        lengths_of: Callable[[Tensor], Tensor] | None,
        mode: str,
        tag_separator: str,
        template: str,
        seed: int,
        with_tags: bool = False,
    ) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._lengths_of = lengths_of
        self._mode = mode
        self._tag_separator = tag_separator
        self._template = template
        self._seed = seed
        self._with_tags = with_tags
        self._cache: dict[str, NDArray[np.int32]] = {}

    def choices(self, row: int) -> list[str]:
        """Every caption that this row may be trained with, template applied."""
        text = self._texts[row]
        parts = split_tags(text, self._tag_separator) if self._mode == "sample" else [text]
        return [self._template.replace("{}", part) for part in parts or [text]]

    def sample(self, count: int) -> list[str]:
        """So many captions, or fewer, from rows that are evenly spread."""
        rows = len(self._texts)
        some = range(rows) if rows <= count else (at * rows // count for at in range(count))
        return [self.choices(row)[0] for row in some]

    def at(self, rows: Sequence[int] | NDArray[np.int64], positions: NDArray[np.int64]) -> list[str]:
        """The captions of these rows when they are visited at these sample numbers."""
        if self._mode == "whole":
            return [self.choices(int(row))[0] for row in rows]
        numbers = uniforms(positions, 1, seed=self._seed, stream=CAPTION_STREAM)[:, 0]
        chosen = []
        for row, number in zip(rows, numbers, strict=True):
            choices = self.choices(int(row))
            chosen.append(choices[int(number * len(choices))])
        return chosen

    def tokens(self, captions: Sequence[str]) -> TokenGroups:
        """Tokens of the distinct captions, ordered by length (and by first appearance within a group)."""
        distinct = list(dict.fromkeys(captions))
        rows = self._tokenised(distinct)
        bucket = [-(-len(row) // LENGTH_STEP) for row in rows]
        order = sorted(range(len(distinct)), key=lambda index: bucket[index])
        groups, start = [], 0
        for length, count in sorted(Counter(bucket).items()):
            members = [rows[index] for index in order[start : start + count]]
            padded = np.zeros((count, min(length * LENGTH_STEP, max(len(row) for row in members))), dtype=np.int64)
            for at, member in enumerate(members):
                padded[at, : len(member)] = member
            groups.append(torch.from_numpy(padded))
            start += count
        return self._grouped(tuple(groups), captions, place_of={distinct[index]: at for at, index in enumerate(order)})

    def known(self, captions: Sequence[str], known: Known) -> TokenGroups:
        """The same with the features of the distinct captions in place of their tokens."""
        distinct = list(dict.fromkeys(captions))
        features = known.features[torch.tensor([known.place_of[caption] for caption in distinct], dtype=torch.int64)]
        return self._grouped((features,), captions, place_of={caption: at for at, caption in enumerate(distinct)})

    def _grouped(self, groups: tuple[Tensor, ...], captions: Sequence[str], *, place_of: Mapping[str, int]) -> TokenGroups:
        ids = {caption: _text_id(caption) for caption in place_of}
        text_of, text_id = ([names[caption] for caption in captions] for names in (place_of, ids))
        tags = np.zeros((len(captions), MAX_TAGS if self._with_tags else 0), dtype=np.int64)
        if self._with_tags:
            tags_of = {caption: self._tag_ids(caption) for caption in place_of}
            for row, caption in enumerate(captions):
                tags[row, : len(tags_of[caption])] = tags_of[caption]
        places, numbers = (torch.tensor(values, dtype=torch.int64) for values in (text_of, text_id))
        return TokenGroups(groups, places, numbers, torch.from_numpy(tags))

    def _tag_ids(self, caption: str) -> list[int]:
        before, _, after = self._template.partition("{}")
        bare = caption[len(before) : len(caption) - len(after)]
        return sorted({_text_id(tag) or 1 for tag in split_tags(bare, self._tag_separator)})[:MAX_TAGS]

    def tokenise_until(self, enough: Callable[[], bool]) -> None:
        """Tokenises captions ahead of their first use, in the order of the rows, while there is nothing better to do."""
        for start in range(0, min(len(self._texts), CACHED_TEXTS), TOKENISED_AT_ONCE):
            if enough():
                return
            rows = range(start, min(start + TOKENISED_AT_ONCE, len(self._texts)))
            self._tokenised(list(dict.fromkeys(caption for row in rows for caption in self.choices(row))))

    def _tokenised(self, texts: list[str]) -> list[NDArray[np.int32]]:
        new = [text for text in texts if text not in self._cache]
        found = {}
        if new:
            tokens = self._tokenizer(new)
            lengths = self._lengths_of(tokens).tolist() if self._lengths_of else [tokens.shape[1]] * len(new)
            for text, row, length in zip(new, tokens.numpy().astype(np.int32), lengths, strict=True):
                found[text] = row[:length].copy()
            if len(self._cache) + len(found) <= CACHED_TEXTS:
                self._cache.update(found)
        return [found[text] if text in found else self._cache[text] for text in texts]


def _text_id(caption: str) -> int:
    digest = hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def split_tags(text: str, separator: str) -> list[str]:
    """The tags of a caption without empty ones, in order."""
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def find_tag_separator(texts: Sequence[str]) -> str:
    """The separator that most of these captions contain; ', ' where none does, so that each caption is one tag."""
    found = Counter(next((separator for separator in TAG_SEPARATORS if separator in text), "") for text in texts)
    found.pop("", None)
    return found.most_common(1)[0][0] if found else TAG_SEPARATORS[0]


def full_lengths(tokenizer: Any, texts: list[str]) -> NDArray[np.int64]:
    """(n,) tokens of each text with start and end, before any cut to the context length."""
    if hasattr(tokenizer, "encode"):  # open_clip's SimpleTokenizer adds start and end itself when called
        return np.array([len(tokenizer.encode(text)) + 2 for text in texts], dtype=np.int64)
    return np.array([len(ids) for ids in tokenizer.tokenizer(texts, truncation=False).input_ids], dtype=np.int64)
