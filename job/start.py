"""What an attempt does and builds before its first step, in the order in which train.py calls it. A part of train.py by rank."""

import itertools
import logging
from collections.abc import Callable, Generator
from pathlib import Path

import torch

from job.attempt import Attempt, pairs_at_once
from job.checkpoint.publish import Team
from job.checkpoint.state import TrainState
from job.checkpoint.store import RunStore
from job.checkpoint.writer import CheckpointWriter
from job.config import Config, starts_random
from job.data.batches import Batch, DecodeTally, Samples, load_batches
from job.data.captions import Captions, Texts
from job.data.dataset import Dataset
from job.data.order import batches_from, rows_at
from job.data.staging import Staging
from job.errors import ConfigError, DataError, ResumeError
from job.evaluate.encode import HeldOut, group_pairs
from job.evaluate.retrieval import evaluate_retrieval
from job.evaluate.select import fetch_export
from job.fitted import gpu_jpegs
from job.locked import LockedFeatures
from job.model.build import ClipModel, build_base, prepare_towers, write_base
from job.model.optimizer import make_optimizer
from job.model.step import StepSettings
from job.model.text import lengths_of
from job.runtime.device import autocast_dtype, decode_threads
from job.storage import files

log = logging.getLogger(__name__)

Evaluate = Callable[[Callable[[int, int], None]], dict[str, float] | None]


def find_base(config: Config, attempt: Attempt) -> tuple[Path, bool]:
    """The folder with the base model, and whether it has to be put into the run yet.

    Other nodes than the first wait until rank 0 has claimed the run and put it there.
    """
    world = attempt.world
    if world.is_first:
        base, is_new = _find_base(config, attempt.store, attempt.scratch, attempt.staging)
        world.share("base", lambda: str(base))
        return base, is_new
    if world.ranks.node == 0:
        return Path(world.share("base", str)), False
    world.share("base is there", str)

    def fetch() -> str:
        found = attempt.store.fetch_folder("base", attempt.scratch / "base")
        if found is None:
            raise ResumeError(
                f"The run {files.shown(attempt.store.uri)} has no base/ as this node sees it, though rank 0 put it there. "
                "Choose a --run that all nodes see: a shared file system, or an object store."
            )
        return str(found)

    return Path(world.share_on_node("base", fetch)), False


def _find_base(config: Config, store: RunStore, scratch: Path, staging: Staging) -> tuple[Path, bool]:
    found = store.fetch_folder("base", scratch / "base")
    if found is not None:
        return found, False
    if store.commits():
        raise ResumeError(
            f"The run {files.shown(store.uri)} has checkpoints but no complete base/, without which they can't be loaded. "
            "Restore it (a bucket with versions keeps it), or start a new run at another --run."
        )
    if starts_random(config.to_json()) and not config.model.endswith(".json"):
        log.warning(
            "training starts from random weights; fine-tuning wants --pretrained, such as openai or laion2b_s34b_b79k",
            extra={"model": config.model},
        )
    made = scratch / "new-base"
    if config.init_from:
        write_base(made, model=str(_fetch_export(config.init_from, scratch, check=store.check)), pretrained="", seed=config.seed)
    else:
        pretrained = config.pretrained
        if "://" in pretrained:
            pretrained = str(staging.file(pretrained, flag="--pretrained"))
        write_base(made, model=config.model, pretrained=pretrained, seed=config.seed)
    return made, True


def _fetch_export(run: str, scratch: Path, *, check: Callable[[], None]) -> Path:
    source = RunStore(run)
    source.check = check
    if (found := fetch_export(source, scratch / "init")) is not None:
        return found[1]
    raise DataError(
        f"--init-from {files.shown(run)} has no exported model: it is not a complete run. Finish that run first, or check the path "
        "(`clipjob inspect` shows what is there)."
    )


def build_model(config: Config, base: Path) -> ClipModel:
    """The base model set up for training, without its weights. Raises: ConfigError, when it was not made for the loss."""
    clip = build_base(base)
    _check_loss(config, clip)
    prepare_towers(
        clip.module, lock_image=config.lock_image, lock_text=config.lock_text, grad_checkpointing=config.grad_checkpointing
    )
    return clip


def _check_loss(config: Config, clip: ClipModel) -> None:
    """Raises: ConfigError, when the model was not made for the loss."""
    has_bias = getattr(clip.module, "logit_bias", None) is not None
    if config.loss == "siglip" and not has_bias:
        raise ConfigError(
            f"--loss siglip needs a model with a logit_bias, which {config.model} has not. Take one that was made for it, such as "
            'ViT-B-16-SigLIP, or a model-config JSON with "init_logit_bias": -10.'
        )
    if config.loss == "clip" and has_bias:
        log.warning("this model was made for --loss siglip, and is trained with clip", extra={"model": config.model})


