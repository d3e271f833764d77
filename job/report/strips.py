"""Horizontal bars as SVG in shares of the page's width, so that they fit a phone without smaller letters."""

from collections.abc import Sequence
from typing import Any

from job.report.charts import whole_ticks
from job.report.facts import RunFacts
from job.report.words import duration, esc, moment, number, percent

STATES = {
    "productive": ("training steps", 0),
    "data_wait": ("waiting for data", 1),
    "checkpoint_stall": ("saving checkpoints", 3),
    "evaluate": ("evaluating", 2),
    "startup": ("starting", 5),
    "staging": ("fetching data", 4),
    "restore": ("restoring", 6),
    "recompute": ("steps done again", 7),
}
"""State of the ledger -> words, colour."""
MOST_ATTEMPTS = 40
MOST_MARKS = 200
RIGHT_END_CODES = (0, 75)


def time_bar(facts: RunFacts) -> str:
    """Where the time of all attempts went: one bar, and a legend with shares."""
    seconds = facts.ledger.get("seconds", {})
    total = sum(seconds.values())
    if not total:
        return '<p class="nothing">Nothing is known of the time yet.</p>'
    order = [*STATES, *sorted(seconds.keys() - STATES.keys())]
    shares = [(name, seconds.get(name, 0.0) / total) for name in order if seconds.get(name, 0.0) > 0]
    at, parts = 0.0, []
    for name, share in shares:
        words, colour = STATES.get(name, (name.replace("_", " "), 5))
        told = f"{words}: {duration(seconds[name])}, {percent(share)}"
        parts.append(
            f'<rect class="piece c{colour}" x="{100 * at:.3f}%" width="{100 * share:.3f}%" height="26">'
            f"<title>{esc(told)}</title></rect>"
        )
        at += share
    legend = "".join(
        f'<li><span class="swatch c{STATES.get(name, ("", 5))[1]}"></span><span>{esc(STATES.get(name, (name, 5))[0])}</span>'
        f"<b>{percent(share)}</b><i>{duration(seconds[name])}</i></li>"
        for name, share in sorted(shares, key=lambda item: -item[1])
    )
    label = "Where the time went: " + ", ".join(f"{STATES.get(name, (name, 5))[0]} {percent(share)}" for name, share in shares)
    bar = f'<svg class="strip" width="100%" height="26" role="img" aria-label="{esc(label)}">{"".join(parts)}</svg>'
    return f'{bar}<ul class="shares">{legend}</ul>'


def time_line(facts: RunFacts) -> str:
    """Which attempt did which steps, where it was evaluated and saved, and how each attempt ended."""
    last = max(facts.planned or 0, facts.step, 1)
    best = facts.result["best_step"] if facts.result else None
    rows = []
    if facts.evaluations:
        steps = [row["step"] for row in facts.evaluations]
        rows.append(_row("Evaluations", _marks(steps, last, "evaluation", best=best), f"{len(steps)}"))
    if facts.checkpoints:
        rows.append(_row("Checkpoints kept", _marks(facts.checkpoints, last, "checkpoint", best=best), f"{len(facts.checkpoints)}"))
    for item in facts.attempts[-MOST_ATTEMPTS:]:
        newest = item is facts.attempts[-1]
        code, reason = how_it_ended(item, newest=newest, complete=facts.result is not None)
        rows.append(_row(f"Attempt {item['attempt']}", _attempt(item, last, reason), code))
    left_out = len(facts.attempts) - MOST_ATTEMPTS
    note = f'<p class="note">The {left_out} attempts before are not drawn.</p>' if left_out > 0 else ""
    return f'<div class="timeline">{"".join(rows)}{_row("", _step_axis(last), "", plain=True)}</div>{note}'


