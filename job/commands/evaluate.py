"""clipjob evaluate: scores of any model on any data, by the code that evaluates in training."""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from job.errors import ConfigError, DataError

if TYPE_CHECKING:
    from job.evaluate.encode import Features
    from job.evaluate.pairs import Pairs, Reading
    from job.evaluate.select import Chosen
    from job.model.build import ClipModel

F = TypeVar("F", bound=Callable[..., Any])


def computing(function: F) -> F:
    """Adds the flags of a command that encodes."""
    for add in (
        click.option("--scratch", default="", help="Local folder for staged files. [default: as `clipjob train`]"),
        click.option("--threads", type=click.IntRange(0), default=0, help="Threads that decode images; 0: one per core."),
        click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images at a time."),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="auto: the run's own, else what the device does best.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N, mps or cpu."),
    ):
        function = add(function)
    return function


@click.command()
@click.argument("what")
@click.option("--pretrained", default="", help="Tag or weights file, when WHAT is a model's name.")
@click.option("--which", type=click.Choice(["best", "final"]), help="Of a run. [default: best, else final]")
@click.option("--step", type=click.IntRange(0), help="A checkpoint of a run instead.")
@click.option("--csv", default="", help="CSV of image keys and captions; needs --lmdb. [default: what the run held out]")
@click.option("--lmdb", default="", help="LMDB of its images.")
@click.option("--csv-separator", default=None, help="Column separator: auto, a character, or 'tab'.")
@click.option("--image-column", default=None, help="Column of image keys: auto or a name.")
@click.option("--caption-column", default=None, help="Column of captions: auto or a name.")
@click.option("--key-prefix", default=None, help="Put before every key of the CSV.")
@click.option(
    "--caption-mode",
    type=click.Choice(["whole", "sample"]),
    help="whole text, or each tag, is a caption. [default: as the run; else whole]",
)
@click.option("--tag-separator", default=None, help="Between the tags of a caption: auto or a string.")
@click.option("--classes", type=click.Path(path_type=Path), help="File of class names, one per line. [default: the tags of --csv]")
@click.option(
    "--template",
    "templates",
    multiple=True,
    help='Text around a class name, such as "a photo of {}"; repeatable. [default: the run\'s]',
)
@click.option(
    "--task",
    type=click.Choice(["all", "retrieval", "classification"]),
    default="all",
    show_default=True,
    help="What to score. all: retrieval and calibration, and classification if there are --classes or tags are the captions.",
)
@click.option("--dataset", default="", help="What the records call the data. [default: the CSV's name]")
@click.option("--json", "as_json", is_flag=True, help="Print CLIP_benchmark's record of each task, one per line.")
@click.option("--save", is_flag=True, help="Also write the records to eval/ of the run.")
@computing
def evaluate(
    what: str,
    pretrained: str,
    which: str | None,
    step: int | None,
    classes: Path | None,
    templates: tuple[str, ...],
    task: str,
    dataset: str,
    as_json: bool,
    save: bool,
    **given: Any,
) -> int:
    """Score a model: retrieval, zero-shot classification, calibration.

    WHAT is a run (folder or URI), an exported model's folder, or an open_clip model name with --pretrained.
    """
    from job.evaluate.record import table

    if any("{}" not in template for template in templates):
        raise ConfigError('--template must contain {} where the class goes, such as "a photo of {}".')
    names = _class_names(classes) if classes else None

    def score(chosen: "Chosen", pairs: "Pairs", clip: "ClipModel", encode: Callable[..., Any]) -> list[dict[str, Any]]:
        if save and chosen.run is None:
            raise ConfigError("--save writes into a run, and this is none. Use --json, and redirect what it prints.")
        return _records(
            chosen, pairs, clip, encode, names=names, templates=templates or (pairs.reading.template,), task=task, dataset=dataset
        )

    chosen, records = _with_model(what, pretrained=pretrained, which=which or "", step=step, score=score, **given)
    if save and chosen.run is not None:
        from job.storage import files

        name = re.sub(r"[^\w.-]+", "-", f"{records[0]['dataset']}-{chosen.label}")
        files.write_bytes(files.join(chosen.run.uri, "eval", f"{name}.json"), json.dumps(records, indent=1).encode())
    click.echo("\n".join(map(json.dumps, records)) if as_json else table(records))
    return 0


def _with_model(
    what: str,
    *,
    pretrained: str,
    which: str,
    step: int | None,
    score: Callable[..., Any],
    csv: str,
    lmdb: str,
    scratch: str,
    **given: Any,
) -> tuple["Chosen", Any]:
    """Opens the model and the data, and scores. Returns: which weights it was, and the scores."""
    from job.attempt import scratch_root, working_folder
    from job.data.staging import Staging
    from job.evaluate.pairs import held_out_pairs, open_pairs
    from job.evaluate.select import choose_weights
    from job.model.build import load_base

    set_up()
    if bool(csv) != bool(lmdb):
        raise ConfigError("--csv and --lmdb belong together; give both, or for a run neither.")
    with working_folder(scratch, run=what) as folder, Staging(scratch_root(scratch)) as staging:
        chosen = choose_weights(what, scratch=folder, pretrained=pretrained, which=which, step=step)
        if not csv and chosen.run is None:
            raise ConfigError("Missing --csv and --lmdb: the data to score the model with.")
        if csv:
            pairs = open_pairs(csv, lmdb, staging=staging, reading=_reading(chosen.settings, given))
        else:
            pairs = held_out_pairs(chosen.stored, staging=staging)
        try:
            clip, encode = machine(load_base(chosen.base, weights=chosen.weights), settings=chosen.settings, **_of_machine(given))
            return chosen, score(chosen, pairs, clip, encode)
        finally:
            pairs.images.close()


