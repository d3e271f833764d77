"""Prints docs/configuration.md from Config: `make docs`."""

from job.config import FIELDS, type_name
from job.fields import default_text, flag

HEAD = """# Configuration

<!-- Written by `make docs` from job/config.py; a test compares them. -->

Every setting has one name: `--max-steps` on the command line is `CLIPJOB_MAX_STEPS` in the environment, `max_steps` in a TOML file
(`--config job.toml`, one flat table) and in the run's `config.json`. Where several are given, flags win over the environment, the
environment over the file, the file over what the run has stored, and that over the defaults. An unknown name is an error.

A restart of a run takes what is stored. Settings marked *may change* can be given another value then; a different value of
any other ends with exit code 78, naming both.

An *interval* is written `30s`, `10m`, `2h` (time), `200` (steps), `1ep` (epochs), `auto`, or `0` (never).

| flag | type | default | may change | meaning |
|---|---|---|---|---|
"""


def rows() -> list[str]:
    found = []
    for name, spec in FIELDS.items():
        rule = spec.metadata
        default = f"`{default_text(spec)}`".replace("|", "\\|") if default_text(spec) else ""
        kind = " ".join(f"`{choice}`" for choice in rule["choices"]) or type_name(name)
        meaning = rule["help"].replace("|", "\\|")
        found.append(f"| `{flag(name)}` | {kind} | {default} | {'yes' if rule['may_change'] else ''} | {meaning} |")
    return found


def page() -> str:
    return HEAD + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
