"""The model card: where an exported model comes from, what it scores, and how to load it. Names no path of this machine."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.config import FIELDS, is_auto
from job.evaluate.alpha import GUARD_LIMIT, Scored
from job.evaluate.calibration import Calibration
from job.evaluate.retrieval import recall_at_5
from job.evaluate.select import Chosen
from job.fields import AUTO, flag
from job.model.build import CONFIG_FILE, WEIGHTS_FILE
from job.report.words import METRICS, model_of

MODEL_FILE = "clipjob-model.json"
"""Beside a single weights file: the model's config, as open_clip takes it."""
SHOWN = tuple(name for name in METRICS if "retrieval" in name)

_NO_RECIPE = (
    *("model", "pretrained", "init_from"),  # told elsewhere
    *("csv_separator", "image_column", "caption_column", "key_prefix", "evaluate_every", "torch_threads"),  # taught it nothing
)

_HEAD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- open_clip
---
"""


def model_card(
    chosen: Chosen,
    *,
    alpha: float,
    why: str,
    scored: Sequence[Scored],
    data: Mapping[str, str],
    calibrations: Sequence[Calibration],
    single_file: bool,
) -> str:
    """Markdown, with the header that the Hugging Face hub reads.

    Args:
        why: how alpha was chosen, one sentence. scored: what was scored on the way; may be empty.
        data: names of the validation and guard data that were scored. calibrations: empty, or before and after.
        single_file: the weights lie alone, without their config.
    """
    settings = chosen.settings
    base = model_of(settings)
    lines = [f"{_HEAD}# {base}, fine-tuned", ""]
    lines += [f"Fine-tuned by `clipjob` {chosen.stored.get('version', '')} from {base}; weights of the run: {chosen.label}.", ""]
    lines += ["## Scores", "", *_scores(chosen, alpha=alpha, scored=scored, data=data), ""]
    lines += ["## Interpolation", "", f"alpha = {alpha:g}: {_share(alpha)} {why}", ""]
    if len(scored) > 2:
        lines += [f"Recall@5, mean of both ways; the guard may lose {GUARD_LIMIT:g}:", "", *_sweep_table(scored, alpha), ""]
    if calibrations:
        before, after = calibrations
        lines += [
            "## Calibration",
            "",
            f"logit_scale was set from {before.logit_scale:.4g} to {after.logit_scale:.4g}: there the right texts of the",
            f"validation images are most probable. Calibration error (ECE) {before.ece:.4f} -> {after.ece:.4f},",
            f"NLL {before.nll:.4f} -> {after.nll:.4f}. {after.warning()}".rstrip(),
            "",
        ]
    lines += ["## How to load it", "", *_loading(chosen, single_file=single_file), ""]
    lines += ["## Data", "", *_data(chosen), "", "## Recipe", "", *_recipe(settings), ""]
    lines += [
        "## Licence",
        "",
        "Not stated here. The licence of the base model's weights and the terms of the training data both bear on these weights:",
        "check both before you pass them on, and name the licence in the header of this file.",
        "",
    ]
    return "\n".join(lines)


def own_scores(chosen: Chosen) -> tuple[dict[str, float], dict[str, float]]:
    """What the run's own evaluation found at step 0 and at these weights; empty where it has none."""
    if chosen.run is None:
        return {}, {}
    rows = {row["step"]: row for row in chosen.run.read_history() if row.get("kind") == "evaluation"}
    result = chosen.run.result() or {}
    steps = {"best": result.get("best_step"), "final": result.get("step")}
    step = steps[chosen.label] if chosen.label in steps else int(chosen.label.removeprefix("step-"))
    return rows.get(0, {}), rows.get(step, {})


def _share(alpha: float) -> str:
    if alpha == 1:
        return "these are the tuned weights."
    if alpha == 0:
        return "these are the base model's weights."
    return f"each weight is {1 - alpha:.3g} of the base model's and {alpha:.3g} of the tuned one's."


