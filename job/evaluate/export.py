"""The end of a run: models that open_clip loads in one line, and result.json, which makes the run complete."""

import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.checkpoint.state import WEIGHTS, TrainState
from job.checkpoint.store import RunStore
from job.errors import ResumeError
from job.model.build import write_export
from job.storage import files

log = logging.getLogger(__name__)


def export_run(
    store: RunStore, state: TrainState, *, base: Path, scratch: Path, global_batch_size: int, stopping: Callable[[], bool]
) -> bool:
    """Writes export/final, export/best and result.json of a run whose last step is durable.

    Returns: False, if stopping() became true on the way; the next attempt goes on from there.
    """
    steps = {"final": state.step} | ({"best": state.best_step} if state.best_step >= 0 else {})
    exported = list(steps)
    for name, step in steps.items():
        if stopping():
            return False
        if not store.has_folder(f"export/{name}"):
            try:
                weights = store.fetch_file(step, WEIGHTS, scratch / "exports")
            except ResumeError as error:
                if name == "final":
                    raise
                log.warning("the best step can't be exported", extra={"step": step, "reason": str(error)})
                exported.remove(name)
                continue
            folder = scratch / f"export-{name}"
            write_export(folder, base=base, weights=weights)
            store.put_folder(f"export/{name}", folder)
    store.write_result(_result(store, state, best="best" in exported, global_batch_size=global_batch_size))
    return True


def _result(store: RunStore, state: TrainState, *, best: bool, global_batch_size: int) -> dict[str, Any]:
    rows = [row for row in store.read_history() if row.get("kind") == "step"]
    seconds = [row["seconds"] for row in rows[2:]] or [row["seconds"] for row in rows]
    return {
        "outcome": "complete",
        "step": state.step,
        "samples_seen": state.step * global_batch_size,
        "attempts": store.attempt,
        "before": state.before,
        "after": state.after,
        "best": state.best,
        "best_step": state.best_step if best else None,
        "export": files.join(store.uri, "export", "best" if best else "final"),
        "samples_per_second": round(global_batch_size / statistics.median(seconds), 3) if seconds else None,
        "seconds": round(state.seconds, 3),
        "nonfinite_steps": state.nonfinite_steps,
        "bad_samples": state.bad_samples,
    }
