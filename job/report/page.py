"""The page of one run. It asks for nothing from outside: its policy forbids that, scripts included."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.report.charts import Series, line_chart, reliability_chart
from job.report.facts import RunFacts
from job.report.looks import cards
from job.report.strips import attempts_table, time_bar, time_line
from job.report.style import CSS
from job.report.words import duration, esc, in_order, is_number, last_part, metric_name, model_of, moment, number, percent, points

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
RATE_STEPS, MOST_RATES = 5, 120
TILES = ("image_retrieval_recall@5", "text_retrieval_recall@5", "right_caption_probability")


def document(title: str, body: str) -> str:
    """A whole HTML page. Args: body: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{CSS}</style></head>'
        f"\n<body><main>\n{body}\n</main></body></html>\n"
    )


def render(facts: RunFacts) -> str:
    """The report of one run, as HTML."""
    sections = [
        _head(facts),
        _scores(facts),
        _curves(facts),
        _gallery(facts),
        _mistakes(facts),
        _reliability(facts),
        _time(facts),
        _settings(facts),
        _loading(facts),
        _foot(facts),
    ]
    return document(f"{last_part(facts.uri)} – clipjob report", "\n".join(section for section in sections if section))


def _head(facts: RunFacts) -> str:
    done = facts.result is not None
    pill = (
        '<span class="pill done">complete</span>' if done else f'<span class="pill">not complete: step {number(facts.step)}</span>'
    )
    title = f'<div class="over"><span>clipjob report</span>{pill}</div><h1>{esc(last_part(facts.uri))}</h1>'
    return f"<header>{title}{_lead(facts)}{_tiles(facts)}</header>"


def _lead(facts: RunFacts) -> str:
    entries = (facts.data.get("lmdb") or {}).get("entries")
    data = f"{last_part(str(facts.settings.get('csv', '?')))}{f' ({number(entries)} images)' if entries else ''}"
    attempts = "one attempt" if len(facts.attempts) == 1 else f"{len(facts.attempts)} attempts"
    steps = "one step" if facts.step == 1 else f"{number(facts.step)} steps"
    trained = f"{esc(model_of(facts.settings))}, fine-tuned on {esc(data)} for {steps} in {attempts}."
    name = "image_retrieval_recall@5"
    before, after = facts.before.get(name), facts.after.get(name)
    gained = " Nothing was held out, so what it gained is not known." if not facts.evaluations else ""
    if is_number(before) and is_number(after):
        among = (facts.gallery or {}).get("of_images")
        gained = (
            f" Asked for the image of a held-out caption{f' among {number(among)} images' if among else ''}, it has the "
            f"right one in its first five answers in <b>{percent(after)}</b> of cases; before, in {percent(before)}."
        )
    return f'<p class="lead">{trained}{gained}</p>'


def _tiles(facts: RunFacts) -> str:
    tiles = []
    for name in TILES:
        before, after = facts.before.get(name), facts.after.get(name)
        if is_number(after):
            change = _change(before, after)
            tiles.append(
                f"<span>{esc(metric_name(name))}</span><strong>{percent(after)}</strong>"
                f"<em>from {percent(before)} &ensp;{change}</em>"
            )
    if facts.seconds:
        spent = f"of {duration(facts.seconds)} went into steps that counted"
        tiles.append(f"<span>Goodput</span><strong>{percent(facts.goodput, 0)}</strong><em>{spent}</em>")
    rate = facts.result["samples_per_second"] if facts.result else None
    if rate and len(tiles) < 4:
        tiles.append(f"<span>Throughput</span><strong>{number(round(rate, 1))}</strong><em>samples/s (median)</em>")
    return f'<div class="tiles">{"".join(f"<div class=tile>{tile}</div>" for tile in tiles)}</div>' if tiles else ""


def _change(before: Any, after: Any) -> str:
    better = is_number(before) and after > before
    same = not is_number(before) or after == before
    return f'<span class="delta{"" if same else " up" if better else " down"}">{points(before, after)}</span>'


