"""The end of a run: models that open_clip loads in one line, the report, and result.json, which makes the run complete."""

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.checkpoint.commit import encode
from job.checkpoint.state import WEIGHTS, TrainState
from job.checkpoint.store import RunStore
from job.errors import ResumeError, Stopped, Superseded
from job.model.build import WEIGHTS_FILE, write_export
from job.report.facts import GALLERY, PAGE, gather, read_gallery
from job.report.page import render
from job.storage import files

log = logging.getLogger(__name__)

Look = Callable[[Path, Path], dict[str, Any] | None]
"""Weights before and after -> what `make_gallery` returns."""


def export_run(
    store: RunStore,
    state: TrainState,
    *,
    base: Path,
    scratch: Path,
    global_batch_size: int,
    look: Look | None,
    stopping: Callable[[], bool],
) -> bool:
    """Writes export/final, export/best, report.html and result.json of a run whose last step is durable.

    Args: look: compares two weights files on held-out images; None, if there are none.
    Returns: False, if stopping() became true on the way; the next attempt goes on from there.
    """
    steps = {"final": state.step} | ({"best": state.best_step} if state.best_step >= 0 else {})
    exported, fetched = list(steps), dict[str, Path]()
    for name, step in steps.items():
        if stopping():
            return False
        if not store.has_folder(f"export/{name}"):
            try:
                fetched[name] = store.fetch_file(step, WEIGHTS, scratch / "exports")
            except ResumeError as error:
                if name == "final":
                    raise
                log.warning("the best step can't be exported", extra={"step": step, "reason": str(error)})
                exported.remove(name)
                continue
            folder = scratch / f"export-{name}"
            write_export(folder, base=base, weights=fetched[name])
            store.put_folder(f"export/{name}", folder)
    name = exported[-1]
    result = _result(store, state, best=name == "best", global_batch_size=global_batch_size)

    def weights() -> Path:
        return fetched.get(name) or store.fetch_file(steps[name], WEIGHTS, scratch / "exports")

    if not _report(store, result, compare=(lambda: look(base / WEIGHTS_FILE, weights())) if look else None):
        return False
    store.write_result(result)
    return True


def _report(store: RunStore, result: dict[str, Any], *, compare: Callable[[], dict[str, Any] | None] | None) -> bool:
    """Writes eval/gallery.json and report.html. What goes wrong here is told, and the run goes on without.

    Returns: False, if a signal came on the way. Raises: Superseded, Stopped.
    """

    def write(content: bytes, *name: str) -> None:
        store.check_not_superseded()
        files.write_bytes(files.join(store.uri, *name), content)

    if compare:
        with _no_harm("no pictures of held-out images could be made"):
            if read_gallery(store.uri) is None:
                gallery = compare()
                if gallery is None:
                    return False
                write(encode(gallery), *GALLERY)
    with _no_harm("no report could be made"):
        page = render(gather(store.uri, result=result)).encode()
        write(page, PAGE)
        log.info("report", extra={"bytes": len(page), "uri": files.shown(files.join(store.uri, PAGE))})
    return True


@contextlib.contextmanager
def _no_harm(told: str) -> Iterator[None]:
    """Warns of what fails inside, instead of raising it. Raises: Superseded, Stopped."""
    try:
        yield
    except (Superseded, Stopped):
        raise
    except Exception as error:  # noqa: BLE001  the model is there; nothing about a page may cost it
        log.warning(told, extra={"reason": f"{type(error).__name__}: {error}"})


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
        "range_test": state.range_test,
        "seconds": round(state.seconds, 3),
        "nonfinite_steps": state.nonfinite_steps,
        "bad_samples": state.bad_samples,
    }
