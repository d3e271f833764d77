"""From what the user asked for, by whatever way, and what the run has stored, to the job's Config."""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.config import FIELDS, Config, is_auto, parse_value
from job.errors import ConfigError, ResumeError
from job.fields import AUTO, Interval, flag

ENVIRONMENT_PREFIX = "CLIPJOB_"
_CREDENTIALS = re.compile(r"://[^/]*@|[?&](X-Amz-)?(Signature|Credential|Security-Token|sig)=", re.IGNORECASE)

_RETIRED = (("layer_decay", 1.0),)
"""Settings of older versions, each with the value that did what is done now; a run that has another can't go on."""


def _nearest(name: str, *, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(FIELDS), n=1, cutoff=0.5)
    if not close:
        return "Remove it, or find the right name in `clipjob train --help`."
    return f"Did you mean {prefix}{close[0].upper() if prefix else close[0]}?"


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings in CLIPJOB_* variables.

    Raises: ConfigError for an unknown one, unless it is what a Kubernetes Service named clipjob… injects
    (…_SERVICE_HOST, …_PORT and their kin).
    """
    settings = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in FIELDS:
            settings[name] = parse_value(name, text, origin=variable)
        elif not _injected_by_kubernetes(variable, text) and name != "config":
            nearest = _nearest(name, prefix=ENVIRONMENT_PREFIX)
            raise ConfigError(f"The environment variable {variable} is not a setting of clipjob. {nearest}")
    return settings


def _injected_by_kubernetes(variable: str, text: str) -> bool:
    return bool(re.search(r"_SERVICE_HOST$|_SERVICE_PORT|_PORT(_\d+_(TCP|UDP))?(_\w+)?$", variable)) or text.startswith("tcp://")


def from_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file, one flat table.

    Raises: ConfigError when the file can't be read or parsed, or holds an unknown key.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The config file {path} can't be read ({error.strerror}). Check --config or CLIPJOB_CONFIG.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The config file {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config file {path} is not valid TOML: {error}. Mend that line; text stands in quotes.") from None
    return from_mapping(table, origin=path)


def from_mapping(table: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Settings checked for unknown names and converted. Raises: ConfigError."""
    for name in table:
        if name not in FIELDS and isinstance(table[name], dict):
            raise ConfigError(f"{origin} has a section [{name}], and settings stand in no section. Remove that line.")
        if name not in FIELDS:
            raise ConfigError(f"{origin}: '{name}' is not a setting of clipjob. {_nearest(str(name))}")
    return {name: parse_value(name, value, origin=f"{origin}: {name}") for name, value in table.items()}


def merge(*, flags: Mapping[str, Any], environ: Mapping[str, str], config_file: str = "") -> dict[str, Any]:
    """What the user asked for: flags over environment over file. Local paths become absolute, so that a run can be
    resumed from another folder."""
    given = {**(from_toml(config_file) if config_file else {}), **from_environment(environ), **flags}
    for name in ("run", "csv", "lmdb", "val_csv", "val_lmdb", "guard_csv", "guard_lmdb", "scratch", "init_from"):
        if given.get(name) and "://" not in given[name]:
            given[name] = _absolute(given[name], several=name.endswith("lmdb"))
        elif given.get(name) and _CREDENTIALS.search(given[name]):
            raise ConfigError(
                f"{flag(name)} carries credentials, and the run would keep them. Give a plain URI, and credentials where every "
                "client looks (AWS_ACCESS_KEY_ID, ~/.aws, a role)."
            )
        elif given.get(name) and not given[name].split("://")[1].strip("/"):
            raise ConfigError(f"{flag(name)} {given[name]} names no place. Give all of it, such as s3://bucket/folder.")
    for name in ("model", "pretrained"):  # a name of open_clip, unless there is such a file
        if given.get(name) and os.path.exists(given[name]):
            given[name] = os.path.abspath(given[name])
    return given