def set_up() -> None:
    """Logging, and what the store has to be told."""
    from job.runtime.log import set_up_logging
    from job.storage.options import configure_storage

    set_up_logging()
    configure_storage(os.environ.get("CLIPJOB_STORAGE_OPTION", ""))


def machine(
    clip: "ClipModel", *, settings: dict[str, Any], device: str, precision: str, threads: int, batch_size: int
) -> tuple["ClipModel", Callable[..., Any]]:
    """The model on its device, and `encode_held_out` with what it needs to know of the machine."""
    import torch

    from job.evaluate.encode import encode_held_out
    from job.runtime.device import autocast_dtype, choose_device, choose_precision, cores, decode_threads

    place = choose_device(device)
    own = settings.get("precision", "auto")
    if precision == "auto" and not (own == "fp16" and place.type != "cuda"):
        precision = own
    torch.set_num_threads(cores())
    autocast = autocast_dtype(choose_precision(precision, place))
    return clip.to(place), functools.partial(
        encode_held_out, batch_size=batch_size, threads=decode_threads(threads), autocast=autocast
    )


def encoded(clip: "ClipModel", pairs: "Pairs", encode: Callable[..., Any]) -> "tuple[Features, Any]":
    """Features of all images and texts of these pairs, and the pairs. Raises: DataError, when too many images are broken."""
    from job.evaluate.pairs import captions_of, check_left_out, held_out_of

    captions = captions_of(pairs, clip)
    held_out = held_out_of(pairs, captions)
    features = encode(clip, held_out, images=pairs.images, captions=captions)
    check_left_out(decoded=len(features.images), of=len(held_out.keys))
    return features, held_out


def _records(
    chosen: "Chosen",
    pairs: "Pairs",
    clip: "ClipModel",
    encode: Callable[..., Any],
    *,
    names: list[str] | None,
    templates: tuple[str, ...],
    task: str,
    dataset: str,
) -> list[dict[str, Any]]:
    import torch

    from job.evaluate import record as write
    from job.evaluate.calibration import best_scale, calibration_at
    from job.evaluate.classification import class_features, classification_scores, labels_of
    from job.evaluate.pairs import captions_of
    from job.evaluate.retrieval import retrieval_scores, texts_in_pairs

    write_record = functools.partial(
        write.record, dataset=dataset or pairs.name, model=chosen.model, pretrained=_pretrained(chosen)
    )
    features, held_out = encoded(clip, pairs, encode)
    images = len(features.images)
    left_out = {"images_left_out": len(held_out.keys) - images} if images < len(held_out.keys) else {}
    records = []
    with torch.no_grad():
        if task != "classification":
            scale = clip.module.logit_scale.exp()  # type: ignore[operator]
            texts, placed = texts_in_pairs(features.texts, features.placed(held_out.pairs))
            scores = retrieval_scores(features.images, texts, placed, logit_scale=scale, median_ranks=True)
            calibrations = {
                "as_is": calibration_at(features.images, texts, placed, logit_scale=float(scale)),
                "calibrated": calibration_at(
                    features.images, texts, placed, logit_scale=best_scale(features.images, texts, placed)
                ),
            }
            counts = {"images": images, "texts": len(texts), "pairs": len(placed), **left_out}
            metrics = {**scores, "ece": calibrations["as_is"].ece}
            records.append(write_record(write.RETRIEVAL, metrics, counts=counts, calibrations=calibrations))
        if task == "retrieval":
            return records
        if task == "classification" or names is not None or pairs.reading.caption_mode == "sample":
            labels = labels_of(zip(pairs.keys(), pairs.tags(), strict=True), keys=held_out.keys, names=names)
            captions, autocast = captions_of(pairs, clip), encode.keywords["autocast"]  # type: ignore[attr-defined]
            of_classes = class_features(clip, labels.names, templates=templates, captions=captions, autocast=autocast)
            placed = features.placed(labels.pairs)
            metrics = classification_scores(features.images, of_classes, placed)
            unlabelled = len(features.images) - len(placed[:, 0].unique())
            counts = {"images": images - unlabelled, "classes": len(labels.names), "labels": len(placed), **left_out}
            counts |= {"images_without_a_class": unlabelled} if unlabelled else {}
            record = write_record(write.CLASSIFICATION, metrics, counts=counts)
            records.append({**record, "templates": list(templates)})
    return records


def _pretrained(chosen: "Chosen") -> str:
    return f"{chosen.pretrained} ({chosen.label})" if chosen.run else chosen.pretrained


def _reading(settings: dict[str, Any], given: dict[str, Any]) -> "Reading":
    """How to read a CSV: as flags say, its captions else as the run's, the rest else found."""
    from dataclasses import replace

    from job.evaluate.pairs import Reading

    names = ("caption_mode", "tag_separator", "template")
    reading = Reading(**{name: settings[name] for name in names if name in settings})
    flags = ("csv_separator", "image_column", "caption_column", "key_prefix", "caption_mode", "tag_separator")
    return replace(reading, **{name: given[name] for name in flags if given.get(name) is not None})


def _of_machine(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("device", "precision", "threads", "batch_size")}


def _class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The file of --classes, {path}, can't be read: {error}.") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"The file of --classes, {path}, names no class. Write one name per line.")
    return names
