"""However many ranks share a batch, the step is that of one process, and that of open_clip's own losses."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_steps
import tiny
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from rank_steps import CASES, Case

from job.model.build import write_base
from job.runtime.ranks import Ranks
from job.runtime.world import ALONE

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
"""Relative to the largest gradient of a parameter's tensor; float32: to rounding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    config = tiny.write_config(folder, init_logit_bias=-3.0, custom_text=True)
    write_base(folder / "base", model=str(config), pretrained="", seed=0)
    return folder


@pytest.fixture(scope="module", params=[2, 3, 4], ids=["2 ranks", "3 ranks", "4 ranks"])
def found(request: pytest.FixtureRequest, folder: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ranks = Ranks(size=request.param, local_size=request.param, port=probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, rank_steps.__file__, str(folder)],
            env={**os.environ, **ranks.environment(rank), "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        for rank in range(request.param)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * request.param
    return torch.load(folder / "rank0.pt")


def open_clips(folder: Path, case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by open_clip's towers, losses and autograd, of the whole batch at once."""
    clip = rank_steps.clip_of(folder, case)
    module: Any = clip.module
    image, text, scale, bias = module(
        ((rank_steps.pixels_of() - clip.shift) * clip.scale)[case.bad :], clip.tokenizer(rank_steps.texts_of(case))[case.bad :]
    )
    if case.soft_targets:
        target = targets_by_hand(rank_steps.texts_of(case)[case.bad :], weight=case.soft_targets).to(image.dtype)
        logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    else:
        loss = ClipLoss()(image, text, scale) if case.loss == "clip" else SigLipLoss()(image, text, scale, bias)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def targets_by_hand(texts: list[str], *, weight: float) -> torch.Tensor:
    """(N, N): 1 - weight for the pair itself, weight for all by what their sets of tags share."""
    tags = [{tag.strip() for tag in text.split(", ")} - {""} for text in texts]
    overlap = torch.zeros(len(texts), len(texts), dtype=torch.float64)
    for row, mine in enumerate(tags):
        for column, others in enumerate(tags):
            overlap[row, column] = len(mine & others) / len(mine | others) if mine | others else float(row == column)
    return (1 - weight) * torch.eye(len(texts), dtype=torch.float64) + weight * overlap / overlap.sum(dim=1, keepdim=True)


def assert_same(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(expected) <= set(gradients)
    for name, gradient in gradients.items():
        wanted = expected.get(name, torch.zeros_like(gradient))  # the softmax does not feel a bias
        bound = tolerance * max(1e-3, wanted.abs().max().item())
        assert (gradient - wanted).abs().max() <= bound, name


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return {case.name: rank_steps.step(folder, case, ALONE) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_process_has_open_clips_gradients(alone: Any, folder: Path, case: Case) -> None:
    row, gradients = alone[case.name]
    loss, expected = open_clips(folder, case)
    assert row["loss"] == pytest.approx(loss, abs=1e-5)  # rows are float32
    assert (row["pairs"], row["bad_samples"]) == (rank_steps.SIZE - case.bad, case.bad)
    assert_same(gradients, expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ranks_have_the_gradients_of_one_process(found: Any, alone: Any, case: Case) -> None:
    row, gradients = found[case.name]
    row_alone, expected = alone[case.name]
    assert row == pytest.approx(row_alone, rel=1e-5, abs=1e-6)
    assert_same(gradients, expected, TOLERANCE[case.dtype])
