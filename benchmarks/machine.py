"""What the benchmarks share: the machine, repeats in pairs, memory of a child process, the table. Standard library only."""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "open_clip_torch", "pillow", "pandas", "numpy", "lmdb")

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """One figure, and the bound that it must keep."""

    what: str
    found: float
    bound: float | None
    """None: a figure to know, with no promise."""
    unit: str
    at_least: bool = False
    """The bound is a lower one."""
    strict: bool = False
    """The bound itself does not do."""
    spread: str = ""
    """found as text with min and max, where there were repeats."""

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return True
        if self.found == self.bound:
            return not self.strict
        return self.found > self.bound if self.at_least else self.found < self.bound

    def row(self) -> tuple[str, str, str, str]:
        """Cells for a table with the columns LIMIT_COLUMNS."""
        found = f"{self.spread or format(self.found, '.3g')} {self.unit}".strip()
        if self.bound is None:
            return self.what, found, "", ""
        sign = (">" if self.at_least else "<") if self.strict else ("≥" if self.at_least else "≤")
        return self.what, found, f"{sign} {self.bound:g} {self.unit}".strip(), "pass" if self.ok else "**FAIL**"


LIMIT_COLUMNS = ("what", "median (min–max)", "required", "")


def arguments(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--repeats", type=int, default=repeats, help="[default: %(default)s]")
    parser.add_argument("--folder", type=Path, help="where temporary data goes [default: the system's temporary folder]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown also here")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark with --device. Ends it before any work, where that is not here."""
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here: run this on a machine with a GPU, or without --device cuda")
    return args


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def publish(args: argparse.Namespace, title: str, text: str, *, limits: Sequence[Limit], raw: dict[str, Any]) -> int:
    """Prints the report and writes it where the flags say. Returns: the exit code, 1 if a limit was missed."""
    facts = machine()
    small = " (quick: small sizes, not what the limits are about)" if args.quick else ""
    report = f"# {title}{small}\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()) + f"\n\n{text}\n"
    print(report, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report, encoding="utf-8")
    if args.json:
        figures = {"title": title, "quick": args.quick, "machine": facts, "raw": raw, "limits": [asdict(limit) for limit in limits]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return 0 if all(limit.ok for limit in limits) else 1


def machine() -> dict[str, str]:
    """Everything that a reader needs to judge the figures, or to repeat them."""
    installed = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    script = "" if sys.modules["__main__"].__spec__ is None else sys.modules["__main__"].__spec__.name
    return {
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB RAM, {platform.system()}",
        "versions": ", ".join([f"python {platform.python_version()}", *installed]),
        "commit": _commit(),
        "command": f"`python -m {script} {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "job", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git)"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range as text."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def paired(variants: dict[str, Callable[[], T]], *, rounds: int, warm_up: bool = True) -> dict[str, list[T]]:
    """Runs A B C, C B A, A B C, … so that a machine that slows down or speeds up does so for all; one unmeasured round first."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    for turn in range(-1 if warm_up else 0, rounds):
        say(f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up")
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            result = variants[name]()
            if turn >= 0:
                results[name].append(result)
    return results


def ratios(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, list[float]]:
    """(ratio of the medians, ratio in each round)."""
    return statistics.median(ours) / statistics.median(baseline), [a / b for a, b in zip(ours, baseline, strict=True)]


def in_child(function: Callable[..., T], *args: Any) -> T:
    """What the function returns in a fresh Python process, whose memory holds nothing of this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rss_bytes() -> int:
    """Memory of this process that is resident now, pages of mapped files included."""
    return _status_bytes("VmRSS")


def mapped_bytes() -> int:
    """The part of it that is pages of files: the kernel shares them with its cache and takes them back when memory is short."""
    return _status_bytes("RssFile")


def peak_rss_bytes() -> int:
    """The most that was ever resident. Not ru_maxrss: a child inherits that one's value from the process that started it."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; these benchmarks need Linux")
