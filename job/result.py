"""What a person sees at the end: before and after, where the model lies, the line that loads it."""

from typing import Any

from job.errors import DataError, TrainingError
from job.report.words import METRICS
from job.storage import files


def result_table(result: dict[str, Any], *, run: str) -> str:
    """The result of a complete run as text.

    Args:
        result: the content of result.json.
        run: where the run lies now; it may have been moved since.
    """
    export = files.join(run, "export", result["export"].rstrip("/").rsplit("/", 1)[-1])
    lines = []
    before, after = result["before"], result["after"]
    if after:
        best = result["best"] if result["best_step"] not in (None, result["step"]) else {}
        lines.append(f"{'held-out images':<34}{'before':>8}    {'after':>8}" + (f"    {'best':>8}" if best else ""))
        for name in (name for name in METRICS if name in after):
            shown = f"    {best[name]:>8.3f}" if best else ""
            lines.append(f"{METRICS[name]:<34}{before.get(name, 0):>8.3f} -> {after[name]:>8.3f}{shown}")
        lines.append("")
    rate = f", {result['samples_per_second']:.0f} samples/s" if result["samples_per_second"] else ""
    attempts = "1 attempt" if result["attempts"] == 1 else f"{result['attempts']} attempts"
    lines.append(f"{result['step']} steps, {result['samples_seen']} samples, {result['seconds']:.0f} s in {attempts}{rate}")
    best = f" (best, step {result['best_step']})" if result["best_step"] is not None else ""
    lines.append(f"model{best}: {export}")
    folder = export if "://" not in export else "FOLDER"
    copy = "" if folder != "FOLDER" else ", once it is copied to FOLDER"
    lines.append(f"load it with open_clip{copy}:")
    lines.append(f'    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")')
    return "\n".join(lines)


def too_many_bad_samples(bad_samples: int, *, step: int, samples: int, limit: float) -> DataError:
    return DataError(
        f"An image was missing or could not be decoded {bad_samples} times in {samples} samples, more than --max-bad-samples "
        f"{limit:g} allows. The log names the keys, and `clipjob check --all` lists them all. "
        f"The run is saved at step {step}: go on with a higher --max-bad-samples, or mend the LMDB and start a new run."
    )


def diverged(steps_in_a_row: int, *, step: int, lr: float, precision: str) -> TrainingError:
    return TrainingError(
        f"The loss or gradient was not finite in {steps_in_a_row} steps in a row, up to step {step}; "
        "none of them changed the weights. "
        f"Start a new run with a lower --lr (now {lr:g}) or --precision fp32 (now {precision})."
    )
