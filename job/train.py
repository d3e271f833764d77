"""The whole job, from a config to an outcome. Read it top to bottom.

1. ranks       this process and its peers, if there are several; all that follows is what each of them does
2. node        device, precision, threads: what can't work here ends the job before anything is written
3. data        remote LMDBs are staged beside; meanwhile CSVs are read and the model is built from the run's own base folder,
               which a new run makes here; then the LMDB is opened and checked, its rows divided into training and held-out, and
               what suits this node is tried
4. run         a restart is compared with the run's config and data, then the attempt is claimed
5. state       the newest checkpoint that verifies, or step 0; what locked towers make of the data
6. steps       at the top of the loop stands a finished step: evaluate it, save it, leave, or take the next one; before the first
               one, --lr auto finds its learning rate
7. result      exports and the report, then result.json, which makes the run complete
"""

import contextlib
import enum
import logging
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from job.attempt import Attempt, joined, working_folder
from job.checkpoint.beacon import Beacon
from job.checkpoint.state import WEIGHTS
from job.checkpoint.store import RunStore
from job.claim import claim_run, count_earlier_attempts, note_end, restore
from job.config import Config
from job.data.batches import DecodeTally
from job.data.captions import Captions
from job.data.dataset import Dataset
from job.data.order import steps_in
from job.errors import StorageError, exit_code_of
from job.finish import finish_run
from job.fitted import fitted
from job.inputs import Beside, open_dataset, read_tables, stage_lmdbs, staging_area
from job.locked import locked_features
from job.model.build import WEIGHTS_FILE, ClipModel
from job.model.optimizer import lr_at, warmup_steps
from job.model.step import train_step
from job.model.towers import make_towers
from job.model.weights import load_weights
from job.range_test import check_range_test, find_lr
from job.result import diverged, too_many_bad_samples
from job.runtime.device import choose_device, choose_precision, cores_of_rank, device_failure
from job.runtime.history import History
from job.runtime.ledger import Ledger, process_age_seconds
from job.runtime.log import always_with
from job.runtime.memory import keep_freed_memory
from job.runtime.progress import StagingProgress
from job.runtime.ranks import ALONE, Ranks
from job.runtime.schedule import CheckpointClock, due_at_step
from job.runtime.stop import StopSignal
from job.runtime.watchdog import Watchdog
from job.runtime.world import Agreement
from job.start import (
    build_model,
    captions_of,
    checkpoint_writer,
    evaluation,
    find_base,
    new_state,
    step_settings,
    training_batches,
)
from job.storage.probe import check_storage
from job.telemetry import Telemetry, make_metrics, start_metrics

log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    COMPLETE = "complete"
    STOPPED = "stopped"


def train(config: Config, *, store: RunStore, stop: StopSignal, ranks: Ranks = ALONE) -> Outcome:
    """Runs one attempt of a job, up to its end or a signal.

    Args:
        config: resolved against the run's stored one.
        store: of config.run, its config loaded; nothing claimed yet.
        ranks: which of the processes of the job this is. Each calls this with the same config.
    Returns: COMPLETE, and the result is durable; STOPPED, and everything done so far is durable.
    Raises: JobError, whose exit code says who must act.
    """
    ledger = Ledger(already=process_age_seconds())
    with contextlib.ExitStack() as closing:
        watchdog = closing.enter_context(contextlib.closing(Watchdog(limit_seconds=config.hang_timeout.value)))

        def check(doing: str) -> None:
            watchdog.beat(doing)
            stop.check(doing)

        metrics = make_metrics(config, watchdog=watchdog, is_first=ranks.rank == 0)
        closing.callback(metrics.close)
        store.check = lambda: check("moving files of the run")
        world = closing.enter_context(joined(ranks, check=lambda: check("waiting for the other ranks")))
        watchdog.on_hang = world.tell_failure
        device = choose_device(config.device, ranks=ranks)
        precision, threads = choose_precision(config.precision, device), config.torch_threads or cores_of_rank(ranks)
        precision, threads = world.share("arithmetic", lambda: [precision, threads])
        config = replace(config, precision=precision, torch_threads=threads)
        torch.set_num_threads(config.torch_threads)
        keep_freed_memory()
        if world.is_first:
            check_storage(config.run)
        progress = closing.enter_context(contextlib.closing(StagingProgress(also=metrics.staging, live=world.is_first)))
        scratch = closing.enter_context(working_folder(config.scratch, run=config.run))
        staging = closing.enter_context(staging_area(config, check=lambda: check("staging the data"), progress=progress))
        outcome = run_attempt(config, Attempt(store, stop, world, device, scratch, staging, metrics, watchdog, ledger))
        if outcome is Outcome.COMPLETE and not config.keep_staged:
            staging.purge()
        return outcome


