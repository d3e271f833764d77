"""What the preflight found: facts, problems with their remedies, and both as text for a terminal or as JSON."""

import json
import shutil
import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

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

    @property
    def ok(self) -> bool:
        """Whether the job may start: no errors, whatever the warnings."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_json(self) -> str:
        problems = [asdict(problem) for problem in self.problems]
        return json.dumps({"ok": self.ok, "facts": self.facts, "problems": problems}, indent=2, ensure_ascii=False)


def render_table(report: Report, *, width: int = 0) -> str:
    """The report as aligned plain text; width 0: the terminal's."""
    width = max(40, width or shutil.get_terminal_size((100, 24)).columns)
    labels = {name: _label(name) for name in report.facts}
    left = max(map(len, labels.values()), default=0)
    lines = [f"{labels[name]:<{left}}  {_value(name, value)}" for name, value in report.facts.items()]
    order = ("error", "warning", "advice")
    for problem in sorted(report.problems, key=lambda problem: order.index(problem.severity)):
        head = f"{problem.severity.upper()} {problem.name}: "
        lines += [
            "",
            *textwrap.wrap(head + problem.text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False),
        ]
    errors, warnings = (sum(problem.severity == severity for problem in report.problems) for severity in order[:2])
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    lines += ["", f"The data is {'fit' if report.ok else 'not fit'} for training: {counts}."]
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
