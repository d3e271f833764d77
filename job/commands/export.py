"""clipjob export: a run's model for others, perhaps mixed with its base, with a card that says what it is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from job.commands.evaluate import computing, encoded, machine, set_up
from job.errors import ConfigError

if TYPE_CHECKING:
    from job.data.staging import Staging
    from job.evaluate.alpha import Scored
    from job.evaluate.calibration import Calibration
    from job.evaluate.pairs import Pairs
    from job.evaluate.select import Chosen


@click.command()
@click.argument("run")
@click.option("--to", required=True, metavar="FOLDER", help="Where to put it: an empty or absent folder, or a URI.")
@click.option("--which", type=click.Choice(["best", "final"]), help="Which weights. [default: best, else final]")
@click.option("--step", type=click.IntRange(0), help="A checkpoint instead.")
@click.option(
    "--alpha",
    default="auto",
    show_default=True,
    metavar="A",
    help="0: the base, 1: the tuned model, between: a mix. auto: see above; 1 without guard data.",
)
@click.option(
    "--guard-csv", default="", help="CSV of pairs that the model must not forget; needs --guard-lmdb. [default for auto: the run's]"
)
@click.option("--guard-lmdb", default="", help="LMDB of their images.")
@click.option("--val-csv", default="", help="CSV to score on. [default: what the run held out]")
@click.option("--val-lmdb", default="", help="LMDB of its images. [default: the run's]")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Set logit_scale so that probabilities are calibrated on validation data. Not for models of the sigmoid loss.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["open_clip", "safetensors", "hf"]),
    default="open_clip",
    show_default=True,
    help="open_clip, hf: a folder for local-dir: and hf-hub:, the same for both. safetensors: one file, and the model's config.",
)
@computing
def export(run: str, to: str, alpha: str, calibrate: bool, form: str, which: str | None, step: int | None, **given: Any) -> int:
    """Export a run's model with a model card.

    With guard data, --alpha auto tries mixes of the base and the tuned weights, and takes the one nearest to the tuned model that
    loses at most 0.01 of recall@5 on them against the base.
    """
    from job.attempt import scratch_root, working_folder
    from job.data.staging import Staging
    from job.evaluate.alpha import parse_alpha
    from job.evaluate.select import check_empty, choose_weights, put_folder

    set_up()
    wanted = parse_alpha(alpha)
    for kind in ("val", "guard"):
        if given[f"{kind}_lmdb"] and not given[f"{kind}_csv"]:
            raise ConfigError(f"--{kind}-lmdb needs --{kind}-csv.")
    if given["guard_csv"] and not given["guard_lmdb"]:
        raise ConfigError("--guard-csv needs --guard-lmdb.")
    target = to if "://" in to else str(Path(to).expanduser().absolute())
    check_empty(target)
    with working_folder(given["scratch"], run=run) as scratch, Staging(scratch_root(given["scratch"])) as staging:
        chosen = choose_weights(run, scratch=scratch, which=which or "", step=step)
        if chosen.run is None:
            raise ConfigError(f"{run} is no run: it has no config.json. Give the folder or URI that was --run.")
        if wanted is None and not given["guard_csv"]:
            given |= {name: chosen.settings.get(name, "") for name in ("guard_csv", "guard_lmdb")}
        folder = scratch / "made"
        told = _make(chosen, folder, staging, alpha=wanted, calibrate=calibrate, single_file=form == "safetensors", given=given)
        put_folder(target, folder)
    click.echo(f"{told}\n{chosen.label} of {run} is in {to}; its README.md says how to load it.")
    return 0


def _make(
    chosen: "Chosen",
    folder: Path,
    staging: "Staging",
    *,
    alpha: float | None,
    calibrate: bool,
    single_file: bool,
    given: dict[str, Any],
) -> str:
    """Writes the export. Returns: what alpha it has, and why."""
    from job.checkpoint.transfer import COMPLETE
    from job.evaluate.alpha import mix
    from job.evaluate.card import MODEL_FILE, model_card
    from job.model.build import CONFIG_FILE, WEIGHTS_FILE, write_export
    from job.model.weights import save_weights

    pairs = _open(chosen, staging, needed=calibrate, given=given)
    try:
        alpha, why, scored, calibrations = _choose(chosen, pairs, alpha=alpha, calibrate=calibrate, given=given)
    finally:
        for opened in pairs.values():
            opened.images.close()
    tensors = mix(chosen.base / WEIGHTS_FILE, chosen.weights, alpha)
    if calibrations:
        import torch

        tensors["logit_scale"] = torch.full_like(tensors["logit_scale"], calibrations[1].logit_scale).log()
    folder.mkdir()
    weights = folder / WEIGHTS_FILE if single_file else folder.parent / WEIGHTS_FILE
    save_weights(tensors, weights)
    if single_file:
        config = json.loads((chosen.base / CONFIG_FILE).read_text(encoding="utf-8"))
        (folder / MODEL_FILE).write_text(json.dumps(config["model_cfg"], indent=1), encoding="utf-8")
    else:
        write_export(folder, base=chosen.base, weights=weights)
        (folder / COMPLETE).unlink(missing_ok=True)  # it lists the files of the base
    names = {kind: opened.name for kind, opened in pairs.items()}
    card = model_card(chosen, alpha=alpha, why=why, scored=scored, data=names, calibrations=calibrations, single_file=single_file)
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts = {
        "alpha": alpha,
        "why": why,
        "weights": chosen.label,
        "data": names,
        "scores": [row.to_json() for row in scored],
        "calibration": [found.to_json() for found in calibrations],
    }
    (folder / "alpha.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    warning = f"\n{calibrations[1].warning()}" if calibrations else ""
    return f"alpha = {alpha:g}. {why}{warning}".rstrip()


def _open(chosen: "Chosen", staging: "Staging", *, needed: bool, given: dict[str, Any]) -> "dict[str, Pairs]":
    """The data to score on: validation, guard, both or none."""
    from dataclasses import replace

    from job.evaluate.pairs import Reading, held_out_pairs, open_pairs, reading_of

    pairs = {}
    if given["val_csv"]:
        lmdb = given["val_lmdb"] or chosen.settings["val_lmdb"] or chosen.settings["lmdb"]
        own = replace(reading_of(chosen.settings), csv_separator="auto", image_column="auto", caption_column="auto")
        pairs["validation"] = open_pairs(given["val_csv"], lmdb, staging=staging, reading=own, flags=("--val-csv", "--val-lmdb"))
    elif needed or given["guard_csv"]:
        pairs["validation"] = held_out_pairs(chosen.stored, staging=staging)
    if given["guard_csv"]:
        pairs["guard"] = open_pairs(
            given["guard_csv"], given["guard_lmdb"], staging=staging, reading=Reading(), flags=("--guard-csv", "--guard-lmdb")
        )
    return pairs


def _choose(
    chosen: "Chosen", pairs: "dict[str, Pairs]", *, alpha: float | None, calibrate: bool, given: dict[str, Any]
) -> "tuple[float, str, list[Scored], list[Calibration]]":
    """(alpha, why, scores on the way, calibration before and after)."""
    from job.evaluate.alpha import ALPHAS, GUARD_LIMIT, largest_within_guard, mix, sweep
    from job.evaluate.retrieval import retrieval_scores
    from job.model.build import WEIGHTS_FILE, load_base

    why = "It is what --alpha says." if alpha is not None else "There were no guard data, so nothing spoke for less."
    auto = alpha is None and "guard" in pairs
    alpha = 1.0 if alpha is None else alpha
    if not pairs:
        return alpha, why, [], []
    clip, encode = machine(
        load_base(chosen.base),
        settings=chosen.settings,
        **{name: given[name] for name in ("device", "precision", "threads", "batch_size")},
    )
    if calibrate and getattr(clip.module, "logit_bias", None) is not None:
        raise ConfigError("--calibrate is for models of the softmax loss; this one has a logit_bias that would not fit any more.")
    module: Any = clip.module

    def load(alpha: float) -> None:
        module.load_state_dict(mix(chosen.base / WEIGHTS_FILE, chosen.weights, alpha))

    def score(alpha: float) -> tuple[dict[str, float], dict[str, float]]:
        load(alpha)
        found = {}
        for kind, opened in pairs.items():
            features, held_out = encoded(clip, opened, encode)
            placed, scale = features.placed(held_out.pairs), module.logit_scale.detach().exp()
            scores = retrieval_scores(features.images, features.texts, placed, logit_scale=scale, median_ranks=True)
            found[kind] = {name: round(value, 6) for name, value in scores.items()}
        return found.get("validation", {}), found.get("guard", {})

    scored = sweep(ALPHAS if auto else sorted({0.0, alpha}), score)
    if auto:
        alpha = largest_within_guard(scored)
        why = f"It is the largest of {len(ALPHAS)} tried that loses at most {GUARD_LIMIT:g} of recall@5 on {pairs['guard'].name}."
    calibrations = []
    if calibrate:
        load(alpha)
        calibrations = _calibrations(
            *encoded(clip, pairs["validation"], encode), logit_scale=float(module.logit_scale.detach().exp())
        )
    return alpha, why, scored, calibrations


def _calibrations(features: Any, held_out: Any, *, logit_scale: float) -> "list[Calibration]":
    """As it is, and at the best scale."""
    from job.evaluate.calibration import best_scale, calibration_at
    from job.evaluate.retrieval import texts_in_pairs

    texts, placed = texts_in_pairs(features.texts, features.placed(held_out.pairs))
    scales = (logit_scale, best_scale(features.images, texts, placed))
    return [calibration_at(features.images, texts, placed, logit_scale=scale) for scale in scales]
