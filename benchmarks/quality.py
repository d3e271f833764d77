"""How good a fine-tuned model is: clipjob against a weblog post's loop and open_clip's own trainer, from the same base model, on
the same pairs, in as many steps. Held-out recall, what is forgotten of the base's domain, and whether probabilities are honest."""

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import open_clip_trainer
from benchmarks.machine import REPOSITORY, Limit, arguments, publish, say, table
from benchmarks.quality_data import Data, write_data
from benchmarks.quality_scores import METRICS, RESAMPLES, Answers, Draws, Floats, answers, difference, draw, measure
from job.data.staging import Staging
from job.demo import FOLDER
from job.evaluate.pairs import Reading, open_pairs
from job.model.build import WEIGHTS_FILE
from job.runtime.log import set_up_logging

BATCH = 64
BASE, POST, OPEN_CLIP = "base, not tuned", "the post's loop", "open_clip_train"
OPEN_CLIP_DEFAULTS = f"{OPEN_CLIP}, its defaults (lr 5e-4, warm-up 10 000)"
POST_RATES = (5e-6, 1e-4)
"""In its code, and in its text."""
OPEN_CLIP_RATES = (1e-5, 1e-4, 3e-4, 1e-3)
OURS_DEFAULT = "clipjob, lr 1e-3"
OURS: dict[str, list[str]] = {
    "clipjob, lr 1e-5 (default, for large models)": ["--lr", "1e-5"],
    "clipjob, lr 1e-4": ["--lr", "1e-4"],
    "clipjob, lr 3e-4": ["--lr", "3e-4"],
    OURS_DEFAULT: ["--lr", "1e-3"],
}
"""Flags of `clipjob train`; a method that is to be compared is one more line."""
EXPORTED = f"{OURS_DEFAULT}, exported: alpha auto, calibrated"

Entrant = Callable[[int], Path]
"""Trains with a seed. Returns: a weights file, or a folder that open_clip loads."""


