"""TensorBoard's event files, for those who look at runs there. Off unless asked for."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import ConfigError

log = logging.getLogger(__name__)

OF_A_STEP = ("loss", "right_caption_probability", "accuracy_image_to_text", "accuracy_text_to_image", "lr", "gradient_norm")


def check_board(folder: str) -> None:
    """Raises: ConfigError, when TensorBoard is not installed, or could not write there."""
    if "://" in folder:
        raise ConfigError(f"--tensorboard must be a local folder; found {folder}.")
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave the setting out.")


class Board:
    """Writes what a step and an evaluation say. A disk that fails costs the events, not the job. Close it.

    Args:
        folder: of all attempts of a run; each writes a file of its own.
        step: where this attempt begins: what an earlier one wrote of later steps is done again, and TensorBoard hides it.
    Raises: ConfigError, when the folder can't be made.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise ConfigError(f"--tensorboard {folder}: {error.strerror}. Name a folder that can be written to.") from None

    def row(self, row: Mapping[str, Any], *, samples_per_second: float) -> None:
        """A step, as the history has it."""
        values = {f"train/{name}": row[name] for name in OF_A_STEP if row.get(name) is not None}
        self._add({**values, "speed/samples_per_second": samples_per_second}, step=row["step"])

    def evaluated(self, scores: Mapping[str, float], *, step: int) -> None:
        guard = {name for name in scores if name.startswith("guard_")}
        named = {f"guard/{name.removeprefix('guard_')}" if name in guard else f"held_out/{name}": scores[name] for name in scores}
        self._add(named, step=step)

    def close(self) -> None:
        self._guarded(lambda: self._writer.close())

    def _add(self, values: Mapping[str, float], *, step: int) -> None:
        def add() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        self._guarded(add)

    def _guarded(self, act: Any) -> None:
        if self._writer is None:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # a file that was closed after an error raises ValueError
            self._writer = None
            log.warning("no more events for TensorBoard in this attempt", extra={"reason": str(error)})
