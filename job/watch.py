"""A run as a person sees it from anywhere, from its URI alone: progress, loss, recall, checkpoints, attempts, goodput."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.checkpoint.beacon import read_beacon
from job.checkpoint.commit import commit_entries, read_attempts, read_history
from job.checkpoint.store import RunStore
from job.errors import ConfigError
from job.settings import settings_of
from job.storage import files

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH, BAR_WIDTH = 60, 30
SILENT_SECONDS = 60.0
"""A running attempt writes its beacon every ten seconds."""


def snapshot(run: str) -> dict[str, Any]:
    """What the run's files say now, as JSON values. Raises: ConfigError, when there is no run."""
    store = RunStore(run)
    stored = store.load_config()
    settings = settings_of(stored)
    if settings is None:
        raise ConfigError(f"{files.shown(run)} is not a run: it has no config.json. Give the folder or URI that was --run.")
    attempts = read_attempts(run)
    rows = read_history(run)
    beacon = read_beacon(run, before=attempts[-1]["attempt"] + 1, since=1) if attempts else None
    commits = commit_entries(run)
    steps = [row for row in rows if row.get("kind") == "step"]
    return {
        "run": files.shown(run),
        "model": settings["model"],
        "pretrained": settings["pretrained"],
        "result": store.result(),
        "attempts": attempts,
        "beacon": beacon,
        "step": max([0, *(row["step"] for row in steps[-1:]), *([beacon["step"]] if beacon else [])]),
        "steps": (beacon or {}).get("steps"),
        "last_row": (beacon or {}).get("row") or (steps[-1] if steps else None),
        "losses": [row["loss"] for row in steps if row["loss"] is not None],
        "evaluations": [row for row in rows if row.get("kind") == "evaluation"],
        "checkpoint_step": commits[0][1] if commits else None,
    }


def render(found: Mapping[str, Any], *, now: float) -> str:
    """The snapshot as text for a terminal. Args: now: seconds since 1970."""
    weights = f", {found['pretrained']}" if found["pretrained"] else ""
    lines = [f"{found['run']}   {found['model']}{weights}", _state(found, now=now), _progress(found)]
    if found["losses"]:
        lines.append(f"loss        {sparkline(found['losses'])} {found['losses'][-1]:.4g}")
    if found["evaluations"]:
        first, last = found["evaluations"][0], found["evaluations"][-1]
        for name, what in (("image_retrieval_recall@5", "text -> image"), ("text_retrieval_recall@5", "image -> text")):
            known = [f"{row[name]:.3f} at step {row['step']}" for row in (first, last) if name in row]
            lines.append(f"recall@5    {what}: {', '.join(known)}")
    if found["checkpoint_step"] is not None:
        risk = found["step"] - found["checkpoint_step"]
        lines.append(f"checkpoint  step {found['checkpoint_step']}; a kill now costs {risk} steps")
    lines.append(_attempts(found))
    if found["beacon"]:
        lines.append(_goodput(found["beacon"]["ledger"]["seconds"]))
    return "\n".join(line for line in lines if line)


def sparkline(values: Sequence[float]) -> str:
    """The course of many values in SPARKLINE_WIDTH characters, each the mean of its share."""
    width = min(SPARKLINE_WIDTH, len(values))
    shares = [values[at * len(values) // width : (at + 1) * len(values) // width] for at in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def _state(found: Mapping[str, Any], *, now: float) -> str:
    if found["result"]:
        return f"complete; the model is {found['result']['export']}"
    if not found["attempts"]:
        return "nobody has started it yet"
    last = found["attempts"][-1]
    if last["end"]:
        return f"not running: attempt {last['attempt']} ended with {last['end'].get('exit_code')} ({last['end'].get('reason')})"
    where = f"attempt {last['attempt']} on {last.get('host', '?')}"
    if not found["beacon"] or found["beacon"].get("attempt") != last["attempt"]:
        return f"{where} is starting, or was killed while it was"
    age = now - found["beacon"].get("at", 0.0)
    return f"{where} is running" if age < SILENT_SECONDS else f"{where} has been silent for {_duration(age)}: killed, perhaps"


def _progress(found: Mapping[str, Any]) -> str:
    row, step, steps = found["last_row"], found["step"], found["steps"]
    if not row or not steps:
        return f"step        {step}"
    done = round(BAR_WIDTH * step / steps)
    left = "" if found["result"] else f", {_duration((steps - step) * row['seconds'])} to go"
    return f"step        {step}/{steps} |{'█' * done}{' ' * (BAR_WIDTH - done)}| {step / steps:.0%}{left}"


def _attempts(found: Mapping[str, Any]) -> str:
    asked = sum(bool(attempt["end"]) and attempt["end"].get("exit_code") == 75 for attempt in found["attempts"])
    lost = found["beacon"]["ledger"]["lost_steps"] if found["beacon"] else 0
    return f"attempts    {len(found['attempts'])}, {asked} asked to stop; {lost} steps done twice"


def _goodput(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    shares = sorted(((value / total, state) for state, value in seconds.items() if value / total >= 0.005), reverse=True)
    return f"time        {_duration(total)}: " + ", ".join(f"{state.replace('_', ' ')} {share:.0%}" for share, state in shares)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
