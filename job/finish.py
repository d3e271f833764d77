"""The end of a run. A part of train.py by rank."""

from pathlib import Path
from typing import Any

from job.attempt import Attempt, pairs_at_once
from job.checkpoint.state import TrainState
from job.checkpoint.store import abort_uploads
from job.config import Config
from job.data.captions import Captions
from job.data.dataset import Dataset
from job.evaluate.export import export_run
from job.evaluate.gallery import make_gallery
from job.model.build import ClipModel
from job.runtime.device import autocast_dtype, decode_threads
from job.start import held_out_texts


def finish_run(
    config: Config, attempt: Attempt, state: TrainState, *, dataset: Dataset, captions: Captions, clip: ClipModel, base: Path
) -> bool:
    """Exports, report and result of a run whose last step is durable; one rank does it for all. Uses up the model in memory.

    Returns: False, if a signal came on the way; the next attempt goes on from there.
    """

    def stopping() -> bool:
        attempt.watchdog.beat("exporting")
        return attempt.stop.requested

    def look(before: Path, after: Path) -> dict[str, Any] | None:
        held_out, texts = held_out_texts(config, dataset, captions, clip)
        return make_gallery(
            clip,
            held_out,
            before=before,
            after=after,
            images=dataset.held_out_images,
            captions=texts,
            batch_size=pairs_at_once(attempt.world, global_batch_size=config.global_batch_size, micro_batch=config.micro_batch),
            threads=decode_threads(config.threads, ranks=attempt.world.ranks),
            autocast=autocast_dtype(config.precision),
            stopping=stopping,
        )

    done = export_run(
        attempt.store,
        state,
        base=base,
        scratch=attempt.scratch,
        global_batch_size=config.global_batch_size,
        look=look if len(dataset.held_out_rows) else None,
        stopping=stopping,
    )
    if done:
        abort_uploads(attempt.store.uri)  # of requests whose answer was lost; no later attempt will look
    return done
