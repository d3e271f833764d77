"""All that a report says of a run, read from the run's own files."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.checkpoint.commit import Rejection, merge_histories, read
from job.checkpoint.store import RunStore
from job.config import FIELDS, is_auto
from job.errors import ConfigError, ResumeError
from job.fields import AUTO, Interval, default_text
from job.storage import files

PAGE = "report.html"
GALLERY = ("eval", "gallery.json")

PLACES = ("run", "csv", "lmdb", "val_csv", "val_lmdb", "scratch")
"""Settings that say where something is, not what is done with it."""


@dataclass(frozen=True)
class RunFacts:
    """One run. Rows and JSON objects are as the run holds them."""

    uri: str
    version: str
    """Of clipjob, when the run began."""
    settings: dict[str, Any]
    data: dict[str, Any]
    result: dict[str, Any] | None
    """None: not complete."""
    attempts: list[dict[str, Any]]
    """Each with "from", the step where it began, "first" and "last", the steps in its history (None: none), "reached", the last
    step that it told of, and "end"."""
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    checkpoints: list[int]
    """Steps of those that are kept, ascending."""
    ledger: dict[str, Any]
    """Empty, if nothing is known yet."""
    planned: int | None
    """Steps of the whole run."""
    gallery: dict[str, Any] | None
    made_at: float
    """Seconds since 1970."""

    @property
    def before(self) -> dict[str, float]:
        """Held-out metrics of the base model."""
        return _metrics(next((row for row in self.evaluations if row["step"] == 0), {}))

    @property
    def after(self) -> dict[str, float]:
        """Held-out metrics of the model that is exported, or would be now: the best one."""
        if self.result:
            best = self.result["best"] if self.result["best_step"] is not None else {}
            return dict(best or self.result["after"])
        chosen = self.settings.get("best_metric", "mean_recall")
        return _metrics(max(self.evaluations, key=lambda row: row.get(chosen, 0.0), default={}))

    @property
    def export_name(self) -> str:
        return self.result["export"].rstrip("/").rsplit("/", 1)[-1] if self.result else ""

    @property
    def export_step(self) -> int | None:
        if not self.result:
            return None
        return int(self.result["best_step"] if self.export_name == "best" else self.result["step"])

    @property
    def step(self) -> int:
        return int(max([0, *(row["step"] for row in self.steps[-1:]), *(item["reached"] for item in self.attempts)]))

    @property
    def seconds(self) -> float:
        return float(sum(self.ledger.get("seconds", {}).values()))

    @property
    def goodput(self) -> float | None:
        """The share of the time in which steps were done that counted."""
        return self.ledger["seconds"].get("productive", 0.0) / self.seconds if self.seconds else None

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from the defaults: name -> (value, default)."""
        defaults = {
            name: AUTO if is_auto(name, spec.default) else str(spec.default) if isinstance(spec.default, Interval) else spec.default
            for name, spec in FIELDS.items()
        }
        return {
            name: (value, default_text(FIELDS[name]) or defaults[name] if name in FIELDS else "–")
            for name, value in self.settings.items()
            if name not in PLACES and value != defaults.get(name)
        }


def gather(uri: str, *, result: Mapping[str, Any] | None = None) -> RunFacts:
    """Reads a run. Args: result: what result.json is about to hold. Raises: ConfigError, when there is no run."""
    store = RunStore(uri)
    stored = store.load_config()
    if stored is None:
        raise ConfigError(f"{files.shown(uri)} is not a run: it has no config.json. Give the folder or URI that was --run.")
    if not isinstance(stored.get("config"), dict):
        raise ResumeError(f"{files.shown(uri)}/config.json lacks the run's settings. Use the version of clipjob that wrote it.")
    found = dict(result) if result else store.result()
    listed = files.list_files(files.join(uri, "attempts"))
    histories, attempts, beacon = list[bytes](), list[dict[str, Any]](), dict[str, Any]()
    for item in store.attempts():
        name = files.join(uri, "attempts", f"{item['attempt']:06}")
        raw = files.read_bytes(f"{name}-history.jsonl") if f"{item['attempt']:06}-history.jsonl" in listed else b""
        histories.append(raw)
        own = [row["step"] for row in merge_histories([raw]) if row.get("kind") == "step"]
        beacon = _optional(f"{name}-beacon.json", listed) or beacon
        reached = beacon["step"] if beacon.get("attempt") == item["attempt"] else 0
        first, last = (own[0], own[-1]) if own else (None, None)
        start = max([0, *(earlier["last"] or 0 for earlier in attempts)]) if first is None else first - 1
        attempts.append({**item, "from": start, "first": first, "last": last, "reached": max(reached, last or 0)})
    rows = merge_histories(histories)
    commits = store.commits()
    ledgers = [commits[0].info.get("ledger") or {} if commits else {}, beacon.get("ledger") or {}]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    return RunFacts(
        uri=files.shown(uri),
        version=str(stored.get("version", "")),
        settings={name: AUTO if is_auto(name, value) else value for name, value in stored["config"].items()} | _found(found),
        data=stored.get("data") or {},
        result=found,
        attempts=attempts,
        steps=[row for row in rows if row.get("kind") == "step"],
        evaluations=evaluations,
        checkpoints=sorted({commit.step for commit in commits}),
        ledger=max(ledgers, key=lambda ledger: sum(ledger.get("seconds", {}).values())),
        planned=found["step"] if found else beacon.get("steps"),
        gallery=read_gallery(uri),
        made_at=time.time(),
    )


def read_gallery(uri: str) -> dict[str, Any] | None:
    """What evaluate/gallery.py stored in the run; None, if there is none that can be used."""
    with contextlib.suppress(FileNotFoundError, Rejection):
        return read(files.join(uri, *GALLERY))
    return None


def _found(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings that the job has found itself."""
    range_test = (result or {}).get("range_test") or {}
    return {"lr": range_test["lr"]} if range_test else {}


def _optional(uri: str, listed: Mapping[str, int]) -> dict[str, Any]:
    if uri.rsplit("/", 1)[-1] in listed:
        with contextlib.suppress(FileNotFoundError, Rejection):
            return read(uri)
    return {}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("kind", "step")}
