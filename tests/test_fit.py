"""--micro-batch auto: as many pairs at a time as fit the GPU. The GPU that runs out of memory is a tower that says so."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from test_model import tokens_of

from job import fitted
from job.config import Config
from job.data.captions import Captions
from job.model.build import ClipModel
from job.model.fit import fitting_micro_batch, largest_that_fits, try_step
from job.model.towers import Towers
from job.runtime.world import ALONE


@pytest.mark.parametrize(("rows", "room", "found"), [(100, 100, 100), (100, 99, 50), (100, 13, 13), (100, 12, 7), (7, 1, 1)])
def test_trials_halve_until_one_fits(rows: int, room: int, found: int) -> None:
    tried = []

    def trial(count: int) -> None:
        tried.append(count)
        if count > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert largest_that_fits(rows, trial) == found
    assert tried[0] == rows
    assert all(later == -(-earlier // 2) for earlier, later in itertools.pairwise(tried))


def test_where_not_one_pair_fits_the_gpu_says_so() -> None:
    def trial(count: int) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory with {count}.")

    with pytest.raises(torch.OutOfMemoryError, match="with 1"):
        largest_that_fits(64, trial)


def test_a_trial_takes_the_heaviest_part_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny.make_clip(tmp_path)
    before = copy.deepcopy(clip.module.state_dict())
    groups = tokens_of(clip, ["one", "a much longer caption of more than eight tokens, in a group of its own"] * 8).groups
    seen: list[tuple[int, int]] = []
    forward = Towers.forward

    def watched(self: Towers, images: Any, texts: Any) -> Any:
        seen.append((len(images), max(tokens.shape[1] for tokens in texts)))
        return forward(self, images, texts)

    monkeypatch.setattr(Towers, "forward", watched)
    try_step(clip, groups, rows=16, at_most=5, autocast=None)
    assert seen == [(4, groups[-1].shape[1])] * 2
    assert all(parameter.grad is None for parameter in clip.module.parameters())
    assert all(torch.equal(before[name], value) for name, value in clip.module.state_dict().items())


def test_memory_that_runs_out_within_a_trial_leaves_no_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny.make_clip(tmp_path)
    groups = tokens_of(clip, [f"thing {number}" for number in range(16)]).groups
    forward = Towers.forward
    passes = []

    def small(self: Towers, images: Any, texts: Any) -> Any:
        passes.append(len(images))
        if len(images) > 4 or len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, images, texts)

    monkeypatch.setattr(Towers, "forward", small)
    found = largest_that_fits(16, lambda count: try_step(clip, groups, rows=16, at_most=count, autocast=None))
    assert found == 4
    assert all(parameter.grad is None for parameter in clip.module.parameters())


def test_what_is_tried_is_on_the_device_with_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, found = tiny.make_clip(tmp_path), []

    def trial(clip: ClipModel, groups: Any, *, rows: int, autocast: Any) -> int:
        found.append({tensor.device.type for tensor in (clip.shift, clip.scale, *clip.module.parameters())})
        return rows // 2

    monkeypatch.setattr(fitted, "fitting_micro_batch", trial)
    told = SimpleNamespace(beat=lambda _doing: None, check=lambda _doing: None)
    attempt: Any = SimpleNamespace(device=torch.device("meta"), watchdog=told, stop=told, world=ALONE)
    captions = Captions(["a", "b"], clip.tokenizer, lengths_of=None, mode="whole", tag_separator=", ", template="{}", seed=0)
    config = fitted.fitted(Config(precision="fp32", global_batch_size=6), attempt, cast(Any, None), captions, clip)
    assert (config.micro_batch, config.compile, config.jpeg_decoder) == (3, "off", "cpu")
    assert found == [{"meta"}]


def test_a_cpu_takes_all_at_once(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    assert fitting_micro_batch(clip, tokens_of(clip, ["a thing"]).groups, rows=64, autocast=None) == 0
