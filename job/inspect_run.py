"""What `clipjob inspect` shows of a run. Imports no torch."""

import tempfile
from pathlib import Path
from typing import Any

from job.checkpoint.commit import Commit, Rejection, commit_entries
from job.checkpoint.store import RunStore
from job.checkpoint.transfer import receive
from job.errors import ConfigError
from job.result import result_table
from job.settings import settings_of
from job.storage import files


def inspect_run(uri: str, *, verify: bool) -> dict[str, Any]:
    """The run as JSON values: outcome, progress, config, attempts and checkpoints, newest first.

    Args: verify: read every checkpoint and compare its hashes.
    Raises: ConfigError, when there is no run.
    """
    store = RunStore(uri)
    stored = store.load_config()
    if stored is None:
        raise ConfigError(f"{files.shown(uri)} is not a run: it has no config.json. Give the folder or URI that was --run.")
    result = store.result()
    checkpoints = []
    for commit in store.commits():
        size = sum(record.size for record in commit.files.values())
        checked = {"state": _verify(uri, commit)} if verify else {}
        checkpoints.append({"step": commit.step, "attempt": commit.attempt, "bytes": size, **checked, **commit.info})
    steps = [row for row in store.read_history() if row.get("kind") == "step"]
    return {
        "run": files.shown(uri),
        "complete": result is not None,
        "step": steps[-1]["step"] if steps else 0,
        "last": steps[-1] if steps else None,
        "result": result,
        "checkpoints": checkpoints,
        "attempts": store.attempts(),
        "config": settings_of(stored),
        "data": stored["data"],
    }


def progress_of(uri: str) -> str:
    """complete, the name of the newest commit, or none: a scheduler's script compares it with what it was."""
    if RunStore(uri).result() is not None:
        return "complete"
    return next((name for _, _, name in commit_entries(uri)), "none")


def _verify(uri: str, commit: Commit) -> str:
    """ "sound", or what is wrong with a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            receive(files.join(uri, "data", commit.data), commit.files, Path(folder))
        except Rejection as reason:
            return str(reason)
    return "sound"


def to_text(found: dict[str, Any]) -> str:
    """The same for a terminal."""
    last = found["last"] or {}
    state = "complete" if found["complete"] else "not complete"
    loss = "" if last.get("loss") is None else f", loss {last['loss']:.4f}"
    lines = [f"{found['run']}: {state}, step {found['step']}{loss}", "", "checkpoints (newest first)"]
    for item in found["checkpoints"]:
        recall = (item.get("metrics") or {}).get("image_retrieval_recall@5")
        shown = "" if recall is None else f"  recall@5 {recall:.3f}"
        size = f"{item['bytes'] / 1e6:.1f} MB"
        lines.append(f"  step {item['step']:>8}  attempt {item['attempt']:>3}  {size:>12}  {item.get('state', '')}{shown}")
    lines += ["" if found["checkpoints"] else "  none", "attempts"]
    for attempt in found["attempts"]:
        end = attempt["end"] or {}
        newest = attempt is found["attempts"][-1] and not found["complete"]
        unknown = "running, or killed" if newest else "killed"
        how = f"exit {end['exit_code']}: {end['reason']}" if end else unknown
        lines.append(f"  {attempt['attempt']:>3}  {attempt.get('host', '?')}  {attempt.get('device', '?')}  {how}")
    if found["result"]:
        lines += ["", result_table(found["result"], run=found["run"])]
    lines += ["", "config"]
    lines += [f"  {name} = {value}" for name, value in found["config"].items() if value not in ("", False)]
    return "\n".join(lines)
