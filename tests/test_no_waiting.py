"""The host never waits for a GPU within a step: what a step asks of it, looked at where there is none, and tried where one is."""

import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.captions import TokenGroups
from job.model import step as step_module
from job.model.build import ClipModel
from job.model.optimizer import make_optimizer
from job.model.step import StepSettings, train_step
from job.model.towers import make_towers
from job.runtime.world import ALONE

ROWS = 8
ASKS_THE_HOST = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten._unique", "aten.masked_select", "aten.is_nonzero")


class Waits(TorchDispatchMode):
    """Notes each operation for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.transfers = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(function)
        made = function(*args, **kwargs)
        waits = name.startswith(ASKS_THE_HOST)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            given = args[1] if name.startswith("aten.copy_") else args[0]
            if given.device.type != made.device.type:
                self.transfers += 1
                waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if waits:
            ours = [frame for frame in traceback.extract_stack() if "/job/" in frame.filename]
            self.found.append(f"{name} in {ours[-1].filename}:{ours[-1].lineno}")
        return made


def on(device: str, clip: ClipModel) -> ClipModel:
    """The model with all that it has there, whatever the values."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in clip.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, moved(buffer))
    return replace(clip, shift=moved(clip.shift), scale=moved(clip.scale))


def batch(*, pinned: bool) -> Batch:
    images = torch.zeros(ROWS, 32, 32, 3, dtype=torch.uint8, pin_memory=pinned).permute(0, 3, 1, 2)
    groups = tuple(torch.ones(4, length, dtype=torch.int64) for length in (8, 16))
    tokens = TokenGroups(groups, torch.arange(ROWS), torch.arange(ROWS), torch.zeros(ROWS, 0, dtype=torch.int64))
    return Batch(images, tokens.pinned() if pinned else tokens, ())


def settings(micro_batch: int, autocast: torch.dtype | None = None) -> StepSettings:
    return StepSettings(global_batch_size=ROWS, grad_clip=1.0, seed=0, autocast=autocast, micro_batch=micro_batch)


def state_of(clip: ClipModel) -> TrainState:
    return TrainState(clip.module, make_optimizer(clip.module, lr=0.0, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6), None)


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without values on a GPU that is not there. Autograd has no threads for that one, so gradients come from nowhere."""
    parameters: list[Any] = []

    def backward(*_: Any, **__: Any) -> None:
        for parameter in parameters[0].parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(step_module, "_backward", backward)
    monkeypatch.setattr(step_module, "_sent", lambda values: (values, None))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: True)
    real = step_module.train_step

    def stepping(state: TrainState, *args: Any, **kwargs: Any) -> Any:
        parameters[:] = [state.model]
        return real(state, *args, **kwargs)

    monkeypatch.setattr(step_module, "train_step", stepping)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_nothing_in_a_step_waits_for_the_gpu(tmp_path: Path, micro_batch: int, request: pytest.FixtureRequest) -> None:
    clip = tiny.make_clip(tmp_path)
    request.getfixturevalue("made_up_gpu")
    clip = on("cuda", clip)
    state, towers, given = state_of(clip), make_towers(clip, world=ALONE), batch(pinned=False)
    with Waits() as waits:
        step_module.train_step(state, given, towers=towers, lr=1e-5, settings=settings(micro_batch), world=ALONE)
    assert waits.found == []
    assert waits.transfers >= 5  # images, two groups of tokens, and what says which text belongs to which image


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_gpu_reports_no_wait(tmp_path: Path, micro_batch: int) -> None:
    clip = on("cuda", tiny.make_clip(tmp_path))
    state, towers, given = state_of(clip), make_towers(clip, world=ALONE), batch(pinned=True)
    for _ in range(2):  # the first one allocates
        report = train_step(state, given, towers=towers, lr=0.0, settings=settings(micro_batch, torch.bfloat16), world=ALONE)
    try:
        torch.cuda.set_sync_debug_mode("error")
        later = train_step(state, given, towers=towers, lr=0.0, settings=settings(micro_batch, torch.bfloat16), world=ALONE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (report.read()["step"], later.read()["step"]) == (2, 3)