@dataclass(frozen=True)
class Contest:
    """What all entrants get."""

    data: Data
    folder: Path
    epochs: int

    @property
    def steps(self) -> int:
        """Of every entrant: full batches only, as the other two have them."""
        return self.epochs * (self.data.rows["train"] // BATCH)

    @property
    def base(self) -> Path:
        """A folder that open_clip loads. open_clip's trainer takes the optimiser's settings for ViTs if "vit" is in its name."""
        return self.folder / "base-vit" / "export" / "final"

    def place(self, name: str, seed: int) -> Path:
        """A folder for what an entrant writes."""
        folder = self.folder / f"seed-{seed}" / re.sub(r"[^\w.-]+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def train_base(contest: Contest, *, epochs: int) -> None:
    """From random weights, on the general domain."""
    words = ["--model", FOLDER / "tiny.json", "--epochs", epochs, "--lr", 1e-3, "--val-fraction", 0, "--seed", 0]
    _clipjob_train(contest, contest.folder / "base-vit", csv=contest.data.csv("base"), words=words)


def ours(contest: Contest, name: str, flags: Sequence[str], seed: int) -> Path:
    """The best of its checkpoints in the opinion of a tenth of the training pairs, which it does not train on."""
    run = contest.place(name, seed) / "run"
    words = ["--init-from", contest.base.parents[1], "--max-steps", contest.steps, "--val-fraction", 0.1, "--seed", seed, *flags]
    _clipjob_train(contest, run, csv=contest.data.csv("train"), words=words)
    return run / "export" / "best"


def exported(contest: Contest, name: str, seed: int) -> Path:
    """The export of our entrant `name` that has run with this seed, held-out and scored guard pairs unseen."""
    folder, data = contest.place(EXPORTED, seed), contest.data
    words = ["--to", folder / "model", "--alpha", "auto", "--calibrate", "--scratch", contest.folder / "scratch", "--device", "cpu"]
    words += ["--guard-csv", data.csv("guard-for-alpha"), "--guard-lmdb", data.images]
    command = [sys.executable, "-m", "job", "export", contest.place(name, seed) / "run", *words]
    _run(command, cwd=REPOSITORY, log=folder / "log")
    return folder / "model"


def post(contest: Contest, name: str, rate: float, seed: int) -> Path:
    folder, data = contest.place(name, seed), contest.data
    weights = folder / "weights.pt"
    words = ["--csv", data.csv("train"), "--lmdb", data.images, "--pretrained", contest.base, "--save", weights]
    words += ["--epochs", contest.epochs, "--batch", BATCH, "--lr", rate, "--seed", seed]
    _run([sys.executable, "-m", "benchmarks.plain_loop", *words], cwd=REPOSITORY, log=folder / "log")
    return weights


def open_clip(contest: Contest, name: str, flags: Sequence[object], seed: int) -> Path:
    folder = contest.place(name, seed)
    words = ["--dataset-type", "csv", "--train-data", contest.data.csv("train-files"), "--csv-separator", "|"]
    words += ["--csv-img-key", "path", "--csv-caption-key", "tags"]
    words += ["--model", f"local-dir:{contest.base.relative_to(contest.folder)}"]
    words += ["--device", "cpu", "--precision", "fp32", "--workers", 1, "--batch-size", BATCH, "--epochs", contest.epochs]
    words += ["--seed", seed, "--logs", folder, "--name", "run", "--save-frequency", 0, *flags]
    environment = open_clip_trainer.environment(contest.folder)
    command = [sys.executable, "-m", "open_clip_train.main", *words]
    _run(command, cwd=contest.folder, log=folder / "log", environment=environment)
    return folder / "run" / "checkpoints" / f"epoch_{contest.epochs}.pt"


def _clipjob_train(contest: Contest, run: Path, *, csv: Path, words: Sequence[object]) -> None:
    always = ["--csv", csv, "--lmdb", contest.data.images, "--run", run, "--scratch", contest.folder / "scratch", "--device", "cpu"]
    always += ["--precision", "fp32", "--global-batch-size", BATCH, "--checkpoint-every", 0, "--metrics-port", 0]
    _run([sys.executable, "-m", "job", "train", *always, *words], cwd=REPOSITORY, log=run.with_name(f"{run.name}.log"))


def _run(command: Sequence[object], *, cwd: Path, log: Path, environment: dict[str, str] | None = None) -> None:
    """Raises: SystemExit, with the end of what the command printed, if it fails."""
    words = [str(word) for word in command]
    with log.open("wb") as stream:
        code = subprocess.run(words, cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def entrants(contest: Contest, *, quick: bool) -> dict[str, Entrant]:
    """In the order of the table; what one needs of another comes later."""
    found: dict[str, Entrant] = {BASE: lambda _seed: contest.base}
    for rate in POST_RATES:
        name = f"{POST}, Adam {_shown(rate)}"
        found[name] = partial(post, contest, name, rate)
    found[OPEN_CLIP_DEFAULTS] = partial(open_clip, contest, OPEN_CLIP_DEFAULTS, [])
    warm_up = max(1, contest.steps // 10)
    for rate in OPEN_CLIP_RATES[-2:] if quick else OPEN_CLIP_RATES:
        name = f"{OPEN_CLIP}, lr {_shown(rate)}, warm-up {warm_up}"
        found[name] = partial(open_clip, contest, name, ["--lr", rate, "--warmup", warm_up])
    for name in (next(iter(OURS)), OURS_DEFAULT) if quick else OURS:
        found[name] = partial(ours, contest, name, OURS[name])
    found[EXPORTED] = partial(exported, contest, OURS_DEFAULT)
    return found


def _shown(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def requirements(measured: dict[str, dict[str, Floats]], rivals: dict[str, str], draws: Draws, *, quick: bool) -> list[Limit]:
    """About the far end of each interval: better at recall, and at most half of what is forgotten and of the calibration error."""
    bound = None if quick else 0.0  # one epoch teaches nothing
    limits = []
    for label, rival in rivals.items():
        for metric in ("recall@1", "recall@5"):
            found = difference(measured[OURS_DEFAULT][metric], measured[rival][metric], draws)
            limits.append(Limit(f"{metric}, less that of {label}", found.low, bound, "", at_least=True, spread=str(found)))
    for metric in ("forgotten", "ECE"):
        for label, rival in rivals.items():
            found = difference(measured[EXPORTED][metric], measured[rival][metric], draws, share=0.5)
            limits.append(Limit(f"exported: {metric}, less half of that of {label}", found.high, bound, "", spread=str(found)))
    return limits


def report(measured: dict[str, dict[str, Floats]], rivals: dict[str, str], draws: Draws, limits: Sequence[Limit]) -> str:
    """The tables."""

    def over_seeds(values_S: Floats) -> str:
        spread = f" ± {statistics.stdev(values_S):.3f}" if len(values_S) > 1 else ""
        return f"{values_S.mean():.3f}{spread}"

    rows = [(name, *(over_seeds(figures[metric][:, 0]) for metric in METRICS)) for name, figures in measured.items()]
    compared = ("recall@1", "recall@5", "forgotten", "ECE")
    differences = [
        (f"{own} − {label}", *(str(difference(measured[own][metric], measured[rival][metric], draws)) for metric in compared))
        for own in (OURS_DEFAULT, EXPORTED)
        for label, rival in rivals.items()
    ]
    bounds = [limit.row() for limit in limits]
    columns = ("", "difference (95 % interval)", "required of the interval", "")
    return "\n\n".join((table(("", *METRICS), rows), table(("", *compared), differences), table(columns, bounds)))


def main() -> int:
    args = arguments(__doc__ or "", repeats=3).parse_args()
    if args.quick:
        args.repeats = 1
    set_up_logging()  # else open_clip warns at each evaluation that it has not loaded the weights itself
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.ExitStack() as closing:
        folder = Path(name).absolute()
        contest = Contest(write_data(folder), folder, epochs=1 if args.quick else 10)
        say(f"the base model, then {args.repeats} seeds of {contest.steps} steps each; rows: {contest.data.rows}")
        train_base(contest, epochs=1 if args.quick else 20)
        staging = closing.enter_context(Staging(folder / "scratch"))
        pairs = {
            part: open_pairs(str(contest.data.csv(part)), str(contest.data.images), staging=staging, reading=Reading())
            for part in ("held-out", "guard")
        }
        for opened in pairs.values():
            closing.callback(opened.images.close)
        competing = entrants(contest, quick=args.quick)
        found: dict[str, list[dict[str, Answers]]] = {name: [] for name in competing}
        alphas = []
        for seed in range(args.repeats):
            for name, train in competing.items():
                say(f"seed {seed}: {name}")
                made = train(seed)
                weights = made / WEIGHTS_FILE if made.is_dir() else made
                found[name].append({part: answers(weights, contest.base, opened) for part, opened in pairs.items()})
            alphas.append(json.loads((contest.place(EXPORTED, seed) / "model" / "alpha.json").read_text(encoding="utf-8"))["alpha"])
            shutil.rmtree(folder / f"seed-{seed}")  # 2 GB
    sizes = {part: len(found[BASE][0][part].text_ranks) for part in pairs}
    draws = draw(held_out=sizes["held-out"], guard=sizes["guard"], seeds=args.repeats)
    measured = {name: measure(of_seeds, found[BASE], draws) for name, of_seeds in found.items()}
    tuned = [name for name in competing if name.startswith(OPEN_CLIP) and name != OPEN_CLIP_DEFAULTS]
    best = max(tuned, key=lambda name: statistics.mean(one["held-out"].mean_recall for one in found[name]))
    rivals = {name: name for name in competing if name.startswith(POST)}
    rivals |= {f"{OPEN_CLIP}, its defaults": OPEN_CLIP_DEFAULTS, best.replace(", lr", ", tuned: lr"): best}
    limits = requirements(measured, rivals, draws, quick=args.quick)
    about = (
        f"{contest.data.rows['train']} training pairs, batch {BATCH}, {contest.steps} steps each, {args.repeats} seeds; "
        f"{sizes['held-out']} held-out images, {sizes['guard']} of the guard. Mean of both directions; mean over seeds ± standard "
        f"deviation. Forgotten: recall@5 on the guard, less than the base's. {RESAMPLES} paired resamples of queries and seeds. "
        f"Exported alphas: {', '.join(map(str, alphas))}."
    )
    raw: dict[str, Any] = {name: {metric: values[:, 0].tolist() for metric, values in of.items()} for name, of in measured.items()}
    text = f"{about}\n\n{report(measured, rivals, draws, limits)}"
    return publish(args, "Quality", text, limits=limits, raw={"seeds": raw, "alphas": alphas, "rows": contest.data.rows})


if __name__ == "__main__":
    sys.exit(main())
