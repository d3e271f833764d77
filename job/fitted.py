"""What suits this node best, found by trying: how many pairs at a time fit the GPU, what decodes faster, whether compiling pays.

A part of train.py by rank. Rank 0 tries; what it finds holds for all and is kept in the run, so that a restart does the same.
"""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.attempt import Attempt, scratch_root
from job.config import Config
from job.data.batches import Samples, load_images
from job.data.captions import Captions
from job.data.dataset import Dataset
from job.data.gpu_jpeg import GpuJpegs
from job.errors import DeviceError
from job.fields import AUTO
from job.model.build import ClipModel
from job.model.fit import compile_where_faster, fitting_micro_batch, try_step
from job.model.towers import set_compiled
from job.runtime.device import autocast_dtype, decode_threads, device_failure

log = logging.getLogger(__name__)

_COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"

TRIED_CHUNKS = 16
"""Of images, decoded by each."""
CLEARLY_FASTER = 1.25
"""A GPU that decodes takes time from training, and a CPU that doesn't is idle."""
LARGEST_DIFFERENCE = 2.0
"""Levels of 255 between what the two make of an image, on average over its pixels."""


def fitted(config: Config, attempt: Attempt, dataset: Dataset, captions: Captions, clip: ClipModel) -> Config:
    """The config with --micro-batch, --compile and --jpeg-decoder as numbers and choices; blocks are compiled if they are to be.

    All ranks must call it. Raises: DeviceError, when what was asked for can't be had here. Stopped.
    """
    world = attempt.world
    rows, autocast = world.largest_part(config.global_batch_size), autocast_dtype(config.precision)
    _check(attempt)
    config = replace(config, jpeg_decoder=_jpeg_decoder(config, attempt, dataset, clip))
    groups: Sequence[Tensor] = ()
    if config.micro_batch < 0 or config.compile != "off":
        groups, clip = captions.tokens(captions.sample(rows)).groups, clip.to(attempt.device)
    _check(attempt)
    if config.micro_batch < 0:
        find = lambda: fitting_micro_batch(clip, groups, rows=rows, autocast=autocast)  # noqa: E731
        config = replace(config, micro_batch=world.share("micro-batch", find))
    _check(attempt)
    if config.compile != "off":
        config = replace(config, compile=_compiled(config, attempt, clip, groups, rows=rows, autocast=autocast))
    if attempt.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the peak that /metrics shows is that of training
    return config


def _check(attempt: Attempt) -> None:
    attempt.stop.check("trying what suits this node")
    attempt.watchdog.beat("trying what suits this node")


def gpu_jpegs(config: Config, device: torch.device) -> GpuJpegs | None:
    return GpuJpegs(device) if config.jpeg_decoder == "gpu" else None


