"""One rank of a group that takes single steps on the same global batches. Run by test_parallel_steps.py, once per rank.

Writes <folder>/rank0.pt: case -> (row of the history, gradients by parameter), after the step.
"""

import copy
import functools
import itertools
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch

from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.captions import Captions
from job.model.build import ClipModel, load_base
from job.model.optimizer import make_optimizer
from job.model.step import StepSettings, train_step
from job.model.text import lengths_of
from job.model.towers import make_towers
from job.runtime.peers import Peers
from job.runtime.ranks import ranks_of
from job.runtime.world import World

SIZE = 11
"""Pairs of the global batch: on 2, 3 and 4 ranks the shares differ."""


@dataclass(frozen=True)
class Case:
    loss: str = "clip"
    micro_batch: int = 0
    duplicates: bool = False
    """Half of the captions are one and the same."""
    bad: int = 0
    """So many of the first images can't be decoded; of more ranks than one, all of the first rank's."""
    dtype: str = "float64"
    soft_targets: float = 0.0

    @property
    def name(self) -> str:
        parts = (self.loss, self.micro_batch, self.duplicates, self.bad, self.dtype, self.soft_targets)
        return "-".join(str(value) for value in parts)


CASES = [
    *(
        Case(loss, micro_batch, duplicates, dtype=dtype)
        for loss, micro_batch, duplicates, dtype in itertools.product(
            ("clip", "siglip"), (0, 2), (False, True), ("float64", "float32")
        )
    ),
    Case(bad=4),
    Case(bad=6, micro_batch=2),
    Case(soft_targets=0.3),
    Case(soft_targets=0.3, bad=4, micro_batch=2),
]


@functools.cache
def base(folder: Path) -> ClipModel:
    return load_base(folder / "base")


def clip_of(folder: Path, case: Case) -> ClipModel:
    """The same weights in every process."""
    clip, dtype = base(folder), getattr(torch, case.dtype)
    module = copy.deepcopy(clip.module).to(dtype).train()
    return replace(clip, module=module, shift=clip.shift.to(dtype), scale=clip.scale.to(dtype))


def texts_of(case: Case) -> list[str]:
    if case.soft_targets:
        return [f"thing {at}, kind {at % 3}, shape {at % 2}" if at != 7 else " , " for at in range(SIZE)]
    return ["the same old thing" if case.duplicates and at % 2 else f"{'long ' * at}thing {at}" for at in range(SIZE)]


def pixels_of() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def share_of(clip: ClipModel, case: Case, part: range) -> Batch:
    texts = texts_of(case)
    good = [at for at in part if at >= case.bad]
    captions = Captions(
        texts,
        clip.tokenizer,
        lengths_of=lengths_of(clip.module),
        mode="whole",
        tag_separator=", ",
        template="{}",
        seed=0,
        with_tags=case.soft_targets > 0,
    )
    bad = tuple((str(at), "broken") for at in part if at < case.bad)
    return Batch(pixels_of()[good], captions.tokens([texts[at] for at in good]), bad)


def step(folder: Path, case: Case, world: World) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    clip = clip_of(folder, case)
    state = TrainState(clip.module, make_optimizer(clip.module, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-6), None)
    settings = StepSettings(
        global_batch_size=SIZE,
        grad_clip=0.0,
        seed=0,
        loss=case.loss,
        micro_batch=case.micro_batch,
        soft_targets=case.soft_targets,
    )
    batch = share_of(clip, case, world.part(SIZE))
    report = train_step(state, batch, towers=make_towers(clip, world=world), lr=0.0, settings=settings, world=world)
    gradients = {name: parameter.grad for name, parameter in clip.module.named_parameters() if parameter.grad is not None}
    return report.read(), gradients


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks, _ = ranks_of(os.environ, nproc_per_node=1, nnodes=1)
    world = World(ranks, peers=Peers(ranks)) if ranks.size > 1 else World()
    world.connect(torch.device("cpu"))
    found = {case.name: step(folder, case, world) for case in CASES}
    if world.is_first:
        torch.save(found, folder / "rank0.pt")
    world.meet()
    world.leave()


if __name__ == "__main__":
    assert tiny  # the folder of this file is on the path
    main()
