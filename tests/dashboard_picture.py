"""The dashboard's own queries as a picture: what Prometheus answers, drawn by the report's charts and a real browser."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser import browse

from job.report.charts import Series, line_chart
from job.report.style import CSS
from job.report.words import esc, number, percent

UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": percent,
    "bytes": lambda value: f"{value / 1e6:,.0f} MB",
    "s": lambda value: f"{number(value)} s",
}


def write_picture(
    target: Path, panels: dict[str, list[tuple[str, str, str, dict[str, str]]]], ask: Callable[[str], list[dict[str, Any]]]
) -> int:
    """Draws every panel into a PNG. Args: ask: range query -> Prometheus' result. Returns: how many panels show a value."""
    parts, filled = [], 0
    for row, entries in panels.items():
        cards = []
        for title, kind, unit, queries in entries:
            shown = UNITS.get(unit, number)
            series = [
                Series(_name(name, found["metric"]), _points(found["values"]), colour=at % 8)
                for at, (name, found) in enumerate((name, found) for name, query in queries.items() for found in ask(query))
            ]
            series = [one for one in series if one.points]
            filled += bool(series)
            if kind == "timeseries":
                content = line_chart(series, label=title, x_label="seconds", shown=shown)
            else:
                values = [f"<span>{esc(one.name)}</span> <strong>{esc(shown(one.points[-1][1] or 0.0))}</strong>" for one in series]
                content = f"<div class='tile'>{'<br>'.join(values)}</div>"
            cards.append(f"<div class='card'><h3>{esc(title)}</h3>{content}</div>")
        parts.append(f"<h2>{esc(row)}</h2><div class='grid2'>{''.join(cards)}</div>")
    page = target.with_suffix(".html")
    page.write_text(f"<!doctype html><meta charset='utf-8'><style>{CSS}</style><main>{''.join(parts)}</main>", encoding="utf-8")
    browse(page, f"--screenshot={target}", width=1100, height=3900)
    return filled


def _points(values: list[list[Any]]) -> list[tuple[float, float | None]]:
    start = values[0][0] if values else 0.0
    found = [(float(at) - float(start), float(value)) for at, value in values]
    return [(at, value) for at, value in found if math.isfinite(value)]


def _name(template: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        template = template.replace("{{" + label + "}}", value)
    return template
