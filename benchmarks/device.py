"""What a report says of the device."""

import torch

from job.runtime.device import choose_precision


def device_name(device: str) -> str:
    """What a reader should know of it besides the machine: a GPU's name, or whether a CPU has bf16 instructions."""
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"the CPU ({'which has' if cpu_has_bf16() else 'which has no'} bf16 instructions)"


def cpu_has_bf16() -> bool:
    """Without the instructions torch emulates bf16, which takes many times as long as float32."""
    return choose_precision("auto", torch.device("cpu")) == "bf16"
