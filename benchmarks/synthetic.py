"""A model, its state and one made batch in this process: the job's own step without files, for figures of the step alone."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.captions import make_captions
from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.captions import Captions
from job.model.build import ClipModel, build_base, prepare_towers, write_base
from job.model.optimizer import make_optimizer
from job.model.step import StepReport, StepSettings, train_step
from job.model.text import lengths_of
from job.model.towers import make_towers
from job.runtime.device import autocast_dtype
from job.runtime.memory import keep_freed_memory
from job.runtime.world import ALONE

LR = 1e-5


@dataclass(frozen=True)
class Training:
    """What train_step needs, with the defaults of `clipjob train`."""

    clip: ClipModel
    state: TrainState
    towers: torch.nn.Module
    batch: Batch
    settings: StepSettings

    def step(self) -> StepReport:
        return train_step(self.state, self.batch, towers=self.towers, lr=LR, settings=self.settings, world=ALONE)


def make_training(*, model: str, device: str, precision: str, batch: int, tokens: float, micro_batch: int = 0) -> Training:
    """Args: tokens: of a caption on average; 77: captions as long as the context."""
    keep_freed_memory()
    on = torch.device(device)
    with tempfile.TemporaryDirectory() as name:
        write_base(Path(name) / "base", model=model, pretrained="", seed=0)
        clip = build_base(Path(name) / "base")  # as good for timing as the same random weights
    clip = clip.to(on)
    prepare_towers(clip.module, lock_image=False, lock_text=False, grad_checkpointing=False)
    optimizer = make_optimizer(clip.module, lr=LR, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    settings = StepSettings(
        global_batch_size=batch, grad_clip=1.0, seed=0, autocast=autocast_dtype(precision), micro_batch=micro_batch
    )
    made = _batch(clip, batch, tokens=tokens, pinned=on.type == "cuda")
    return Training(clip, TrainState(clip.module, optimizer, None), make_towers(clip, world=ALONE), made, settings)


def _batch(clip: ClipModel, size: int, *, tokens: float, pinned: bool) -> Batch:
    """Pixels as the pipeline leaves them: uint8, colours side by side, in pinned memory for a GPU."""
    if tokens == 77:
        texts = [f"photo {number} " + "red " * 80 for number in range(size)]
    else:
        texts = make_captions(size, tokens=tokens, seed=1)
    captions: Any = Captions(
        texts, clip.tokenizer, lengths_of=lengths_of(clip.module), mode="whole", tag_separator=", ", template="{}", seed=0
    )
    random = np.random.default_rng(0)
    flat = torch.from_numpy(random.integers(0, 256, (size, clip.view.height, clip.view.width, 3), dtype=np.uint8))
    return Batch((flat.pin_memory() if pinned else flat).permute(0, 3, 1, 2), captions.tokens(texts), ())
