"""What a field of Config is made of: kinds of values, rules, and how text becomes a value."""

import dataclasses
import operator
import re
from dataclasses import dataclass, field
from typing import Any

from job.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True)
class Interval:
    """How often something happens: ``30s``, ``10m``, ``2h`` (time), ``200`` (steps), ``1ep`` (epochs), ``auto``, ``0`` (never)."""

    kind: str
    """One of seconds, steps, epochs, auto, never."""
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Raises: ValueError, when the text is none of the forms above."""
        if text == AUTO:
            return cls(AUTO)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|ep)?", text.strip())
        if not match:
            raise ValueError("expected 30s, 10m, 2h, 200 (steps), 1ep (epochs), auto or 0 (never)")
        number, unit = float(match[1]), match[2]
        if number == 0:
            return cls("never")
        if unit == "ep":
            return cls("epochs", number)
        if unit:
            return cls("seconds", number * {"s": 1, "m": 60, "h": 3600}[unit])
        if number != int(number):
            raise ValueError("a number of steps must be whole")
        return cls("steps", number)

    def __str__(self) -> str:
        if self.kind in (AUTO, "never"):
            return {"never": "0"}.get(self.kind, self.kind)
        number = int(self.value) if self.value == int(self.value) else self.value
        return f"{number}" + {"seconds": "s", "epochs": "ep", "steps": ""}[self.kind]


def option(
    default: Any,
    help_text: str,
    *,
    may_change: bool = False,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    repeats: bool = False,
    auto: float | None = None,
) -> Any:
    """One field of Config.

    Args: may_change: a restart of the same run may give another value. repeats: so may its flag; what is given is joined by
    commas. auto: the number that the word auto stands for, until the job has found a better one.
    """
    metadata = {
        "help": help_text,
        "may_change": may_change,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "repeats": repeats,
        "auto": auto,
    }
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")


def stands_for_auto(spec: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field's value is the number that the word auto becomes."""
    return bool(value == spec.metadata["auto"] is not None)


def default_text(spec: dataclasses.Field[Any]) -> str:
    """The default of a field as documentation shows it; empty for an empty text and false."""
    if stands_for_auto(spec, spec.default):
        return AUTO
    return "" if spec.default in ("", False) else str(spec.default)


def check_value(spec: dataclasses.Field[Any], value: Any) -> None:
    """Raises: ConfigError, when the value breaks a rule of its field."""
    rule = spec.metadata
    if stands_for_auto(spec, value):
        return
    if rule["choices"] and value not in rule["choices"]:
        raise ConfigError(f"{flag(spec.name)} must be one of {', '.join(rule['choices'])}; found {value!r}.")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{flag(spec.name)} must be a finite number; found {value}.")
    for bound, outside, words in (
        ("at_least", operator.lt, "at least"),
        ("above", operator.le, "above"),
        ("at_most", operator.gt, "at most"),
    ):
        if rule[bound] is not None and outside(value, rule[bound]):
            raise ConfigError(f"{flag(spec.name)} must be {words} {rule[bound]:g}; found {value:g}.")


def parse(spec: dataclasses.Field[Any], kind: type, value: Any, *, origin: str) -> Any:
    """Turns text (flag, environment) or a TOML/JSON value into the field's type.

    Raises: ConfigError, naming origin (such as "CLIPJOB_LR" or "job.toml: lr"), what was expected and what was found.
    """
    if value == AUTO and spec.metadata["auto"] is not None:
        return kind(spec.metadata["auto"])
    try:
        if kind is Interval:
            return value if isinstance(value, Interval) else Interval.parse(str(value))
        if kind is bool:
            return _parse_bool(value)
        if kind is str:
            if not isinstance(value, str):
                raise ValueError("expected text")
            return value
        if isinstance(value, bool):
            raise ValueError("expected a number")
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError("expected a whole number")
        return kind(value)
    except (ValueError, TypeError, OverflowError) as error:
        expected = {int: "expected a whole number", float: "expected a number"}.get(kind, str(error))
        raise ConfigError(f"{origin}: {expected}; found {value!r}.") from None


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")
