"""What this node can do: device, precision, threads. Asked for and absent is an error, never a silent day on the CPU."""

import contextlib
import os
from pathlib import Path

import torch

from job.errors import ConfigError, DeviceError
from job.runtime.ranks import ALONE, Ranks

MAX_DECODE_THREADS = 16


def choose_device(asked: str, *, ranks: Ranks = ALONE) -> torch.device:
    """The device that was asked for; auto takes cuda, then mps, then cpu. Several ranks of a node take one GPU each.

    Raises: DeviceError, if it is absent or does not compute. ConfigError, if there is no such kind.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return _working_cuda(_own_cuda(ranks))
        return torch.device("mps" if torch.backends.mps.is_available() and ranks.size == 1 else "cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()) or (index and kind != "cuda"):
        raise ConfigError(f"--device must be auto, cuda, cuda:N, mps or cpu; found {asked!r}.")
    if ranks.size > 1 and (index or kind == "mps"):
        raise ConfigError(f"--device {asked} names one device, but there are {ranks.size} ranks. Use --device cuda, cpu or auto.")
    if kind == "cuda":
        return _working_cuda(asked if index else _own_cuda(ranks))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps was asked for, but this machine has none. Use --device auto or cpu.")
    return torch.device(kind)


def _own_cuda(ranks: Ranks) -> str:
    """The GPU of this rank. One visible GPU is its own: Slurm and containers may show each process only that."""
    count = torch.cuda.device_count()
    if ranks.local_size == 1 or count <= 1:
        return "cuda"
    if ranks.local_rank >= count:
        raise DeviceError(
            f"There are {ranks.local_size} ranks on this node, but {count} GPUs. Start one rank per GPU (--nproc-per-node {count})."
        )
    return f"cuda:{ranks.local_rank}"


def _working_cuda(name: str) -> torch.device:
    """A CUDA device on which one small product came out right."""
    advice = "Check nvidia-smi, the driver's version and the container's --gpus flag, or use --device cpu."
    try:
        device = torch.device(name)
        if ":" not in name:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # streams, events and pinned memory of all later code belong to it
        ones = torch.ones(8, 8, device=device)
        if (ones @ ones).sum().item() != 512:
            raise DeviceError(f"The GPU {name} computes wrong results. {advice}")
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise DeviceError(f"--device {name} can't be used: {reason.rstrip('.')}. {advice}") from None
    return device


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process on a GPU, by kind; empty on a CPU."""
    if device.type != "cuda":
        return {}
    read = {
        "allocated": torch.cuda.memory_allocated,
        "reserved": torch.cuda.memory_reserved,
        "peak": torch.cuda.max_memory_allocated,
    }
    return {kind: of_device(device) for kind, of_device in read.items()}


def device_failure(error: Exception) -> Exception:
    """A DeviceError for what the GPU itself failed with (lost, ECC, a failed launch); any other error as it is."""
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is None or not isinstance(error, accelerator_error):
        return error
    reason = (str(error).strip().splitlines() or ["unknown"])[0]
    return DeviceError(f"The GPU failed: {reason.rstrip('.')}. Start again on another node; dmesg and nvidia-smi -q say more here.")


def choose_precision(asked: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; auto takes the fastest that the device computes natively.

    Raises: DeviceError, for fp16 where no loss scaling is implemented.
    """
    if asked == "fp16" and device.type != "cuda":
        raise DeviceError(f"--precision fp16 needs a GPU; the device is {device.type}. Use bf16, fp32 or auto.")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    """Whether bf16 products are instructions here; emulated they are slower than float32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def autocast_dtype(precision: str) -> torch.dtype | None:
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def decode_threads(asked: int, *, ranks: Ranks = ALONE) -> int:
    return asked or min(MAX_DECODE_THREADS, cores_of_rank(ranks))


def cores_of_rank(ranks: Ranks) -> int:
    """This rank's share of the cores. Slurm gives each task its own, whether or not it also binds it to them."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "") if ranks.size > 1 else ""
    return min(cores(), int(given)) if given.isdigit() else max(1, cores() // ranks.local_size)


def cores() -> int:
    """Cores that this process may use, which in a container or a Slurm job are fewer than the machine's."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    return allowed