def _scores(chosen: Chosen, *, alpha: float, scored: Sequence[Scored], data: Mapping[str, str]) -> list[str]:
    by_alpha = {row.alpha: row for row in scored}
    found = []
    for kind, name in data.items():
        before, after = getattr(by_alpha[0.0], kind), getattr(by_alpha[alpha], kind)
        found.append((f"{name} ({kind})", before, after))
    if not scored:
        before, after = own_scores(chosen)
        found = [("held-out part of the data", before, after)] if after else []
    lines = []
    for name, before, after in found:
        lines += [f"| {name} | base | {'exported' if scored or alpha == 1 else 'tuned'} |", "|---|---|---|"]
        known = [metric for metric in SHOWN if metric in after]
        lines += [f"| {METRICS[metric]} | {_number(before, metric)} | {_number(after, metric)} |" for metric in known]
        lines.append("")
    if not scored and 0 <= alpha < 1:
        lines.append("The exported mix itself was not scored: `clipjob evaluate` does that.")
    return lines or ["None were measured."]


def _number(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:.4g}" if name in scores else ""


def _sweep_table(scored: Sequence[Scored], alpha: float) -> list[str]:
    lines = ["| alpha | validation | guard |", "|---|---|---|"]
    for row in scored:
        values = [f"{recall_at_5(scores):.4f}" if scores else "" for scores in (row.validation, row.guard)]
        mark = "**" if row.alpha == alpha else ""
        lines.append(f"| {mark}{row.alpha:g}{mark} | {values[0]} | {values[1]} |")
    return lines


def _loading(chosen: Chosen, *, single_file: bool) -> list[str]:
    if not single_file:
        return [
            "```python",
            "import open_clip",
            "",
            'name = "local-dir:FOLDER"  # this folder; or "hf-hub:OWNER/NAME", once its files are in a repository there',
            "model, _, preprocess = open_clip.create_model_and_transforms(name)",
            "tokenizer = open_clip.get_tokenizer(name)",
            "```",
        ]
    config = json.loads((chosen.base / CONFIG_FILE).read_text(encoding="utf-8"))
    lines = ["```python", "import open_clip", "", f'open_clip.add_model_config("{MODEL_FILE}")']
    options = [f'"{Path(MODEL_FILE).stem}"', f'pretrained="{WEIGHTS_FILE}"']
    for option, key in (("mean", "mean"), ("std", "std"), ("interpolation", "interpolation"), ("resize_mode", "resize_mode")):
        if (value := config["preprocess_cfg"].get(key)) is not None:
            options.append(f"image_{option}={value!r}")
    lines += ["model, _, preprocess = open_clip.create_model_and_transforms("]
    return [*lines, *(f"    {option}," for option in options), ")", "```"]


def _data(chosen: Chosen) -> list[str]:
    data, settings = chosen.stored["data"], chosen.settings
    held_out = f"{_name(settings['val_csv'])}" if settings.get("val_csv") else f"{settings['val_fraction']:.3g} of the images"
    result = chosen.run.result() if chosen.run else None
    lines = [
        f"- pairs: {_name(settings['csv'])}, sha256 {data['csv_sha256']}",
        f"- images: {data['lmdb']['entries']} in {_name(settings['lmdb'])} ({data['lmdb']['bytes']} bytes)",
        f"- held out: {held_out}",
    ]
    if result:
        lines.append(f"- samples seen: {result['samples_seen']} in {result['step']} steps")
        lines += [f"- learning rate that auto found: {result['range_test']['lr']:g}"] if result.get("range_test") else []
    return lines


def _recipe(settings: Mapping[str, Any]) -> list[str]:
    """Settings that decide what was learnt, where they are not the default."""
    lines = []
    for name, spec in FIELDS.items():
        value = settings.get(name)
        if spec.metadata["may_change"] or name in _NO_RECIPE or value is None:
            continue
        if str(value) != str(spec.default):
            lines.append(f"- `{flag(name)} {AUTO if is_auto(name, value) else value}`")
    return lines or ["- all settings at their defaults"]


def _name(place: str) -> str:
    """Of a file, without where it lies; names of open_clip and the hub stay whole."""
    return place if place.startswith("hf-hub:") else ", ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in place.split(","))
