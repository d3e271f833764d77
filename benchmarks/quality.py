"""How good a fine-tuned model is: clipjob against a weblog post's loop and open_clip's own trainer, from the same base model, on
the same pairs, in as many steps. Held-out recall, what is forgotten of the base's domain, and whether probabilities are honest."""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import open_clip_trainer
from benchmarks.clip_art import FOLDER as CLIP_ART_FOLDER
from benchmarks.machine import REPOSITORY, Limit, arguments, publish, say, table
from benchmarks.quality_data import CLIP_ART, FOLDS, Data, write_data
from benchmarks.quality_scores import METRICS, RESAMPLES, Answers, Draws, Floats, answers, difference, draw, measure
from job.data.staging import Staging
from job.demo import FOLDER
from job.evaluate.pairs import Reading, open_pairs
from job.model.build import WEIGHTS_FILE
from job.runtime.log import set_up_logging

BATCH = 64
THREADS = 1
"""Of each entrant; as many seeds run side by side as there are cores."""
BASE, POST, OPEN_CLIP = "base, not tuned", "the post's loop", "open_clip_train"
OPEN_CLIP_DEFAULTS = f"{OPEN_CLIP}, its defaults (lr 5e-4, warm-up 10 000)"
POST_RATES = (5e-6, 1e-4)
"""In its code, and in its text."""
OPEN_CLIP_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
CLIPPED = "--grad-clip-norm 1"
"""As ours has it: no rival, but it tells what a lead is made of."""
OURS_DEFAULT = "clipjob, lr auto"
LOCKED = f"{OURS_DEFAULT}, --lock-image"
OURS: dict[str, list[str]] = {
    OURS_DEFAULT: ["--lr", "auto"],
    LOCKED: ["--lr", "auto", "--lock-image"],
}
"""Flags of `clipjob train`; settings that are to be compared are one more line."""
LAST = f"{OURS_DEFAULT}, its last step"
"""In place of the step that its validation pairs choose."""
EXPORTED = f"{OURS_DEFAULT}, exported: alpha auto, calibrated"
LOCKED_WHOLE = f"{LOCKED}, exported: alpha 1, calibrated"
EXPORTS = {
    EXPORTED: (OURS_DEFAULT, "auto"),
    f"{LOCKED}, exported: alpha auto, calibrated": (LOCKED, "auto"),
    LOCKED_WHOLE: (LOCKED, "1"),
}
"""Of which entrant, and --alpha of `clipjob export`."""

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
    """The best of its checkpoints in the opinion of a twentieth of the training pairs, which it does not train on."""
    run = contest.place(name, seed) / "run"
    words = ["--init-from", contest.base.parents[1], "--max-steps", contest.steps, "--seed", seed, *flags]
    _clipjob_train(contest, run, csv=contest.data.csv("train", seed), words=words)
    return run / "export" / "best"


def rate_found(contest: Contest, csv: Path) -> float:
    """What --lr auto finds for the base model on other data."""
    run = contest.place("rate", 0) / csv.stem
    words = ["--init-from", contest.base.parents[1], "--max-steps", 100, "--val-fraction", 0, "--lr", "auto"]
    _clipjob_train(contest, run, csv=csv, words=words)
    return float(json.loads((run / "result.json").read_text(encoding="utf-8"))["range_test"]["lr"])


def exported(contest: Contest, name: str, seed: int) -> Path:
    """The export of an entrant of ours that has run with this seed, held-out and scored guard pairs unseen."""
    folder, data = contest.place(name, seed), contest.data
    entrant, alpha = EXPORTS[name]
    words = ["--to", folder / "model", "--alpha", alpha, "--calibrate", "--scratch", contest.folder / "scratch", "--device", "cpu"]
    words += ["--guard-csv", data.csv("guard-for-alpha"), "--guard-lmdb", data.images]
    command = [sys.executable, "-m", "job", "export", contest.place(entrant, seed) / "run", *words]
    _run(command, cwd=REPOSITORY, log=folder / "log")
    return folder / "model"


def post(contest: Contest, name: str, rate: float, seed: int) -> Path:
    folder, data = contest.place(name, seed), contest.data
    weights = folder / "weights.pt"
    words = ["--csv", data.csv("train", seed), "--lmdb", data.images, "--pretrained", contest.base, "--save", weights]
    words += ["--epochs", contest.epochs, "--batch", BATCH, "--lr", rate, "--seed", seed]
    _run([sys.executable, "-m", "benchmarks.plain_loop", *words], cwd=REPOSITORY, log=folder / "log")
    return weights


def open_clip(contest: Contest, name: str, flags: Sequence[object], seed: int) -> Path:
    folder = contest.place(name, seed)
    words = ["--dataset-type", "csv", "--train-data", contest.data.csv("train-files", seed), "--csv-separator", "|"]
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
    always += ["--torch-threads", THREADS, "--threads", THREADS]
    _run([sys.executable, "-m", "job", "train", *always, *words], cwd=REPOSITORY, log=run.with_name(f"{run.name}.log"))


