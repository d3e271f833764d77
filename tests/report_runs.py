"""Runs as a report finds them, written by hand: as many steps and attempts as a test wants, without any training."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from job.checkpoint.commit import encode
from job.config import Config
from job.runtime.ledger import STATES

HOSTILE = [
    "<script>document.title='broken in'</script><img src=https://example.com/x.png>",
    '"><svg onload=alert(1)>&amp;',
    "קופסה אדומה על שולחן ליד חתול",
    "a cat 🐈 and 日本語, e\u0301",
    "x" * 300,
    "long " * 59,
    "lone \ud800 surrogate",
]


def scores(value: float) -> dict[str, float]:
    """Held-out metrics around a value."""
    names = [f"{kind}_retrieval_recall@{k}" for kind in ("text", "image") for k in (1, 5, 10)]
    return {**{name: min(1.0, value * (1 + at / 10)) for at, name in enumerate(names)}, "mean_recall": value} | {
        "right_caption_probability": value / 2
    }


def loss_at(step: int, steps: int) -> float:
    return 3 * math.exp(-3 * step / steps) + 0.6 + 0.25 * math.sin(step * 12.9898) ** 3


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    attempts: Sequence[tuple[int, int, int | None]] = ((0, 40, 0),),
    evaluations: int = 5,
    complete: bool = True,
    gallery: Mapping[str, Any] | None = None,
    gain: float = 0.6,
    losses: Mapping[int, float | None] | None = None,
    guarded: bool = False,
    **settings: Any,
) -> Path:
    """A run. Args: attempts: of each, the step it began from, the last in its history, and its exit code (None: killed, and
    three steps more were done). losses: of single steps. guarded: with scores of a guard. settings: not the defaults."""
    base = {"csv": "/data/products.csv", "lmdb": "/data/images.lmdb", "model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}
    config = Config(run=str(folder), **{**base, **settings})
    data = {"lmdb": {"entries": 12345, "bytes": 10**9}, "csv_sha256": "0" * 64}
    _write(folder / "config.json", encode({"version": "0.1.0", "config": config.to_json(), "data": data}))
    evaluated = sorted({round(at * steps / max(1, evaluations - 1)) for at in range(evaluations)})
    known = {step: scores(0.05 + gain * (1 - math.exp(-3 * step / steps))) for step in evaluated}
    if guarded:
        known = {
            step: found | {f"guard_{name}": 0.5 - value / 10 for name, value in found.items()} for step, found in known.items()
        }
    for number, (first, last, code) in enumerate(attempts, start=1):
        name = folder / "attempts" / f"{number:06}"
        began = 1_760_000_000 + number * 5000
        claim = {"attempt": number, "host": f"node-{number}", "device": "NVIDIA A100", "ranks": 1, "started_at": began}
        _write(name.with_suffix(".json"), encode({**claim, "versions": {"clipjob": "0.1.0", "torch": "2.11.0"}}))
        rows = []
        for step in range(first, last + 1):
            loss = (losses or {}).get(step, loss_at(step, steps))
            seconds = 0.25 + 0.05 * math.sin(step * 78.233) ** 2
            row = {"kind": "step", "step": step, "loss": loss, "seconds": seconds, "data_wait_seconds": 0.001}
            rows += [row] if step > first else []
            rows += [{"kind": "evaluation", "step": step, **known[step]}] if step in known else []
        _write(folder / "attempts" / f"{number:06}-history.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        reached = last + 3 if code is None else last
        beacon = {"attempt": number, "at": began + 4000, "step": reached, "steps": steps, "ledger": ledger(number, reached)}
        _write(folder / "attempts" / f"{number:06}-beacon.json", encode(beacon))
        if code is not None:
            end = {"attempt": number, "exit_code": code, "reason": {0: "complete", 75: "SIGTERM"}.get(code, "the disk is full")}
            _write(folder / "attempts" / f"{number:06}-end.json", encode({**end, "ended_at": began + 4100}))
    if gallery is not None:
        _write(folder / "eval" / "gallery.json", encode(gallery))
    if complete:
        first, last = (known[min(known)], known[max(known)]) if known else ({}, {})
        result = {"outcome": "complete", "step": steps, "samples_seen": 256 * steps, "attempts": len(attempts)}
        result |= {"before": first, "after": last, "best": last, "best_step": steps if known else None}
        result |= {"export": f"{folder}/export/{'best' if known else 'final'}", "samples_per_second": 950.0, "seconds": 5000.0}
        _write(folder / "result.json", encode({**result, "nonfinite_steps": 0, "bad_samples": 0}))
    return folder


def ledger(restarts: int, step: int) -> dict[str, Any]:
    shares = (0.86, 0.02, 0.01, 0.05, 0.03, 0.01, 0.005, 0.015)
    seconds = {state: step * share for state, share in zip(STATES, shares, strict=True)}
    return {"seconds": seconds, "restarts": restarts - 1, "preemptions": 1, "lost_steps": 3, "recompute_until": 0}


def a_gallery(images: int = 24, *, captions: Sequence[str] = HOSTILE, quality: int = 80) -> dict[str, Any]:
    """What evaluate/gallery.py would store."""
    texts = {str(at): caption for at, caption in enumerate(captions)}

    def side(number: int, right: int) -> dict[str, Any]:
        order = [(right + number + at) % len(texts) for at in range(min(5, len(texts)))]
        top = [{"text": text, "probability": 0.6 / (at + 1), "right": text == right} for at, text in enumerate(order)]
        return {"top": top, "rank": order.index(right) if right in order else len(texts) - 1}

    entries = [
        {
            "key": f"images/{at:04}.jpg",
            "thumbnail": _thumbnail(at, quality),
            "right": [at % len(texts)],
            "before": side(at + 1, at % len(texts)),
            "after": side(at % 3, at % len(texts)),
        }
        for at in range(images)
    ]
    bins = [
        {"count": 10 * at, "confidence": (at + 0.5) / 15, "accuracy": ((at + 0.5) / 15) ** 1.3} if at else {"count": 0}
        for at in range(15)
    ]
    found = {"bins": bins, "ece": 0.05, "accuracy": 0.5}
    return {
        "texts": texts,
        "gallery": entries,
        "mistakes": entries[:8],
        "reliability": {"before": {**found, "ece": 0.31}, "after": found},
        "images": 1050,
        "candidates": 1200,
        "of_images": 1050,
        "of_texts": 1200,
    }


def _thumbnail(number: int, quality: int) -> str:
    stream = io.BytesIO()
    image = Image.linear_gradient("L").resize((160, 120)).rotate(37 * number)
    Image.merge("RGB", [image, image.rotate(90), image.rotate(180)]).save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
