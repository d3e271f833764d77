"""Made captions with a known number of tokens, spread as tags of photographs are: most short, a few three times as long."""

from statistics import NormalDist
from typing import Any

import numpy as np

SHORTEST, LONGEST = 4, 77
"""Tokens with start and end; the longest is CLIP's context."""
SPREAD = 0.416
"""Of the logarithm of the length: an average of 22 then goes with a 95th percentile of 40, as of real tags."""
_WORDS = (
    "red green blue white black old young small large tall dark bright wooden metal stone glass city street house garden "
    "tree river lake beach mountain forest road bridge tower window door table chair bed lamp book phone car bus train "
    "plane boat bike dog cat horse bird cow sheep fish man woman boy girl child family group friends face hand smile hat "
    "dress shirt shoes bag food fruit apple bread cake coffee wine water snow rain sun sky cloud night morning winter "
    "summer party music dance sport football game"
)


def make_captions(count: int, *, tokens: float, seed: int) -> list[str]:
    """Distinct captions of so many tokens on average, start and end included, as CLIP's tokenizer counts them.

    Args: tokens: 5 to 30.
    """
    words = _single_token_words()
    random = np.random.default_rng(seed)
    found: dict[str, None] = {}
    for length in random.permutation(token_counts(count, tokens=tokens)):
        while True:
            caption = " ".join(random.choice(words, int(length) - 2))
            if caption not in found:
                break
        found[caption] = None
    return list(found)


def token_counts(count: int, *, tokens: float) -> list[int]:
    """Lengths in ascending order, their average as near to `tokens` as whole numbers allow."""
    normal = NormalDist()
    shape = [np.exp(SPREAD * normal.inv_cdf((at + 0.5) / count)) for at in range(count)]

    def scaled(factor: float) -> list[int]:
        return [int(min(LONGEST, max(SHORTEST, round(factor * one)))) for one in shape]

    low, high = 1.0, float(LONGEST)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(scaled(middle)) < tokens else (low, middle)
    lengths = scaled(high)
    for at in range(count):  # the last few tokens, taken from the middle outwards
        excess = round(sum(lengths) - tokens * count)
        if excess == 0:
            break
        place = (count // 2 + at) % count
        lengths[place] = max(SHORTEST, lengths[place] - (1 if excess > 0 else -1))
    return sorted(lengths)


def _single_token_words() -> list[str]:
    tokenizer = _tokenizer()
    words = _WORDS.split()
    assert all(len(tokenizer.encode(word)) == 1 for word in words), "a word of these captions is more than one token"
    return words


def _tokenizer() -> Any:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")
