"""Scores for programs, as CLIP_benchmark writes them, and for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.evaluate.calibration import Calibration
from job.report.words import METRICS

RETRIEVAL, CLASSIFICATION = "zeroshot_retrieval", "zeroshot_classification"
TASKS = (RETRIEVAL, CLASSIFICATION)


def record(
    task: str,
    metrics: Mapping[str, float],
    *,
    dataset: str,
    model: str,
    pretrained: str,
    counts: Mapping[str, int],
    calibrations: Mapping[str, Calibration] | None = None,
) -> dict[str, Any]:
    """One record of CLIP_benchmark, with what was counted beside it, and with calibrations: as it is, and at the best scale."""
    found: dict[str, Any] = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": {name: round(value, 6) for name, value in metrics.items()},
        "language": "en",
        "counts": dict(counts),
    }
    if calibrations:
        found["calibration"] = {name: value.to_json() for name, value in calibrations.items()}
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one model on one data set as text."""
    lines = []
    for found in records:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["counts"].items())
        lines += [f"{found['task'].replace('zeroshot_', '')} on {found['dataset']}: {counts}"]
        for name, value in found["metrics"].items():
            shown = f"{value:>10.1f}" if "median" in name else f"{value:>10.4f}"
            lines.append(f"  {METRICS.get(name, name):<34}{shown}")
        if "calibration" in found:
            lines += _calibration_lines(found["calibration"])
        lines.append("")
    return "\n".join(lines[:-1])


def _calibration_lines(calibration: Mapping[str, Any]) -> list[str]:
    as_is, best = calibration["as_is"], calibration["calibrated"]
    lines = [f"  {'image -> text probabilities':<34}{'as is':>10}{'calibrated':>12}"]
    for name, words in (("logit_scale", "logit_scale (1 / temperature)"), ("ece", "calibration error (ECE)"), ("nll", "NLL")):
        lines.append(f"  {words:<34}{as_is[name]:>10.4f}{best[name]:>12.4f}")
    lines.append(f"  {'said':>10}{'right':>10}{'images':>10}   as is, by the probability of the first text")
    lines += [f"  {at['confidence']:>10.3f}{at['accuracy']:>10.3f}{at['count']:>10}" for at in as_is["bins"] if at["count"]]
    return lines