def run_attempt(config: Config, attempt: Attempt) -> Outcome:
    """Opens the data, claims the run, and trains."""
    store, stop, world, watchdog = attempt.store, attempt.stop, attempt.world, attempt.watchdog
    with Beside(partial(stage_lmdbs, config, attempt.staging)) as lmdbs:
        config, tables = read_tables(config, attempt.staging)
        lmdbs.raise_failure()
        stop.check("reading the data")
        watchdog.beat("building the model")
        base, base_is_new = find_base(config, attempt)
        lmdbs.raise_failure()
        stop.check("building the model")
        clip = build_model(config, base)
        captions = captions_of(config, tables.manifest.captions, clip)
        captions.tokenise_until(lambda: lmdbs.done or stop.requested)
        with attempt.ledger.within("staging"):
            paths = lmdbs.result()
    watchdog.beat("opening the data")
    dataset = open_dataset(config, tables, paths)
    check_range_test(config, row_count=len(dataset.train_rows))
    config = fitted(config, attempt, dataset, captions, clip)
    stop.check("opening the data")
    claim_run(config, attempt, dataset)
    facts = {"device": str(attempt.device), "precision": config.precision, "ranks": world.size}
    log.info("attempt", extra=facts)
    try:
        if base_is_new:
            store.put_folder("base", base)
        world.share("base is there", bool)
        world.connect(attempt.device, waiting=watchdog.beat)
        outcome = run_steps(config, attempt, dataset=dataset, clip=clip, captions=captions, base=base)
    except Exception as error:
        failure = world.explained(device_failure(error))
        if world.is_first and not (isinstance(failure, StorageError) and "://" in store.uri):  # it would fail as well, as slowly
            note_end(store, exit_code_of(failure), str(failure) or type(failure).__name__)
        if failure is error:
            raise
        raise failure from error
    if world.is_first:
        note_end(store, *((0, "complete") if outcome is Outcome.COMPLETE else (75, stop.name or "signal of another rank")))
    return outcome