def _scores(facts: RunFacts) -> str:
    if not facts.after:
        return ""
    last = (
        facts.result["after"]
        if facts.result and facts.export_name == "best" and facts.export_step != facts.result["step"]
        else None
    )
    head = "".join(f'<th class="n">{words}</th>' for words in ("Base", "Exported", "Points", *(["Last step"] if last else [])))
    rows = []
    for name in in_order(set(facts.after)):
        before, after = facts.before.get(name), facts.after[name]
        show = percent if (is_number(after) and 0 <= after <= 1) else number
        cells = [show(before), show(after), _change(before, after), *([show(last.get(name))] if last else [])]
        rows.append(f"<tr><td>{esc(metric_name(name))}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>")
    step = f" The exported model is the one after step {number(facts.export_step)}." if facts.export_step is not None else ""
    return (
        f'<h2>Held-out scores</h2><p class="note">Base: the model before training.{step} recall@k: how often a right answer '
        f'is among the first k.</p><div class="card wide scroll"><table><thead><tr><th>Score</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(facts: RunFacts) -> str:
    batch = facts.settings.get("global_batch_size", 0)
    loss = [(row["step"], row.get("loss")) for row in facts.steps]
    odd = sum(not is_number(value) for _, value in loss)
    note = f'<p class="note">{number(odd)} steps without a finite loss are left out; they changed no weights.</p>' if odd else ""
    charts = [("Loss", line_chart([Series("loss", loss)], label="Loss over steps", y_label="loss") + note)]
    if facts.evaluations:
        lines = [
            Series("text → image, recall@5", _over_steps(facts, "image_retrieval_recall@5"), 0, 0, dots=True),
            Series("image → text, recall@5", _over_steps(facts, "text_retrieval_recall@5"), 1, 0, dots=True),
            Series("text → image, recall@1", _over_steps(facts, "image_retrieval_recall@1"), 0, 1, dots=True),
            Series("image → text, recall@1", _over_steps(facts, "text_retrieval_recall@1"), 1, 1, dots=True),
        ]
        charts.append(("Held-out recall", _share_chart(lines, label="Held-out recall over steps")))
        if any("guard_mean_recall" in row for row in facts.evaluations):
            kept = [
                Series("text → image, recall@5", _over_steps(facts, "guard_image_retrieval_recall@5"), 0, 0, dots=True),
                Series("image → text, recall@5", _over_steps(facts, "guard_text_retrieval_recall@5"), 1, 0, dots=True),
            ]
            charts.append(("Recall on the guard: what it has not forgotten", _share_chart(kept, label="Guard recall over steps")))
        right = [Series("probability", _over_steps(facts, "right_caption_probability"), 2, 0, dots=True)]
        charts.append(
            ("Probability of the right caption", _share_chart(right, label="Probability of the right caption over steps"))
        )
    speed = line_chart(
        [Series("samples/s", rates_of(facts.steps, batch), 5)], label="Throughput over steps", y_label="samples/s", from_zero=True
    )
    charts.append(("Throughput", speed))
    shown = "".join(f'<div class="card"><h3>{title}</h3>{chart}</div>' for title, chart in charts)
    return f'<h2>Training</h2><div class="grid2">{shown}</div>'


def rates_of(rows: Sequence[Mapping[str, Any]], batch: int) -> list[tuple[float, float | None]]:
    """(step, samples/s) over RATE_STEPS steps or more at a time: a save makes one row's time longer and the next one's shorter."""
    size = max(RATE_STEPS, -(-len(rows) // MOST_RATES))
    found: list[tuple[float, float | None]] = []
    for start in range(0, len(rows), size):
        share = rows[start : start + size]
        if len(share) < min(size, len(rows)) / 2:
            break
        seconds = sum(row.get("seconds") or 0.0 for row in share)
        found.append((share[-1]["step"], batch * len(share) / seconds if seconds else None))
    return found


def _share_chart(lines: list[Series], *, label: str) -> str:
    return line_chart(
        lines, label=label, shown=lambda value: percent(value, 0 if value >= 0.1 or not value else 1), from_zero=True, highest=1.0
    )


def _over_steps(facts: RunFacts, name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row.get(name)) for row in facts.evaluations]


def _reliability(facts: RunFacts) -> str:
    found: Mapping[str, Any] = (facts.gallery or {}).get("reliability") or {}
    if not found or not facts.gallery:
        return ""
    names = {"before": ("before", 5, 1), "after": ("after", 0, 0)}
    curves = [
        (Series(f"{words}: calibration error {percent(found[name]['ece'])}", [], colour, dash), found[name])
        for name, (words, colour, dash) in names.items()
    ]
    asked = f"{number(facts.gallery['images'])} held-out images, each against {number(facts.gallery['candidates'])} captions"
    hits = [percent(found[name]["accuracy"]) for name in names]
    return (
        '<h2>How far its probabilities can be trusted</h2><div class="grid2"><div class="card">'
        f"{reliability_chart(curves, label='Reliability before and after')}</div>"
        f'<div class="card"><h3>How to read it</h3><p>{asked}. {_HOW_TO_READ}</p><p class="note">{_WHAT_IT_IS}</p>'
        f"<p>Preferred caption right: {hits[0]} before, <b>{hits[1]}</b> after.</p></div></div>"
    )


_HOW_TO_READ = (
    "They are put into 15 groups by the probability that the model gives to the caption it prefers. On the dotted line, a model "
    "that says 70\u202f% is right in 70\u202f% of cases; below it, it is too sure of itself. "
    "The size of a dot is the number of images."
)
_WHAT_IT_IS = (
    "The probability is a softmax over these captions at the model's own <code>logit_scale</code>, so it depends on how many and "
    "how similar they are. Calibration error: the mean distance from the line (ECE)."
)


def _gallery(facts: RunFacts) -> str:
    gallery = facts.gallery
    if not gallery or not gallery["gallery"]:
        return _no_gallery(facts)
    note = (
        f"{len(gallery['gallery'])} held-out images, picked by a hash of their names, and the captions that the model prefers "
        f"among {number(gallery['candidates'])}. A right one is marked ✓; rank is the place of the right one among all."
    )
    shown = cards(gallery["gallery"], gallery["texts"], candidates=gallery["candidates"])
    return f'<h2>Held-out images, before and after</h2><p class="note">{note}</p>{shown}'


def _no_gallery(facts: RunFacts) -> str:
    if not facts.evaluations:
        why = "Nothing was held out, so there is nothing to look at. --val-fraction or --val-csv holds images out."
    elif facts.result:
        why = "The run has no pictures of held-out images: none could be decoded, or the log says why they could not be made."
    else:
        why = "Pictures come when the run is complete."
    return f'<h2>Held-out images, before and after</h2><p class="note">{why}</p>'


def _mistakes(facts: RunFacts) -> str:
    gallery = facts.gallery
    if not gallery or not gallery["mistakes"]:
        return ""
    note = "Those whose right caption comes last after training. A wrong caption in the data shows here first."
    shown = cards(gallery["mistakes"], gallery["texts"], candidates=gallery["candidates"])
    return f'<h2>Worst mistakes</h2><p class="note">{note}</p>{shown}'


def _time(facts: RunFacts) -> str:
    ledger = facts.ledger
    counts = "No restarts."
    if ledger.get("restarts"):
        counts = (
            f"Restarts: {number(ledger['restarts'])}, after a signal {number(ledger.get('preemptions', 0))} of them. "
            f"Steps lost and done again: {number(ledger.get('lost_steps', 0))}."
        )
    return (
        f'<h2>Time</h2><p class="note">{counts}</p><div class="card wide"><h3>Where {duration(facts.seconds)} went</h3>'
        f'{time_bar(facts)}</div><div class="card wide"><h3>Attempts</h3>{time_line(facts)}'
        f"<details><summary>When and where</summary>{attempts_table(facts)}</details></div>"
    )


def _settings(facts: RunFacts) -> str:
    rows = "".join(
        f"<tr><td><code>{esc(name)}</code></td><td>{_value(value)}</td><td>{_value(default)}</td></tr>"
        for name, (value, default) in facts.changed().items()
    )
    head = "<th>Setting</th><th>This run</th><th>Default</th>"
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    places = "".join(
        f"<tr><td><code>{name}</code></td><td>{_value(facts.settings[name])}</td></tr>"
        for name in ("csv", "lmdb", "val_csv", "val_lmdb", "init_from")
        if facts.settings.get(name)
    )
    data = f'<details><summary>Where the data came from</summary><div class="scroll"><table>{places}</table></div></details>'
    note = '<p class="note">Where the default is auto or 0, the job may have chosen the value itself.</p>'
    return f'<h2>Settings that differ from the defaults</h2>{note}<div class="card wide">{table}{data}</div>'


def _value(value: Any) -> str:
    return (
        "<i>empty</i>"
        if value == ""
        else esc(value if isinstance(value, str | bool) else f"{value:g}" if isinstance(value, float) else value)
    )


def _loading(facts: RunFacts) -> str:
    if not facts.result:
        return ""
    export = f"{facts.uri}/export/{facts.export_name}"
    local = "://" not in export
    folder = export if local else "FOLDER"
    copy = "" if local else f'<p class="note">Copy <code>{esc(export)}</code> to a local FOLDER first.</p>'
    code = (
        "import open_clip\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
    )
    return f"<h2>Use the model</h2>{copy}<pre>{esc(code)}</pre>"


def _foot(facts: RunFacts) -> str:
    versions: dict[str, str] = next((item["versions"] for item in reversed(facts.attempts) if item.get("versions")), {})
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"<footer>{esc(facts.uri)}<br>Made {moment(facts.made_at)}{f' · {esc(with_what)}' if with_what else ''}</footer>"