def _absolute(path: str, *, several: bool) -> str:
    """A local path from the root. Args: several: it may be several with commas between, unless there is such a file."""
    whole = os.path.abspath(os.path.expanduser(path))
    if not several or "," not in path or os.path.exists(whole):
        return whole
    return ",".join(os.path.abspath(os.path.expanduser(part.strip())) for part in path.split(",") if part.strip())


def resolve(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None, *, require_run: bool = True) -> Config:
    """The job's Config: what was given, else what the run has stored, else defaults.

    Args:
        given: from `merge`.
        stored: the settings in the run's config.json, with every `auto` resolved; None for a new run.
    Raises:
        ConfigError: a bad value, or a required one missing.
        ResumeError: given contradicts stored in fields that may not change; every one is named with both values.
    """
    kept = {name: value for name, value in (stored or {}).items() if (name, value) not in _RETIRED}
    try:
        before = from_mapping(kept, origin="config.json")
    except ConfigError as error:
        raise ResumeError(f"{error} {_OTHER_HAND}") from None
    if stored is not None:  # settings that an older version did not know were as they are by default
        before = {name: spec.default for name, spec in FIELDS.items() if not spec.metadata["may_change"]} | before
    wrong = [
        f"{flag(name)} was {shown(name, before[name])}, now {shown(name, value)}"
        for name, value in given.items()
        if name in before and not FIELDS[name].metadata["may_change"] and not _agrees(name, value, before[name])
    ]
    if wrong:
        free = ", ".join(flag(name) for name, spec in FIELDS.items() if spec.metadata["may_change"])
        raise ResumeError(
            f"The run {given.get('run', '')} was started with other settings: {'; '.join(wrong)}. Leave these out to go on with "
            "the run's own, or choose another --run (with --init-from to start from this one's weights). "
            f"A restart may change: {free}."
        )
    found = {name for name, value in given.items() if value == AUTO and FIELDS[name].metadata["choices"]}  # by an earlier attempt
    adopted = {
        name: value
        for name, value in given.items()
        if name not in before or (FIELDS[name].metadata["may_change"] and name not in found)
    }
    config = Config(**{**before, **adopted})
    missing = [flag(name) for name in ("run", "csv", "lmdb")[0 if require_run else 1 :] if not getattr(config, name)]
    if missing:
        raise ConfigError(f"Missing {' and '.join(missing)}. A job needs a CSV, an LMDB and the folder or URI of its run.")
    return config


def settings_of(stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings in a run's config.json; None for a new run. Raises: ResumeError, when they are not there."""
    if stored is None:
        return None
    settings = stored.get("config")
    if not isinstance(settings, dict) or not isinstance(stored.get("data"), dict):
        raise ResumeError(f"config.json of the run lacks its settings or what it says of the data. {_OTHER_HAND}")
    return settings


_OTHER_HAND = (
    "The run was written by another version of clipjob, or changed by hand: use that version, or start a new run at another --run."
)


def _agrees(name: str, given: Any, stored: Any) -> bool:
    """Whether a value means what is stored: `auto` agrees with what it was resolved to, and a file may have moved."""
    if given == stored or given in (AUTO, Interval(AUTO)):
        return True
    if is_auto(name, given):
        return name != "lr"  # whose auto would be measured, and is not what another rate stands for
    if name == "torch_threads":
        return bool(given == 0)
    if name in ("image_column", "caption_column"):  # found whatever the case, stored as the CSV spells it
        return bool(given.casefold() == stored.casefold())
    if name == "csv_separator":
        return bool({"\\t": "tab", "\t": "tab"}.get(given.lower(), given.lower()) == stored)
    return isinstance(given, str) and os.path.isabs(given) and os.path.basename(given) == os.path.basename(stored)


def shown(name: str, value: Any) -> str:
    """A setting's value as messages show it."""
    if is_auto(name, value):
        return AUTO
    return repr(value) if isinstance(value, str) else str(value)
