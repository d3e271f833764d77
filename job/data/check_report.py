"""What the preflight found: facts, problems with their remedies, what the storage of the run can do; as text or as JSON."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from job.errors import DataError
from job.storage.probe import Finding

Severity = Literal["error", "warning", "advice"]


@dataclass(frozen=True)
class Problem:
    severity: Severity
    """error: the job would fail or learn nothing. warning: part of the data is lost. advice: it would run better otherwise."""
    name: str
    """A slug that scripts may rely on, such as missing-keys."""
    text: str
    """What was found, where, and what to do."""


Findings = tuple[dict[str, Any], list[Problem]]
"""Facts and problems that one part of the preflight adds to the report."""


@dataclass(frozen=True)
class Report:
    facts: dict[str, Any]
    """JSON values. Units stand in the names: _bytes, _share (0 to 1), _tokens, _pixels."""
    problems: list[Problem]
    storage: Sequence[Finding] = ()
    """What was tried at the place of the run."""

    @property
    def ok(self) -> bool:
        """Whether the job may start: no errors, whatever the warnings."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """That the job would end with: of what storage refuses, else of bad data, else 0."""
        for finding in self.storage:
            if finding.error and finding.fatal:
                return finding.error.exit_code
        return DataError.exit_code if any(problem.severity == "error" for problem in self.problems) else 0

    def to_json(self) -> str:
        found: dict[str, Any] = {"ok": self.ok, "facts": self.facts, "problems": [asdict(problem) for problem in self.problems]}
        if self.storage:
            found["storage"] = [{"operation": tried.operation, "state": tried.state, "text": tried.text} for tried in self.storage]
        return json.dumps(found, indent=2, ensure_ascii=False)

    def all_problems(self) -> list[Problem]:
        """Of the data and of storage, the worst first."""
        of_storage = [
            Problem("error" if tried.fatal else "warning", f"storage-{tried.operation}", tried.text)
            for tried in self.storage
            if tried.state != "ok"
        ]
        return sorted([*of_storage, *self.problems], key=lambda problem: _SEVERITIES.index(problem.severity))


_SEVERITIES = ("error", "warning", "advice")


def render_table(report: Report, *, width: int = 0) -> str:
    """The report as aligned plain text; width 0: the terminal's."""
    width = max(40, width or shutil.get_terminal_size((100, 24)).columns)
    labels = {name: _label(name) for name in report.facts} | {
        tried.operation: f"storage: {tried.operation}" for tried in report.storage
    }
    left = max(map(len, labels.values()), default=0)
    states = {"ok": "ok", "failed": "failed", "unsupported": "not supported"}
    lines = [f"{labels[name]:<{left}}  {_value(name, value)}" for name, value in report.facts.items()]
    lines += [f"{labels[tried.operation]:<{left}}  {states[tried.state]}" for tried in report.storage]
    problems = report.all_problems()
    for problem in problems:
        head = f"{problem.severity.upper()} {problem.name}: "
        lines += [
            "",
            *textwrap.wrap(head + problem.text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False),
        ]
    errors, warnings = (sum(problem.severity == severity for problem in problems) for severity in _SEVERITIES[:2])
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    what = "The data is" if not report.storage else "Data and storage are" if report.facts else "The storage is"
    lines += ["", f"{what} {'fit' if report.ok else 'not fit'} for training: {counts}."]
    return "\n".join(lines)


def shown_bytes(count: float) -> str:
    """1820000000 -> 1.82 GB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count:,}" for key, count in value.items())
    if isinstance(value, str) or value is None:
        return {"\t": "tab", None: "unknown"}.get(value) or str(value)
    if name.endswith("_bytes"):
        return shown_bytes(value)
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