def new_state(config: Config, clip: ClipModel) -> TrainState:
    """The state at step 0; the weights are clip's."""
    optimizer = make_optimizer(
        clip.module,
        lr=0.0,  # each step sets it
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    scaler = torch.amp.GradScaler(clip.shift.device.type) if config.precision == "fp16" else None
    return TrainState(clip.module, optimizer, scaler)


def training_batches(
    config: Config,
    attempt: Attempt,
    dataset: Dataset,
    captions: Captions,
    clip: ClipModel,
    *,
    known: LockedFeatures,
    tally: DecodeTally,
    start: int,
    steps: int,
) -> Generator[Batch]:
    """This rank's shares of the batches of steps start … steps-1; alone, fewer if a signal comes."""
    world, row_count = attempt.world, len(dataset.train_rows)
    mine = world.part(config.global_batch_size)
    shares = (positions[mine.start : mine.stop] for positions in batches_from(start, global_batch_size=config.global_batch_size))
    samples = (
        Samples(positions, dataset.train_rows[rows_at(positions, row_count=row_count, seed=config.seed)])
        for positions in itertools.islice(shares, steps - start)
    )
    return load_batches(
        samples,
        keys=dataset.manifest.keys,
        images=dataset.images,
        captions=captions,
        view=clip.view,
        threads=decode_threads(config.threads, ranks=world.ranks),
        seed=config.seed,
        crop_scale=config.crop_scale,
        known_images=known.images,
        known_captions=known.captions,
        tally=tally,
        gpu_jpegs=gpu_jpegs(config, attempt.device),
        pin_memory=clip.shift.device.type == "cuda",
        stopping=lambda: attempt.stop.requested and world.size == 1,  # several ranks stop at a step that they agree on
    )


def step_settings(config: Config) -> StepSettings:
    return StepSettings(
        global_batch_size=config.global_batch_size,
        grad_clip=config.grad_clip,
        seed=config.seed,
        autocast=autocast_dtype(config.precision),
        loss=config.loss,
        soft_targets=config.soft_targets,
        micro_batch=config.micro_batch,
    )


def checkpoint_writer(config: Config, attempt: Attempt, *, on_saved: Callable[..., None]) -> CheckpointWriter:
    world, team = attempt.world, None
    if world.peers is not None:
        team = Team(world.peers.connect(), rank=world.rank, size=world.size, raise_failure=world.peers.raise_failure)
    return CheckpointWriter(
        attempt.store,
        scratch=attempt.scratch,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        patience_seconds=config.storage_patience.value,
        stopping=lambda: attempt.stop.requested,
        on_saved=on_saved,
        on_failed=attempt.metrics.save_failed,
        on_waiting=attempt.metrics.waiting.set,
        rank=world.rank,
        ranks=world.size,
        team=team,
    )


def captions_of(config: Config, texts: Texts, clip: ClipModel) -> Captions:
    return Captions(
        texts,
        clip.tokenizer,
        lengths_of=lengths_of(clip.module),
        mode=config.caption_mode,
        tag_separator=config.tag_separator,
        template=config.template,
        seed=config.seed,
        with_tags=config.soft_targets > 0,
    )


def evaluation(config: Config, attempt: Attempt, dataset: Dataset, captions: Captions, clip: ClipModel) -> Evaluate | None:
    """Scores the model as it is when called: metrics of the held-out pairs, and with guard_ in front those of the guard; or None
    when a signal came first. None: nothing is held out."""
    if not len(dataset.held_out_rows):
        return None
    sets = [("", *held_out_texts(config, dataset, captions, clip), dataset.held_out_images)]
    if dataset.guard:
        guard = dataset.guard.manifest
        texts = _guard_captions(guard.captions, clip)
        pairs = group_pairs((guard.keys[row], texts.choices(row)) for row in range(len(guard)))
        sets.append(("guard_", pairs, texts, dataset.guard.images))
    world = attempt.world

    def evaluate(progress: Callable[[int, int], None]) -> dict[str, float] | None:
        def beating(done: int, total: int) -> None:
            attempt.watchdog.beat("evaluating")
            progress(done, total)

        scores: dict[str, float] = {}
        for prefix, held_out, texts, images in sets:
            found = evaluate_retrieval(
                clip,
                held_out,
                images=images,
                captions=texts,
                batch_size=pairs_at_once(world, global_batch_size=config.global_batch_size, micro_batch=config.micro_batch),
                threads=decode_threads(config.threads, ranks=world.ranks),
                autocast=autocast_dtype(config.precision),
                stopping=lambda: world.any(attempt.stop.requested),
                progress=beating,
                world=world,
            )
            if found is None:
                return None
            scores |= {prefix + name: value for name, value in found.items()}
        return scores

    return evaluate


def _guard_captions(texts: Texts, clip: ClipModel) -> Captions:
    """Each whole and as it stands, as in `clipjob export`: they are of other data, so this run's template is not theirs."""
    lengths = lengths_of(clip.module)
    return Captions(texts, clip.tokenizer, lengths_of=lengths, mode="whole", tag_separator=", ", template="{}", seed=0)


def held_out_texts(config: Config, dataset: Dataset, captions: Captions, clip: ClipModel) -> tuple[HeldOut, Captions]:
    """Which images and texts belong together, and what tokenises these texts. Args: captions: of the training rows."""
    if dataset.held_out is not dataset.manifest:
        captions = captions_of(config, dataset.held_out.captions, clip)
    rows = [int(row) for row in dataset.held_out_rows]
    return group_pairs((dataset.held_out.keys[row], captions.choices(row)) for row in rows), captions
