"""Several runs side by side: as a table for a terminal, as JSON, as a page."""

from collections.abc import Sequence
from typing import Any

from job.report.charts import DASHES, Series, line_chart
from job.report.facts import PLACES, RunFacts
from job.report.page import document
from job.report.words import duration, esc, is_number, last_part, model_of, moment, number, percent

SCORES = ("image_retrieval_recall@1", "image_retrieval_recall@5", "text_retrieval_recall@1", "text_retrieval_recall@5")
GUARD_SCORES = ("guard_image_retrieval_recall@5", "guard_text_retrieval_recall@5")
"""Shown if any of the runs has a guard."""
COLOURS = 8
MOST_POINTS = 80
"""Of one curve among several."""
PROBABLY_THE_SAME = (*PLACES, "metrics_port", "metrics_textfile", "log_every", "scratch_limit", "keep_staged")
"""Settings that decide nothing about a model."""


def rows_of(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """One JSON object per run, the best score first; runs without any score last.

    "settings" holds those in which the runs differ; "before" and "after" the recalls of the base and of the exported model.
    """
    differing = differing_settings(runs)
    rows = [
        {
            "run": facts.uri,
            "name": name,
            "model": model_of(facts.settings),
            "complete": facts.result is not None,
            "step": facts.step,
            "settings": {setting: facts.settings.get(setting) for setting in differing},
            "before": {score: facts.before[score] for score in (*SCORES, *GUARD_SCORES) if score in facts.before},
            "after": {score: facts.after[score] for score in (*SCORES, *GUARD_SCORES) if score in facts.after},
            "score": facts.after.get("mean_recall"),
            "export": facts.result["export"] if facts.result else None,
            "export_step": facts.export_step,
            "samples_per_second": facts.result["samples_per_second"] if facts.result else None,
            "seconds": round(facts.seconds, 3),
        }
        for facts, name in zip(runs, short_names(runs), strict=True)
    ]
    return sorted(rows, key=lambda row: (not is_number(row["score"]), -(row["score"] or 0.0)))


def differing_settings(runs: Sequence[RunFacts]) -> list[str]:
    """Names of settings that are not the same in all runs, in the order of the config."""
    names = list(dict.fromkeys(name for facts in runs for name in facts.settings if name not in PROBABLY_THE_SAME))
    return [name for name in names if len({repr(facts.settings.get(name)) for facts in runs}) > 1]


def short_names(runs: Sequence[RunFacts]) -> list[str]:
    """What tells the runs apart: the ends of their URIs, as long as needed."""
    parts = [facts.uri.rstrip("/").split("/") for facts in runs]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({at})" for at, name in enumerate(names, start=1)]


def _shown_scores(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Of all runs and of the guard, if there is one: score -> head of its column."""
    scores = dict(zip(SCORES, ("text→image @1", "@5", "image→text @1", "@5"), strict=True))
    guarded = any(score in row["after"] for row in rows for score in GUARD_SCORES)
    return scores, dict(zip(GUARD_SCORES, ("guard: text→image @5", "image→text @5"), strict=True)) if guarded else {}


def to_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    settings = list(rows[0]["settings"]) if rows else []
    scores, guard = _shown_scores(rows)
    shown = scores | guard
    head = ["run", *settings, "step", *shown.values(), "export", "samples/s"]
    lines = [head]
    for row in rows:
        recalls = [_before_after(row, score) for score in shown]
        rate = row["samples_per_second"]
        export = "–" if row["export"] is None else f"{last_part(row['export'])}, step {row['export_step']}"
        step = f"{row['step']}" if row["complete"] else f"{row['step']} …"
        lines.append(
            [row["name"], *map(_setting, row["settings"].values()), step, *recalls, export, f"{rate:.0f}" if rate else "–"]
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _before_after(row: dict[str, Any], score: str) -> str:
    before, after = (f"{row[when][score]:.3f}" if score in row[when] else "–" for when in ("before", "after"))
    return f"{before} → {after}"


def _setting(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if "/" not in text else last_part(text)


def render(runs: Sequence[RunFacts]) -> str:
    """The page of several runs, as HTML."""
    rows = rows_of(runs)
    of_uri = {name: facts for facts, name in zip(runs, short_names(runs), strict=True)}
    ordered = [of_uri[row["name"]] for row in rows]
    best = next((row for row in rows if is_number(row["score"])), None)
    lead = f"{len(rows)} runs, the best score first."
    if best:
        lead = f"Of {len(rows)} runs, <b>{esc(best['name'])}</b> scores best: {percent(best['score'])}, the mean of six recalls."
    body = (
        f'<div class="over"><span>clipjob report</span></div><h1>{len(rows)} runs</h1><p class="lead">{lead}</p>'
        f'<div class="card wide scroll">{_table(rows)}</div><h2>Training</h2><div class="grid2">{_charts(ordered, rows)}</div>'
        f"<footer>{'<br>'.join(esc(row['run']) for row in rows)}<br>Made {moment(runs[0].made_at)}</footer>"
    )
    return document(f"{len(rows)} runs – clipjob report", body)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    settings = list(rows[0]["settings"])
    scores, guard = _shown_scores(rows)
    recalls = [word.replace("→", " → ").capitalize() for word in (*scores.values(), "mean recall", *guard.values())]
    words = ["Step", *recalls, "Samples/s", "Time"]
    head = (
        "<th>Run</th>"
        + "".join(f"<th>{esc(name)}</th>" for name in settings)
        + "".join(f'<th class="n">{word}</th>' for word in words)
    )
    body = []
    for at, row in enumerate(rows):
        dot = f'<span class="swatch c{at % COLOURS}" style="display:inline-block;margin-right:8px"></span>'
        cells = [
            number(row["step"]) + ("" if row["complete"] else " …"),
            *(percent(row["after"].get(score)) for score in scores),
            f"<b>{percent(row['score'])}</b>",
            *(percent(row["after"].get(score)) for score in guard),
            number(row["samples_per_second"] and round(row["samples_per_second"], 1)),
            duration(row["seconds"]),
        ]
        chosen = "".join(f"<td>{esc(_setting(value))}</td>" for value in row["settings"].values())
        body.append(
            f"<tr><td class=who>{dot}{esc(row['name'])}</td>{chosen}{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _charts(runs: Sequence[RunFacts], rows: Sequence[dict[str, Any]]) -> str:
    def lines(of: Any, *, dots: bool) -> list[Series]:
        return [
            Series(row["name"], of(facts), at % COLOURS, at // COLOURS % len(DASHES), dots=dots)
            for at, (facts, row) in enumerate(zip(runs, rows, strict=True))
        ]

    def recall(name: str) -> str:
        found = lines(lambda facts: [(row["step"], row.get(name)) for row in facts.evaluations], dots=True)
        return line_chart(found, label="Recall over steps", shown=lambda value: percent(value, 0), from_zero=True, highest=1.0)

    loss = lines(lambda facts: [(row["step"], row.get("loss")) for row in facts.steps], dots=False)
    charts = [
        ("Loss", line_chart(loss, label="Loss over steps", y_label="loss", most=MOST_POINTS)),
        ("Text → image, recall@5", recall("image_retrieval_recall@5")),
        ("Image → text, recall@5", recall("text_retrieval_recall@5")),
        ("Mean recall", recall("mean_recall")),
    ]
    return "".join(f'<div class="card"><h3>{title}</h3>{chart}</div>' for title, chart in charts)
