"""The rules that keep the code readable: imports point down, files stay short, --help answers at once."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "job"

RANKS = [
    {"__main__", "launch", "cli", "commands", "spawn"},
    {
        "train",
        "attempt",
        "claim",
        "start",
        "finish",
        "fitted",
        "locked",
        "range_test",
        "telemetry",
        "inputs",
        "inspect_run",
        "watch",
        "result",
        "demo",
        "settings",
    },
    {"evaluate"},
    {"report"},
    {"model", "checkpoint"},
    {"data"},
    {"runtime", "storage"},
    {"config", "fields", "errors", "__init__"},
]
"""Rooms from top to bottom. A room imports from its own rank and from those below."""


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def rank_of(room: str) -> int:
    return next(rank for rank, rooms in enumerate(RANKS) if room in rooms)


def imports() -> list[tuple[str, str]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute"
                names = [f"job.{alias.name}" for alias in node.names] if node.module == "job" else [node.module or ""]
            found += [(module, name) for name in names if name.split(".")[0] == "job"]
    return found


def test_imports_point_down() -> None:
    wrong = [f"{module} -> {name}" for module, name in imports() if rank_of(room_of(module)) > rank_of(room_of(name))]
    assert not wrong


def test_only_the_top_sees_the_whole_config() -> None:
    users = {module for module, _ in imports() if "Config" in _names_from_config(module)}
    assert users <= {
        "job.train",
        "job.claim",
        "job.start",
        "job.finish",
        "job.fitted",
        "job.locked",
        "job.range_test",
        "job.telemetry",
        "job.inputs",
        "job.settings",
    }


def _names_from_config(module: str) -> set[str]:
    path = (ROOT / Path(*module.split("."))).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "job.config"
        for alias in node.names
    }


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 300}


def test_no_file_is_called_utils() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common", "misc")]


HEAVY = ("torch", "open_clip", "pandas", "numpy", "fsspec", "s3fs", "PIL", "lmdb")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['clipjob', *{arguments!r}]\n"
        "from job.launch import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_help_is_quick() -> None:
    """Beside what Python takes to start with click, so that no other process's work counts: 0.1 s on an idle core."""
    help_seconds, bare_seconds = (
        min(cpu_seconds([sys.executable, *words]) for _ in range(5)) for words in (["-m", "job", "--help"], ["-c", "import click"])
    )
    assert help_seconds < 3 * bare_seconds, (help_seconds, bare_seconds)


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_store_storage_and_report_need_no_torch() -> None:
    rooms = "job.checkpoint.store, job.inspect_run, job.data.manifest, job.data.pack, job.report.page, job.report.compare"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"
