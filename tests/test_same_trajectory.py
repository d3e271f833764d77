"""A run learns what open_clip's model, loss and AdamW learn from the same weights and batches; text is only computed shorter."""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from open_clip.loss import ClipLoss

from benchmarks.captions import make_captions
from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.captions import Captions
from job.model.build import prepare_towers
from job.model.optimizer import lr_at, make_optimizer
from job.model.step import StepSettings, train_step
from job.model.text import lengths_of
from job.model.towers import make_towers
from job.runtime.world import ALONE

STEPS, SIZE = 12, 8


@pytest.mark.parametrize(
    ("dtype", "micro_batch", "of_losses", "of_weights"),
    [(torch.float32, 0, 1e-4, 1e-3), (torch.float64, 0, 1e-6, 1e-8), (torch.float64, 3, 1e-6, 1e-8)],
    ids=["float32", "float64", "float64 in micro-batches"],
)
def test_losses_and_weights_follow_open_clips_to_rounding(
    tmp_path: Path, dtype: torch.dtype, micro_batch: int, of_losses: float, of_weights: float
) -> None:
    """Captions of 4 to 50 tokens, some twice in a batch; warm-up, cosine, clipping. The loss is reported in float32."""
    made = tiny.make_clip(tmp_path)
    clip = replace(made, module=made.module.to(dtype), shift=made.shift.to(dtype), scale=made.scale.to(dtype))
    prepare_towers(clip.module, lock_image=False, lock_text=False, grad_checkpointing=False)
    peer = copy.deepcopy(clip.module)
    groups = [[p for p in peer.parameters() if p.ndim >= 2], [p for p in peer.parameters() if p.ndim < 2]]
    adamw = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-6
    )
    optimizer = make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    state, towers = TrainState(clip.module, optimizer, None), make_towers(clip, world=ALONE)
    settings = StepSettings(global_batch_size=SIZE, grad_clip=1.0, seed=0, micro_batch=micro_batch)
    pool = itertools.cycle(make_captions(STEPS * (SIZE - 1), tokens=22, seed=0))
    captions = Captions(
        [], clip.tokenizer, lengths_of=lengths_of(clip.module), mode="whole", tag_separator="", template="{}", seed=0
    )
    for step in range(STEPS):
        texts = list(itertools.islice(pool, SIZE - 1))
        texts.append(texts[2])
        pixels = torch.randint(0, 256, (SIZE, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        lr = lr_at(step, peak=1e-3, warmup=3, steps=STEPS)
        batch = Batch(pixels, captions.tokens(texts), ())
        assert len(batch.tokens.groups) > 2
        report = train_step(state, batch, towers=towers, lr=lr, settings=settings, world=ALONE).read()

        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.zero_grad()
        image, text, scale = peer((pixels - clip.shift) * clip.scale, clip.tokenizer(texts))
        loss = ClipLoss()(image, text, scale)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        with torch.no_grad():
            peer.logit_scale.clamp_(0, math.log(100))
        assert report["loss"] == pytest.approx(loss.item(), abs=of_losses)
        assert report["gradient_norm"] == pytest.approx(norm.item(), rel=of_losses)
    drift = max(
        (ours - theirs).abs().max().item() for ours, theirs in zip(clip.module.parameters(), peer.parameters(), strict=True)
    )
    assert drift < of_weights