def _run(command: Sequence[object], *, cwd: Path, log: Path, environment: dict[str, str] | None = None) -> None:
    """Raises: SystemExit, with the end of what the command printed, if it fails."""
    words = [str(word) for word in command]
    variables = {**(environment or os.environ), "OMP_NUM_THREADS": str(THREADS)}
    with log.open("wb") as stream:
        code = subprocess.run(words, cwd=cwd, env=variables, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def entrants(contest: Contest, *, quick: bool, rivals: str = "") -> dict[str, Entrant]:
    """In the order of the table; what one needs of another comes later. Args: rivals: a pattern that names of rivals must match."""
    found: dict[str, Entrant] = {BASE: lambda _seed: contest.base}
    for rate in POST_RATES:
        name = f"{POST}, Adam {_shown(rate)}"
        found[name] = partial(post, contest, name, rate)
    found[OPEN_CLIP_DEFAULTS] = partial(open_clip, contest, OPEN_CLIP_DEFAULTS, [])
    warm_up = max(1, contest.steps // 10)
    for rate in OPEN_CLIP_RATES[-2:] if quick else OPEN_CLIP_RATES:
        name = f"{OPEN_CLIP}, lr {_shown(rate)}, warm-up {warm_up}"
        found[name] = partial(open_clip, contest, name, ["--lr", rate, "--warmup", warm_up])
    clipped = f"{OPEN_CLIP}, {CLIPPED}, lr 1e-3, warm-up {warm_up}"
    found[clipped] = partial(open_clip, contest, clipped, ["--lr", 1e-3, "--warmup", warm_up, "--grad-clip-norm", 1])
    found = {name: entrant for name, entrant in found.items() if name == BASE or re.search(rivals, name)}
    for name, flags in OURS.items():
        found[name] = partial(ours, contest, name, ["--lr", "1e-3"] if quick else flags)  # auto asks for 100 steps
    found[LAST] = lambda seed: contest.place(OURS_DEFAULT, seed) / "run" / "export" / "final"
    found |= {name: partial(exported, contest, name) for name in EXPORTS}
    return found


def _shown(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def requirements(measured: dict[str, dict[str, Floats]], rivals: dict[str, str], draws: Draws, *, quick: bool) -> list[Limit]:
    """About the far end of each interval: better at recall, and at most half of what is forgotten and of the calibration error.
    Then all of that of one model, against the rival that has learnt most."""
    bound = None if quick else 0.0  # one epoch teaches nothing
    limits = []

    def better(own: str, rival: str, what: str, metric: str) -> None:
        found = difference(measured[own][metric], measured[rivals[rival]][metric], draws)
        name = f"{what}{metric}, less that of {rival}"
        limits.append(Limit(name, found.low, bound, "", at_least=True, strict=True, spread=str(found)))

    def half(own: str, rival: str, what: str, metric: str) -> None:
        found = difference(measured[own][metric], measured[rivals[rival]][metric], draws, share=0.5)
        name = f"{what}{metric}, less half of that of {rival}"
        limits.append(Limit(name, found.high, bound, "", strict=True, spread=str(found)))

    for rival in rivals:
        for metric in ("recall@1", "recall@5"):
            better(OURS_DEFAULT, rival, "", metric)
            better(EXPORTED, rival, "exported: ", metric)
    for metric in ("forgotten", "ECE"):
        for rival in rivals:
            half(EXPORTED, rival, "exported: ", metric)
    tuned, what = next(rival for rival in rivals if "tuned" in rival), "--lock-image, alpha 1, calibrated: "
    for metric in ("recall@1", "recall@5"):
        better(LOCKED_WHOLE, tuned, what, metric)
    for metric in ("forgotten", "ECE"):
        half(LOCKED_WHOLE, tuned, what, metric)
    return limits


def chosen_rivals(recall: dict[str, float]) -> dict[str, str]:
    """Of each other trainer the learning rate with the best recall of all held-out pairs, and open_clip's defaults: label and
    entrant."""
    rates = {trainer: [name for name in recall if name.startswith(f"{trainer}, ")] for trainer in (POST, OPEN_CLIP)}
    defaults = [name for name in rates[OPEN_CLIP] if name == OPEN_CLIP_DEFAULTS]
    tuned = [name for name in rates[OPEN_CLIP] if name != OPEN_CLIP_DEFAULTS and CLIPPED not in name]
    chosen = {name: name for name in sorted(rates[POST], key=recall.__getitem__)[-1:]}
    chosen |= {f"{OPEN_CLIP}, its defaults": name for name in defaults}
    best = max(tuned, key=recall.__getitem__)
    return chosen | {best.replace(", lr", ", tuned: lr"): best}


def over_seeds(values_S: Floats) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values_S):.3f}" if len(values_S) > 1 else ""
    return f"{values_S.mean():.3f}{spread}"


def report(measured: dict[str, dict[str, Floats]], rivals: dict[str, str], draws: Draws, limits: Sequence[Limit]) -> str:
    """The tables."""
    rows = [(name, *(over_seeds(figures[metric][:, 0]) for metric in METRICS)) for name, figures in measured.items()]
    compared = ("recall@1", "recall@5", "forgotten", "ECE")
    pairs = [(own, label, rival) for own in (OURS_DEFAULT, *EXPORTS) for label, rival in rivals.items()]
    differences = [
        (f"{own} − {label}", *(str(difference(measured[own][metric], measured[rival][metric], draws)) for metric in compared))
        for own, label, rival in [*pairs, (OURS_DEFAULT, "its last step", LAST)]
    ]
    bounds = [limit.row() for limit in limits]
    columns = ("", "difference (95 % interval)", "required of the interval", "")
    return "\n\n".join((table(("", *METRICS), rows), table(("", *compared), differences), table(columns, bounds)))


def contest_arguments(description: str) -> argparse.ArgumentParser:
    parser = arguments(description, repeats=FOLDS)
    parser.add_argument(
        "--clip-art", type=Path, nargs="?", const=CLIP_ART_FOLDER, metavar="FOLDER", help="tune to clip art instead"
    )
    parser.add_argument("--pairs", choices=CLIP_ART, default="all", help="which, with --clip-art [default: %(default)s]")
    return parser


def written(args: argparse.Namespace, folder: Path) -> Data:
    """The data that the arguments ask for."""
    return write_data(folder, clip_art_folder=args.clip_art, pairs=args.pairs)


def main() -> int:
    parser = contest_arguments(__doc__ or "")
    parser.add_argument(
        "--rivals", default="", metavar="PATTERN", help="only those with such a name, one of open_clip_train's rates among them"
    )
    args = parser.parse_args()
    args.repeats = 1 if args.quick else min(args.repeats, FOLDS)
    set_up_logging()  # else open_clip warns at each evaluation that it has not loaded the weights itself
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.ExitStack() as closing:
        folder = Path(name).absolute()
        contest = Contest(written(args, folder), folder, epochs=1 if args.quick else 10)
        say(f"the base model, then {args.repeats} seeds of {contest.steps} steps each; rows: {contest.data.rows}")
        train_base(contest, epochs=1 if args.quick else 20)
        staging = closing.enter_context(Staging(folder / "scratch"))
        csvs = [contest.data.csv("guard"), *(contest.data.csv("held-out", seed) for seed in range(args.repeats))]
        guard, *held_out = [open_pairs(str(csv), str(contest.data.images), staging=staging, reading=Reading()) for csv in csvs]
        for opened in (guard, *held_out):
            closing.callback(opened.images.close)
        competing = entrants(contest, quick=args.quick, rivals=args.rivals)

        def compete(seed: int) -> tuple[dict[str, dict[str, Answers]], dict[str, float]]:
            """Answers of each entrant, and the alpha of each export that looked for it."""
            answered = {}
            for name, train in competing.items():
                say(f"seed {seed}: {name}")
                made = train(seed)
                weights = made / WEIGHTS_FILE if made.is_dir() else made
                answered[name] = {
                    part: answers(weights, contest.base, opened)
                    for part, opened in (("held-out", held_out[seed]), ("guard", guard))
                }
            alphas = {
                entrant: json.loads((contest.place(name, seed) / "model" / "alpha.json").read_text(encoding="utf-8"))["alpha"]
                for name, (entrant, alpha) in EXPORTS.items()
                if alpha == "auto"
            }
            shutil.rmtree(folder / f"seed-{seed}")  # 2 GB
            return answered, alphas

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) // THREADS) as pool:
            of_seeds = list(pool.map(compete, range(args.repeats)))
        found = {name: [answered[name] for answered, _ in of_seeds] for name in competing}
        alphas = {entrant: [of_seed[entrant] for _, of_seed in of_seeds] for entrant in (OURS_DEFAULT, LOCKED)}
    sizes = {part: len(answered.text_ranks) for part, answered in found[BASE][0].items()}
    draws = draw(held_out=sizes["held-out"], guard=sizes["guard"], seeds=args.repeats)
    measured = {name: measure(answered, found[BASE], draws) for name, answered in found.items()}
    rivals = chosen_rivals({name: statistics.mean(one["held-out"].mean_recall for one in of) for name, of in found.items()})
    limits = requirements(measured, rivals, draws, quick=args.quick)
    about = (
        f"{contest.data.rows['train']} training pairs, batch {BATCH}, {contest.steps} steps each, {args.repeats} seeds, "
        f"each with {sizes['held-out']} other images held out; {sizes['guard']} images of the guard. Mean of both directions; mean "
        "over seeds ± standard deviation. Forgotten: recall@5 on the guard, less than the base's. "
        f"{RESAMPLES} paired resamples of queries and seeds. "
        f"Exported alphas: {', '.join(map(str, alphas[OURS_DEFAULT]))}; with --lock-image {', '.join(map(str, alphas[LOCKED]))}."
    )
    raw: dict[str, Any] = {name: {metric: values[:, 0].tolist() for metric, values in of.items()} for name, of in measured.items()}
    text = f"{about}\n\n{report(measured, rivals, draws, limits)}"
    return publish(args, "Quality", text, limits=limits, raw={"seeds": raw, "alphas": alphas, "rows": contest.data.rows})


if __name__ == "__main__":
    sys.exit(main())
