"""Logs: one JSON object per line on stderr, or short lines where a person looks on."""

import json
import logging
import sys
import time
from typing import Any

from job.runtime.ranks import ALONE, Ranks

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


_context: dict[str, Any] = {}


def always_with(**fields: Any) -> None:
    """Fields of every line from now on: run, attempt, rank, step."""
    _context.update(fields)


class JsonLines(logging.Formatter):
    """One line per event: time, level, event, what stands in every line, and the fields given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        given = _context | {name: value for name, value in vars(record).items() if name not in _STANDARD}
        line = given | line  # no field takes the place of these three
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class ShortLines(logging.Formatter):
    """For a terminal: the event and its fields, warnings marked."""

    def format(self, record: logging.LogRecord) -> str:
        fields = ", ".join(f"{name} {_short(value)}" for name, value in vars(record).items() if name not in _STANDARD)
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{mark}{record.getMessage()}" + (f" ({fields})" if fields else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _AboveLiveLine(logging.StreamHandler[Any]):
    """Writes above a tqdm bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(ranks: Ranks = ALONE) -> None:
    """Sends our own log to stderr; libraries only from warnings on. Of several ranks the first tells what happens to all, and the
    others only what goes wrong, with their number."""
    terminal = sys.stderr.isatty()
    handler = _AboveLiveLine() if terminal else logging.StreamHandler()
    handler.setFormatter(ShortLines() if terminal else JsonLines())
    handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.ERROR)  # open_clip warns of normal cases
    if ranks.size > 1:
        always_with(rank=ranks.rank)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("job").setLevel(logging.WARNING if ranks.rank else logging.INFO)
    logging.captureWarnings(True)
