"""Plots as inline SVG, drawn in units of pixels at a width that both a phone and half a desktop page show almost as it is.

Colours are classes c0 … c7 of style.py; series also differ by dashes, so that no reader needs colours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from job.report.words import esc, is_number, number, percent

WIDTH, HEIGHT = 460, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 42
MOST_POINTS = 240
"""Of one line; beyond it each point is the mean of several steps, in a band from their lowest to their highest."""
MOST_HITS = 72
"""Places of a plot that tell their values when pointed at."""
DASHES = ("", "6 3", "2 3", "9 3 2 3")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. Its points are in the order of x; what is not finite is left out."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    """0 … 7."""
    dash: int = 0
    """0 … 3, an index of DASHES."""
    dots: bool = False
    """Whether each point is a measurement of its own."""


@dataclass(frozen=True)
class Bucket:
    x: float
    mean: float
    low: float
    high: float


def buckets(points: Sequence[tuple[float, float | None]], most: int = MOST_POINTS) -> list[Bucket]:
    """At most so many points, each the mean of neighbours; what is not finite is left out."""
    finite = [(x, float(y)) for x, y in points if y is not None and is_number(y)]
    count = min(most, len(finite))
    shares = [finite[at * len(finite) // count : (at + 1) * len(finite) // count] for at in range(count)]
    found = []
    for share in shares:
        values = [y for _, y in share]
        found.append(Bucket(sum(x for x, _ in share) / len(share), sum(values) / len(values), min(values), max(values)))
    return found


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, both ends included, at most `most` + 1 of them."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """The same for what can only be counted."""
    return [value for value in ticks(low, high, most) if value == round(value)]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    y_label: str = "",
    shown: Callable[[float], str] = number,
    from_zero: bool = False,
    highest: float | None = None,
    most: int = MOST_POINTS,
) -> str:
    """Lines over steps, with a legend where there are several.

    Args:
        label: what a screen reader says.
        shown: a value as text.
        from_zero: the y axis begins at 0.
        highest: it ends there at most.
        most: points of each line.
    Returns: HTML; a sentence, if no series has a finite point.
    """
    lines = [(one, buckets(one.points, most)) for one in series]
    lines = [(one, found) for one, found in lines if found]
    if not lines:
        return '<p class="nothing">There are no values to show.</p>'
    every = [item for _, found in lines for item in found]
    range_x = [x for one, _ in lines for x in (one.points[0][0], one.points[-1][0])]
    scale = _Scale.around(every, min(range_x), max(range_x), from_zero=from_zero, highest=highest)
    body = [_axes(scale, x_label=x_label, y_label=y_label, shown=shown)]
    body += [_line(one, found, scale) for one, found in lines]
    body.append(_hits(lines, scale, x_label=x_label, shown=shown))
    legend = _legend([one for one, _ in lines]) if len(lines) > 1 else ""
    return legend + _svg("".join(body), label=label)


def reliability_chart(curves: Sequence[tuple[Series, dict[str, Any]]], *, label: str) -> str:
    """How often a model is right against how sure it is. Args: curves: name and look, and what `gallery.reliability_of` returns."""
    scale = _Scale(0.0, 1.0, 0.0, 1.0, height=300)
    body = [_axes(scale, x_label="probability of the preferred caption", y_label="share that is right", shown=_whole_percent)]
    (x0, y0), (x1, y1) = scale.at(0, 0), scale.at(1, 1)
    body.append(f'<line class="guide" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    for look, found in curves:
        bins = [item for item in found["bins"] if item["count"]]
        total = sum(item["count"] for item in bins) or 1
        places = [scale.at(item["confidence"], item["accuracy"]) for item in bins]
        if len(places) > 1:
            body.append(f'<path class="line c{look.colour}"{_dashed(look)} d="{_path(places)}"/>')
        for (x, y), item in zip(places, bins, strict=True):
            radius = 3 + 9 * math.sqrt(item["count"] / total)
            told = (
                f"{look.name}: {item['count']} images with a probability of about {percent(item['confidence'])}; "
                f"right in {percent(item['accuracy'])} of them"
            )
            body.append(
                f'<circle class="bubble c{look.colour}" cx="{x}" cy="{y}" r="{radius:.1f}"><title>{esc(told)}</title></circle>'
            )
    return _legend([look for look, _ in curves]) + _svg("".join(body), label=label, height=300)


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int = HEIGHT

    @classmethod
    def around(cls, items: Sequence[Bucket], x_low: float, x_high: float, *, from_zero: bool, highest: float | None) -> "_Scale":
        x_low = 0.0 if x_low <= 0.1 * x_high else x_low
        y_low, y_high = min(item.low for item in items), max(item.high for item in items)
        y_low = min(0.0, y_low) if from_zero else y_low
        if not y_high > y_low:
            y_low, y_high = (
                (y_low, y_low + 1.0) if from_zero else (y_low - abs(y_low) * 0.1 - 1e-9, y_low + abs(y_low) * 0.1 + 1e-9)
            )
        room = 0.06 * (y_high - y_low)
        y_high = y_high + room if highest is None else min(y_high + room, max(highest, y_high))
        return cls(x_low, x_high if x_high > x_low else x_low + 1, y_low if from_zero else y_low - room, y_high)

    def at(self, x: float, y: float) -> Point:
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(self.height - BOTTOM - up * (self.height - TOP - BOTTOM), 1),
        )


def _svg(body: str, *, label: str, height: int = HEIGHT) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{esc(label)}">{body}</svg>'


def _axes(scale: _Scale, *, x_label: str, y_label: str, shown: Callable[[float], str]) -> str:
    bottom = scale.height - BOTTOM
    parts = []
    for value in ticks(scale.y_low, scale.y_high):
        _, y = scale.at(scale.x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{esc(shown(value))}</text>')
    whole = x_label in ("step", "seconds")
    for value in (whole_ticks if whole else ticks)(scale.x_low, scale.x_high):
        x, _ = scale.at(value, scale.y_low)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        told = number(value) if whole else shown(value)
        parts.append(f'<line class="axis" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="{anchor}">{esc(told)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{scale.height - 4}" text-anchor="middle">{esc(x_label)}</text>'
    )
    if y_label:
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text class="label y" transform="translate(9 {middle}) rotate(-90)" text-anchor="middle">{esc(y_label)}</text>'
        )
    return "".join(parts)


def _line(one: Series, found: Sequence[Bucket], scale: _Scale) -> str:
    places = [scale.at(item.x, item.mean) for item in found]
    parts = []
    if any(item.high > item.low for item in found):
        edge = [scale.at(item.x, item.high) for item in found] + [scale.at(item.x, item.low) for item in reversed(found)]
        parts.append(f'<path class="band c{one.colour}" d="{_path(edge)}Z"/>')
    if len(places) > 1:
        parts.append(f'<path class="line{" fine" if len(places) > 60 else ""} c{one.colour}"{_dashed(one)} d="{_path(places)}"/>')
    marked = places if len(places) == 1 or (one.dots and len(places) <= 40) else places[-1:]
    parts += [f'<circle class="dot c{one.colour}" cx="{x}" cy="{y}" r="2.8"/>' for x, y in marked]
    return "".join(parts)


def _hits(lines: Sequence[tuple[Series, Sequence[Bucket]]], scale: _Scale, *, x_label: str, shown: Callable[[float], str]) -> str:
    """Strips over the plot that show a hair line and tell the values there."""
    longest = max((found for _, found in lines), key=len)
    stride = -(-len(longest) // MOST_HITS)
    chosen = longest[::stride] if len(longest) > 1 else longest
    edges = [scale.at(item.x, item.mean)[0] for item in chosen]
    parts = []
    for at, item in enumerate(chosen):
        left = LEFT if at == 0 else (edges[at - 1] + edges[at]) / 2
        right = WIDTH - RIGHT if at == len(chosen) - 1 else (edges[at] + edges[at + 1]) / 2
        told = [f"{x_label} {number(round(item.x))}"]
        for one, found in lines:
            nearest = min(found, key=lambda other, x=item.x: abs(other.x - x))  # type: ignore[misc]
            told.append(f"{one.name}: {shown(nearest.mean)}")
        box = f'x="{left:.1f}" y="{TOP}" width="{max(0.1, right - left):.1f}" height="{scale.height - TOP - BOTTOM}"'
        hair = f'<line x1="{edges[at]}" y1="{TOP}" x2="{edges[at]}" y2="{scale.height - BOTTOM}"/>'
        parts.append(f'<g class="hit"><title>{esc(chr(10).join(told))}</title><rect {box}/>{hair}</g>')
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="line c{one.colour}"{_dashed(one)} x1="1" y1="5" x2="25" '
        f'y2="5"/></svg>{esc(one.name)}</li>'
        for one in series
    )
    return f'<ul class="legend">{items}</ul>'


def _dashed(one: Series) -> str:
    pattern = DASHES[one.dash % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def _whole_percent(value: float) -> str:
    return percent(value, 0)
