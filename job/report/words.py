"""Numbers and names as people read them, safe to stand in HTML."""

import html
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from job.config import starts_random

METRICS = {
    "image_retrieval_recall@1": "text -> image, recall@1",
    "image_retrieval_recall@5": "text -> image, recall@5",
    "image_retrieval_recall@10": "text -> image, recall@10",
    "image_retrieval_median_rank": "text -> image, median rank",
    "text_retrieval_recall@1": "image -> text, recall@1",
    "text_retrieval_recall@5": "image -> text, recall@5",
    "text_retrieval_recall@10": "image -> text, recall@10",
    "text_retrieval_median_rank": "image -> text, median rank",
    "mean_recall": "mean of the six recalls",
    "right_caption_probability": "probability of the right caption",
    "guard_image_retrieval_recall@5": "guard: text -> image, recall@5",
    "guard_text_retrieval_recall@5": "guard: image -> text, recall@5",
    "guard_mean_recall": "guard: mean of the six recalls",
    "ece": "calibration error (ECE)",
    "acc1": "right class first",
    "acc5": "right class among the first 5",
    "mean_per_class_recall": "mean per-class recall",
    "mean_average_precision": "mean average precision",
}
"""In the order in which they are shown; others follow under their own names."""


def model_of(settings: Mapping[str, Any]) -> str:
    """The model as a person calls it, with its first weights. Args: settings: of the run."""
    weights, source = str(settings.get("pretrained") or ""), settings.get("init_from")
    if source:
        return f"the model of the run {last_part(source)}"
    if "/" in weights.rstrip("/") and not weights.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")):
        return f"the model in {last_part(weights)}"  # a folder, which has its own config
    model = last_part(str(settings.get("model", "?")))
    if not weights and not starts_random(settings):
        return model
    return f"{model} ({last_part(weights) if weights else 'random weights'})"


def esc(text: Any) -> str:
    """Text for HTML, in element or attribute. What UTF-8 can't hold becomes a question mark."""
    return html.escape(str(text).encode(errors="replace").decode().replace("\0", "�"), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if not is_number(value) else f"{100 * float(value or 0):.{digits}f}\u202f%"


def points(before: float | None, after: float | None) -> str:
    """The difference in percentage points, with its sign."""
    if not (is_number(before) and is_number(after)):
        return "–"
    change = 100 * (float(after or 0) - float(before or 0))
    return f"{'+' if change > 0 else '−' if change < 0 else '±'}{abs(change):.1f}"


def number(value: float | None) -> str:
    """Four digits are enough for a chart or a table."""
    if not is_number(value):
        return "–"
    value = float(value or 0)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3e}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f}\u202fs" if seconds < 10 else f"{seconds:.0f}\u202fs"
    if seconds < 7200:
        return f"{seconds / 60:.0f}\u202fmin"
    return f"{seconds / 3600:.1f}\u202fh" if seconds < 172800 else f"{seconds / 86400:.1f}\u202fdays"


def moment(seconds: float | None) -> str:
    """A time since 1970 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if is_number(seconds) and seconds else "–"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_name(name: str) -> str:
    """As a page shows it."""
    words = METRICS.get(name, name).replace("->", "→")
    return words[:1].upper() + words[1:]


def in_order(names: set[str]) -> list[str]:
    """Metrics as tables list them."""
    return [name for name in METRICS if name in names] + sorted(names - METRICS.keys())


def last_part(uri: str) -> str:
    """The name by which a person calls a file or run."""
    return uri.rstrip("/").rsplit("/", 1)[-1] or uri