def _compiled(
    config: Config, attempt: Attempt, clip: ClipModel, groups: Sequence[Tensor], *, rows: int, autocast: torch.dtype | None
) -> str:
    """on or off. Compiled code is kept in the scratch folder for later attempts, and made for the same batch each time."""
    folder = os.environ.get(_COMPILED_CODE, "")
    if not folder or Path(folder).parent == Path(tempfile.gettempdir()):  # importing torch's compiler sets it so
        os.environ[_COMPILED_CODE] = str(scratch_root(config.scratch) / "compiled")
    at_most = config.micro_batch or rows

    def find() -> str:
        if attempt.device.type != "cuda":
            log.info("not compiled: it has not been found to pay on a CPU")
            return "off"
        try:
            return "on" if compile_where_faster(clip, groups, rows=rows, at_most=at_most, autocast=autocast) else "off"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001
            _raise_if_device(error)
            set_compiled(clip.module, on=False)  # compilers fail in many ways, and eager code does without them
            log.warning("not compiled: %s", _reason(error))
            return "off"

    choice: str = attempt.world.share("compile", find) if config.compile == AUTO else config.compile
    if choice == "off":
        return choice
    if not set_compiled(clip.module, on=True):
        log.warning(
            "not compiled: the towers of this model are not made of open_clip's usual blocks", extra={"model": config.model}
        )
        return "off"
    _check(attempt)
    try:
        try_step(clip, groups, rows=rows, at_most=at_most, autocast=autocast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _raise_if_device(error)
        raise DeviceError(
            f"The blocks can't be compiled here: {_reason(error)}. If what is missing is a C compiler: the image has one when "
            'built with --build-arg PACKAGES="gcc libc6-dev". Or go on with --compile off.'
        ) from error
    return choice


def _raise_if_device(error: Exception) -> None:
    """Raises: DeviceError, if it is the GPU itself that has failed: after that it does nothing more for this process."""
    failure = device_failure(error)
    if failure is not error:
        raise failure from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _jpeg_decoder(config: Config, attempt: Attempt, dataset: Dataset, clip: ClipModel) -> str:
    """cpu or gpu."""
    known = config.lock_image and config.crop_scale == 1  # features of a locked tower: no image is decoded twice
    if config.jpeg_decoder == AUTO:
        if attempt.device.type != "cuda" or known:
            return "cpu"
        find = lambda: faster_decoder(config, attempt, dataset, clip, GpuJpegs(attempt.device))  # noqa: E731
        choice: str = attempt.world.share("JPEG decoder", find)
        return choice
    if config.jpeg_decoder == "gpu" and attempt.device.type != "cuda":
        raise DeviceError(f"--jpeg-decoder gpu needs a GPU; the device is {attempt.device.type}. Go on with --jpeg-decoder cpu.")
    return config.jpeg_decoder


def faster_decoder(config: Config, attempt: Attempt, dataset: Dataset, clip: ClipModel, gpu: GpuJpegs) -> str:
    """cpu or gpu, after both have decoded the same training images. cpu, if they don't agree or the GPU fails."""
    rows = np.resize(dataset.train_rows, TRIED_CHUNKS * GpuJpegs.chunk)  # they repeat, if there are few
    batch_size = min(GpuJpegs.chunk, attempt.world.largest_part(config.global_batch_size))
    for row in rows.tolist():
        dataset.images.get(dataset.manifest.keys[row])  # from the disk, for both

    def decoded(gpu: GpuJpegs | None, rows: NDArray[np.int64]) -> tuple[float, Tensor]:
        """Images per second, and the pixels of the first batch."""
        batches = load_images(
            (Samples(part, part) for part in np.split(rows, range(batch_size, len(rows), batch_size))),
            keys=dataset.manifest.keys,
            images=dataset.images,
            view=clip.view,
            threads=decode_threads(config.threads, ranks=attempt.world.ranks),
            finish=lambda _asked, loaded: loaded,
            gpu_jpegs=gpu,
            pin_memory=attempt.device.type == "cuda",
        )
        began = time.perf_counter()
        pixels = next(batches).pixels
        for _ in batches:
            attempt.watchdog.beat("trying decoders")
        return len(rows) / (time.perf_counter() - began), pixels

    try:
        decoded(gpu, rows[:batch_size])  # loads nvJPEG
        (cpu_rate, of_cpu), (gpu_rate, of_gpu) = decoded(None, rows), decoded(gpu, rows)
    except RuntimeError as error:
        _raise_if_device(error)
        log.warning("JPEGs are not decoded on the GPU: %s", _reason(error))
        return "cpu"
    alike = 0 < len(of_cpu) == len(of_gpu) and _differences(of_cpu, of_gpu).max().item() <= LARGEST_DIFFERENCE
    choice = "gpu" if alike and gpu_rate > CLEARLY_FASTER * cpu_rate else "cpu"
    figures = {"decoder": choice, "cpu_images_per_second": round(cpu_rate), "gpu_images_per_second": round(gpu_rate)}
    log.info("JPEG decoder", extra={**figures, "alike": alike})
    return choice


def _differences(one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """(B,): levels between two views of each image, on average."""
    return (one_BCHW.float() - other_BCHW.float()).abs().flatten(1).mean(dim=1)