def how_it_ended(item: dict[str, Any], *, newest: bool, complete: bool) -> tuple[str, str]:
    """(exit code, why) of an attempt, as text."""
    end = item["end"]
    if end:
        return f"exit {end.get('exit_code')}", str(end.get("reason", ""))
    if newest and complete:
        return "exit 0", "complete"
    return ("–", "running, or killed") if newest else ("killed", "killed: it could not say why")


def attempts_table(facts: RunFacts) -> str:
    """When, where and how each attempt ran."""
    rows = []
    for item in facts.attempts[-MOST_ATTEMPTS:]:
        code, reason = how_it_ended(item, newest=item is facts.attempts[-1], complete=facts.result is not None)
        steps = "none" if item["first"] is None else f"{number(item['first'])} – {number(item['last'])}"
        where = f"{item.get('host', '?')}, {item.get('device', '?')}" + (f" × {item['ranks']}" if item.get("ranks", 1) > 1 else "")
        cells = (
            item["attempt"],
            moment(item.get("started_at")),
            moment((item["end"] or {}).get("ended_at")),
            steps,
            where,
            f"{code}: {reason}" if reason else code,
        )
        rows.append("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("Attempt", "Started", "Ended", "Steps kept", "Where", "How it ended"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(label: str, svg: str, told: str, *, plain: bool = False) -> str:
    height = 22
    return (
        f'<span class="who">{esc(label)}</span>'
        f'<svg class="strip{" plain" if plain else ""}" width="100%" height="{height}">{svg}</svg>'
        f'<span class="code">{esc(told)}</span>'
    )


def _attempt(item: dict[str, Any], last: int, reason: str) -> str:
    start, reached = item["from"], item["reached"]
    kept = item["last"] or start
    if reached <= start:
        place = _at(start, last)
        return f'<rect class="piece c5" x="{place}" y="5" width="2" height="12"><title>{esc("no step; " + reason)}</title></rect>'
    steps = f"steps {start + 1} to {kept}" if kept > start else "no step that was kept"
    told = f"attempt {item['attempt']}: {steps}; {reason}"
    bar = (
        f'<rect class="piece c0" x="{_at(start, last)}" y="5" width="{_at(kept - start, last)}" height="12" rx="2">'
        f"<title>{esc(told)}</title></rect>"
    )
    if reached <= kept:
        return bar
    lost = f"steps {kept + 1} to {reached} were not saved and had to be done again"
    return (
        f'{bar}<rect class="piece lost" x="{_at(kept, last)}" y="5" width="{_at(reached - kept, last)}" height="12">'
        f"<title>{esc(lost)}</title></rect>"
    )


def _marks(steps: Sequence[int], last: int, what: str, *, best: int | None) -> str:
    """Diamonds for evaluations, squares for checkpoints, the best one ringed."""
    chosen = [*steps[:: -(-len(steps) // MOST_MARKS)], *(step for step in steps if step == best)]
    shape = "M0 -5L5 0L0 5L-5 0Z" if what == "evaluation" else "M-4 -4H4V4H-4Z"
    parts = []
    for step in dict.fromkeys(chosen):
        is_best = step == best
        ring = '<circle class="ring" r="8.5"/>' if is_best else ""
        told = f"{what} at step {step}{', the best' if is_best else ''}"
        colour = 2 if what == "evaluation" else 3
        parts.append(
            f'<svg x="{_at(step, last)}" y="11" overflow="visible"><g><title>{esc(told)}</title>'
            f'<path class="piece c{colour}" d="{shape}"/>{ring}</g></svg>'
        )
    return "".join(parts)


def _step_axis(last: int) -> str:
    parts = []
    for value in whole_ticks(0, last, 3):
        anchor = "start" if value == 0 else "end" if value > 0.96 * last else "middle"
        parts.append(
            f'<text class="tick" x="{_at(value, last)}" y="14" text-anchor="{anchor}">'
            f"{'step ' if not value else ''}{number(value)}</text>"
        )
    return "".join(parts)


def _at(step: float, last: int) -> str:
    return f"{100 * step / last:.3f}%"
