"""Weights files: safetensors, and what torch.save wrote, without ever running what a pickle asks for."""

import pickle
import re
from pathlib import Path

import open_clip
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from job.errors import DataError
from job.storage.files import explained


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file that open_clip loads with `pretrained=`."""
    with explained(str(path), "writing", writing=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def load_weights(module: nn.Module, path: str, *, model: str) -> None:
    """Raises: DataError, naming the file and why; nothing in a pickle is ever run."""
    try:
        open_clip.factory.load_checkpoint(module, path, strict=True, weights_only=True)
    except _LOADING_ERRORS as error:
        raise DataError(f"The weights file {path} {_fault(error, model=model)}") from None


_LOADING_ERRORS = (
    *(pickle.UnpicklingError, SafetensorError, OSError, RuntimeError, KeyError),
    *(AttributeError, ValueError, EOFError, TypeError, StopIteration),
)


def _fault(error: Exception, *, model: str) -> str:
    """What is wrong with a weights file and what to do, as the end of a sentence about it."""
    text = str(error)
    code = re.search(r"(?:GLOBAL|function) ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"is not plain tensors and was not loaded: that would run {code[1]}. If you trust it, convert it to safetensors first."
        )
    if "TorchScript" in text:
        return "is a TorchScript program and was not loaded. If you trust it, save its state_dict() as safetensors first."
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError) or "PytorchStreamReader" in text:
        detail = f" ({first_line(error)})" if isinstance(error, SafetensorError) else ""
        return f"is damaged, or neither safetensors nor made by torch.save{detail}. Fetch it again."
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}. Check --pretrained."
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Error(s) in loading")]
    reasons = " ".join(line if len(line) <= 150 else f"{line[:149]}…" for line in lines[:3])
    return f"does not hold the weights of {model}: {reasons.rstrip('.')}. Check --model and --pretrained."


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