def run_steps(config: Config, attempt: Attempt, *, dataset: Dataset, clip: ClipModel, captions: Captions, base: Path) -> Outcome:
    """From the newest checkpoint to the result, or to a signal."""
    store, stop, world, metrics, ledger = attempt.store, attempt.stop, attempt.world, attempt.metrics, attempt.ledger
    with ledger.within("restore"):
        restored = restore(attempt)
    load_weights(clip.module, str(restored.folder / WEIGHTS if restored else base / WEIGHTS_FILE), model=str(base))
    clip = clip.to(attempt.device)
    state = new_state(config, clip)
    if restored:
        state.restore(restored.folder, restored.commit.files)
        log.info("resumed", extra={"step": state.step, "rejected": restored.rejected})
    world.meet()  # all have read it
    shutil.rmtree(attempt.scratch / "restored", ignore_errors=True)
    count_earlier_attempts(attempt, restored)
    metrics.evaluated(state.after)

    row_count, batch_size = len(dataset.train_rows), config.global_batch_size
    steps_per_epoch = row_count / batch_size
    steps = steps_in(epochs=config.epochs, row_count=row_count, global_batch_size=batch_size, max_steps=config.max_steps)
    warmup = warmup_steps(config.warmup, steps)
    known = locked_features(config, attempt, dataset, captions, clip, samples=steps * batch_size)
    if known is None:
        return Outcome.STOPPED
    towers, settings = make_towers(clip, world=world), step_settings(config)
    evaluate = evaluation(config, attempt, dataset, captions, clip)
    clock = CheckpointClock(config.checkpoint_every, steps_per_epoch=steps_per_epoch)

    start_metrics(config, attempt, captions, clip, step=state.step, steps=steps)

    with contextlib.ExitStack() as closing:
        tally = DecodeTally()
        telemetry = Telemetry(config, attempt, state, view=clip.view, tally=tally, steps=steps, steps_per_epoch=steps_per_epoch)
        closing.callback(telemetry.close)
        writer = checkpoint_writer(config, attempt, on_saved=telemetry.saved)
        writer.last_step = state.step if restored else -1
        closing.callback(writer.close)
        make_batches = partial(training_batches, config, attempt, dataset, captions, clip, known=known, tally=tally)
        batches = closing.enter_context(contextlib.closing(make_batches(start=state.step, steps=steps)))
        history = History(telemetry.row)
        if world.is_first:
            far = lambda: {"step": state.step, "steps": steps, "row": history.last_row, "ledger": ledger.to_json()}  # noqa: E731
            closing.callback(Beacon(store, far, on_written=metrics.tell).close)
        named: set[str] = set()  # images that can't be decoded, each told once

        def save(*, needed: str = "") -> None:
            with ledger.within("checkpoint_stall"):
                lines = history.to_bytes()
                state.seconds = ledger.total_seconds
                evaluated = state.evaluated_step == state.step
                info = {"evaluated": evaluated, "metrics": state.after if evaluated else None, "ledger": ledger.to_json()}
                writer.save(state, lines, info=info, needed=needed)
            clock.saved(stall_seconds=writer.stall_seconds, upload_seconds=writer.upload_seconds)

        def votes() -> list[bool]:
            due = world.is_first and clock.due(state.step) and not writer.busy
            return [stop.requested, due, writer.notice_failure()]

        agreement = Agreement(world, votes)
        while True:
            last = state.step == steps
            due = state.step == 0 or last or due_at_step(config.evaluate_every, state.step, steps_per_epoch=steps_per_epoch)
            must_evaluate = evaluate is not None and due and state.evaluated_step != state.step
            if must_evaluate:
                history.flush()
            with ledger.within("evaluate"):
                scores = evaluate(telemetry.evaluating) if evaluate and must_evaluate else None
            best = False
            if scores is not None:
                best = state.take_metrics(scores, chosen=config.best_metric, last_of=len(dataset.held_out_rows) if last else 0)
                history.add_evaluation(state.step, scores)
                telemetry.evaluated(state.step, scores, best=best)
                history.restart_clock()
            if 0 < config.patience <= state.evaluations_since_best and not last:
                last = True
                log.info("complete: no better one in as many evaluations as --patience", extra={"best_step": state.best_step})
            complete = last and (not evaluate or state.evaluated_step == state.step)
            asked_to_stop, save_is_due, failed = agreement.outcome()  # a signal that comes later is met at the next step
            stopping = not complete and (asked_to_stop or (must_evaluate and scores is None))
            if stopping:
                log.info("stopping", extra={"step": state.step, "signal": stop.name or "of another rank"})
                writer.make_way(state.step)
                failed = world.any(writer.notice_failure()) or failed
            kept = config.keep_every > 0 and state.step % config.keep_every == 0
            unsaved = failed or state.step != writer.last_step or scores is not None
            must_save = best or last or stopping or kept or failed or state.step == 0
            if unsaved and (must_save or save_is_due):
                save(needed="always" if kept or state.step == 0 else "best" if best else "")
                history.restart_clock()
            if complete or stopping:
                ledger.enter("checkpoint_stall")
                writer.wait(waiting=attempt.watchdog.beat)
                break

            if state.step == 0 and config.lr < 0:
                if not find_lr(config, attempt, state, clip, make_batches, towers=towers, steps=steps):
                    continue  # a signal came
                history.restart_clock()
            peak = state.range_test.get("lr", config.lr)
            world.at_step(state.step)
            always_with(step=state.step)
            attempt.watchdog.beat("training")
            agreement.vote()
            ledger.enter("data_wait")
            began = time.monotonic()
            batch = next(batches, None)
            if batch is None:  # a signal came while the next batch was being decoded
                continue
            data_wait = time.monotonic() - began
            ledger.enter("recompute" if state.step < ledger.recompute_until else "productive")
            if not metrics.ready:
                seconds = round(process_age_seconds(), 3)
                metrics.start_training(seconds)
                log.info("training", extra={"step": state.step, "startup_seconds": seconds})
            lr = lr_at(state.step, peak=peak, warmup=warmup, steps=steps)
            report = train_step(state, batch, towers=towers, lr=lr, settings=settings, world=world)
            history.add(report, data_wait_seconds=data_wait)
            for key, reason in batch.bad:
                if key not in named:
                    named.add(key)
                    log.warning("image left out", extra={"key": key, "reason": reason, "step": state.step})
            if state.bad_samples > config.max_bad_samples * max(row_count, state.step * batch_size):
                save()
                writer.wait()
                raise too_many_bad_samples(
                    state.bad_samples, step=state.step, samples=state.step * batch_size, limit=config.max_bad_samples
                )
            if state.nonfinite_in_a_row >= config.max_nonfinite_steps:
                writer.wait()
                if world.is_first:
                    store.write_history(history.to_bytes())
                raise diverged(state.nonfinite_in_a_row, step=state.step, lr=peak, precision=config.precision)

    def finish() -> bool:
        return finish_run(config, attempt, state, dataset=dataset, captions=captions, clip=clip, base=base)

    if not complete or not world.share("exported", finish):
        return Outcome.STOPPED
    metrics.complete()
    return Outcome.COMPLETE
