"""Held-out images with what the base model and the exported one say of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.report.words import esc, number, percent

SIDES = (("before", "Before"), ("after", "After"))
FIRST = 8
"""So many are seen at once."""


def cards(entries: Sequence[Mapping[str, Any]], texts: Mapping[str, str], *, candidates: int) -> str:
    """One card per image. Args: entries, texts: see evaluate/gallery.py. candidates: captions that each was asked about."""
    shown = [_card(entry, texts, candidates=candidates) for entry in entries]
    others = f'<div class="looks">{"".join(shown[FIRST:])}</div>'
    rest = f'<details class="more"><summary>{len(shown) - FIRST} more</summary>{others}</details>'
    return f'<div class="looks">{"".join(shown[:FIRST])}</div>{rest if len(shown) > FIRST else ""}'


def _card(entry: Mapping[str, Any], texts: Mapping[str, str], *, candidates: int) -> str:
    right = [texts.get(str(text), "") for text in entry["right"]]
    also = "".join(f'<p class="key" dir="auto">also: {esc(text)}</p>' for text in right[1:2])
    picture = '<div class="noimage">no picture</div>'
    if str(entry["thumbnail"]).startswith("data:image/jpeg;base64,"):
        alt = f"held-out image {entry['key']}"
        picture = f'<img src="{esc(entry["thumbnail"])}" alt="{esc(alt)}" width="88" height="88" loading="lazy">'
    caption = f'<p class="caption" dir="auto" title="{esc(right[0])}">{esc(right[0])}</p>' if right else ""
    most = max((item["probability"] for name in ("before", "after") for item in entry[name]["top"]), default=0.0) or 1.0
    sides = "".join(_side(words, entry[name], texts, candidates=candidates, most=most) for name, words in SIDES)
    return (
        f'<article class="look"><header>{picture}<div>{caption}{also}<p class="key">{esc(entry["key"])}</p></div></header>'
        f'<div class="sides">{sides}</div></article>'
    )


def _side(words: str, side: Mapping[str, Any], texts: Mapping[str, str], *, candidates: int, most: float) -> str:
    """One model's answers. Args: most: the probability whose bar is as wide as the list."""
    items = []
    for item in side["top"]:
        caption, mark = texts.get(str(item["text"]), ""), "✓ " if item["right"] else ""
        width = 100 * max(0.0, min(1.0, item["probability"] / most))
        items.append(
            f'<li{" class=yes" if item["right"] else ""} style="--w:{width:.1f}%">'
            f'<span class="said" dir="auto" title="{esc(caption)}">{mark}{esc(caption)}</span>'
            f"<b>{percent(item['probability'], 0)}</b></li>"
        )
    told = f"the right caption comes at place {number(side['rank'] + 1)} of {number(candidates)}"
    rank = f'<span title="{told}">rank {number(side["rank"] + 1)}</span>'
    return f"<section><h4><span>{words}</span>{rank}</h4><ol>{''.join(items)}</ol></section>"
