"""Which weights a command means: a run's best, final or checkpoint, a folder that open_clip loads, or a model by name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.checkpoint.commit import Rejection, commit_entries
from job.checkpoint.state import WEIGHTS
from job.checkpoint.store import RunStore
from job.checkpoint.transfer import fetch_folder
from job.errors import ConfigError, DataError, ResumeError
from job.model.build import CONFIG_FILE, WEIGHTS_FILE, write_base
from job.storage import files

EXPORTS = ("best", "final")


@dataclass(frozen=True)
class Chosen:
    """Weights on this machine, and what they are called."""

    base: Path
    """A folder with the model's config and tokenizer."""
    weights: Path
    model: str
    """open_clip's name of it, or the path of its config."""
    pretrained: str
    """The tag, or where the weights lie."""
    label: str = "model"
    """best, final or step-N of a run."""
    run: RunStore | None = None
    stored: dict[str, Any] = field(default_factory=dict)
    """The run's config.json; empty where there is no run."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of the run; empty where there is none."""
        return dict(self.stored.get("config", {}))


def choose_weights(what: str, *, scratch: Path, pretrained: str = "", which: str = "", step: int | None = None) -> Chosen:
    """The weights that `what` names, fetched.

    Args:
        what: folder or URI of a run or of an exported model, an open_clip name, hf-hub:…, or a model-config JSON.
        pretrained: tag or weights file, for a model by name.
        which: best or final of a run; empty: the best if there is one. step: one of its checkpoints instead.
    Raises:
        ConfigError: there is no such thing, or the other arguments don't fit it.
        ResumeError: the run has no such checkpoint or export. DataError: a weights file or folder is damaged.
    """
    place = what.removeprefix("local-dir:")
    place = place if "://" in place else str(Path(place).expanduser().absolute())
    is_place = "://" in place or os.path.isdir(place)
    store = run_at(place) if is_place else None
    if store is None and (which or step is not None):
        raise ConfigError(f"{files.shown(what)} is no run (it has no config.json), so --which and --step mean nothing.")
    if is_place and pretrained:
        raise ConfigError(f"{files.shown(what)} has its own weights; leave out --pretrained, or give the name of a model with it.")
    if store is not None:
        return _of_run(store, scratch=scratch, which=which, step=step)
    if is_place:
        return _of_folder(place, scratch=scratch)
    if not pretrained and not what.startswith("hf-hub:"):
        if os.sep in what and not what.endswith(".json"):
            raise ConfigError(f"There is no run and no exported model at {what}. Check the path.")
        raise ConfigError(f"{what} alone is a model without weights. Add --pretrained, such as openai or laion2b_s34b_b79k.")
    write_base(scratch / "named", model=what, pretrained=pretrained, seed=0)
    return Chosen(scratch / "named", scratch / "named" / WEIGHTS_FILE, what, pretrained or what)


def run_at(place: str) -> RunStore | None:
    """The run at a path or URI, None if none is there."""
    if files.is_local(place) and (files.local_path(place) / CONFIG_FILE).is_file():
        return None  # an exported model, which may hold a config.json of another kind
    store = RunStore(place)
    try:
        stored = store.load_config()
    except ResumeError:
        if files.list_files(files.join(place, "attempts")):
            raise
        return None
    return store if stored is not None else None


def fetch_export(store: RunStore, folder: Path, *, which: Sequence[str] = EXPORTS) -> tuple[str, Path] | None:
    """(best or final, where it lies now) of the first of a run's exported models that is there."""
    for name in which:
        found = store.fetch_folder(f"export/{name}", folder / name)
        if found is not None:
            return name, found
    return None


def fetch_base(store: RunStore, folder: Path) -> Path:
    """The run's base model. Raises: ResumeError."""
    base = store.fetch_folder("base", folder)
    if base is None:
        raise ResumeError(f"The run {files.shown(store.uri)} has no complete base/, so nothing has been trained yet.")
    return base


def check_empty(place: str) -> None:
    """Raises: ConfigError, unless nothing is at this path or URI, or an empty folder."""
    if files.list_files(place) or (files.is_local(place) and files.local_path(place).is_file()):
        raise ConfigError(f"{files.shown(place)} is not an empty folder. Choose another one.")


def put_folder(place: str, folder: Path) -> None:
    """Copies a folder to a path or URI, the largest files last: whoever finds the weights finds the rest. Raises: StorageError."""
    for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size):
        files.upload(path, files.join(place, str(path.relative_to(folder))))


def _of_run(store: RunStore, *, scratch: Path, which: str, step: int | None) -> Chosen:
    stored = store.load_config() or {}
    if not isinstance(stored.get("config"), dict) or not isinstance(stored.get("data"), dict):
        raise ResumeError(f"config.json of {files.shown(store.uri)} lacks its settings. Use the version of clipjob that wrote it.")
    if which and step is not None:
        raise ConfigError("--which and --step both name the weights; give one of them.")
    base, model = fetch_base(store, scratch / "base"), str(stored["config"]["model"])
    steps = sorted({step for _, step, _ in commit_entries(store.uri)})
    known = f"It has checkpoints of these steps: {', '.join(map(str, steps)) or 'none'}."
    if step is not None:
        if step not in steps:
            raise ResumeError(f"The run {files.shown(store.uri)} has no checkpoint of step {step}. {known}")
        weights = store.fetch_file(step, WEIGHTS, scratch / "checkpoint")
        return Chosen(base, weights, model, files.shown(store.uri), f"step-{step}", store, stored)
    found = fetch_export(store, scratch / "export", which=(which,) if which else EXPORTS)
    if found is None:
        raise ResumeError(
            f"The run {files.shown(store.uri)} has no exported model{f' {which!r}' if which else ''}: a complete run has "
            f"one. Choose a checkpoint with --step. {known}"
        )
    label, folder = found
    return Chosen(base, folder / WEIGHTS_FILE, model, files.shown(store.uri), label, store, stored)


def _of_folder(place: str, *, scratch: Path) -> Chosen:
    folder = files.local_path(place)
    if not files.is_local(place):
        folder = scratch / "folder"
        try:
            if fetch_folder(place, folder) is None:
                for name in files.list_files(place):
                    files.download(files.join(place, name), folder / name)
        except Rejection as reason:
            raise DataError(f"The exported model {files.shown(place)} is damaged: {reason}. Copy it again.") from None
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{files.shown(place)} is neither a run (it has no config.json) nor an exported model (it has no "
            f"{' and no '.join(missing)})."
        )
    return Chosen(folder, folder / WEIGHTS_FILE, f"local-dir:{files.shown(place)}", files.shown(place))
