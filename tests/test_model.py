"""Towers, loss and step compute what open_clip computes, on fewer tokens."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from open_clip.loss import ClipLoss

from job.checkpoint.state import TrainState
from job.data.batches import Batch
from job.data.captions import Captions
from job.model import image
from job.model.build import ClipModel, prepare_towers
from job.model.flops import peak_flops, training_flops
from job.model.loss import LossGradients, contrastive_loss, losses_at
from job.model.optimizer import lr_at, make_optimizer, warmup_steps
from job.model.step import StepReport, StepSettings, _update, batch_loss, take_row, train_step
from job.model.text import encode_texts, lengths_of
from job.model.towers import make_towers
from job.runtime.world import ALONE

TEXTS = ["a dog", "a much longer caption, with many words in it", "a dog", "cat", "x " * 100]
VISION = tiny.CONFIG["vision_cfg"]
TEXT = tiny.CONFIG["text_cfg"]


def tokens_of(clip: ClipModel, texts: list[str]) -> Any:
    source = Captions(
        texts, clip.tokenizer, lengths_of=lengths_of(clip.module), mode="whole", tag_separator="", template="{}", seed=0
    )
    return source.tokens(texts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}},
        {"text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
        {"text_cfg": {**TEXT, "proj_bias": True}},
    ],
    ids=["clip", "quickgelu", "custom text", "not causal", "eos pooling", "projection with bias"],
)
def test_text_features_equal_open_clips_to_rounding(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = tiny.make_clip(tmp_path, **changes)
    module = clip.module.double().eval()
    module.to(torch.float64)
    found = tokens_of(clip, TEXTS)
    with torch.no_grad():
        ours = encode_texts(_double(module), found.groups)[found.text_of]
        theirs = module.encode_text(clip.tokenizer(TEXTS), normalize=True)
    assert (ours - theirs).abs().max() < 1e-6  # encode_texts returns float32


def _double(module: Any) -> Any:
    return module


def test_a_causal_tower_is_cut_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert lengths_of(tiny.make_clip(tmp_path / "a").module) is not None
    other = tiny.make_clip(tmp_path / "b", custom_text=True, text_cfg={**TEXT, "no_causal_mask": True, "pool_type": "last"})
    assert lengths_of(other.module) is None


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"vision_cfg": {**VISION, "image_size": 40, "patch_dropout": 0.5, "ls_init_value": 0.1}}, True),
        ({"vision_cfg": {**VISION, "no_ln_pre": True}, "quick_gelu": True}, True),
        ({"vision_cfg": {**VISION, "pool_type": "avg"}}, False),
        ({"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}}, False),
    ],
    ids=["clip", "patches that don't fill the image", "no first norm", "mean of all", "attention pools"],
)
def test_image_features_equal_open_clips(tmp_path: Path, changes: dict[str, Any], plain: bool) -> None:
    clip = tiny.make_clip(tmp_path, **changes)
    assert image.is_plain(clip.module) == plain
    clip.module.eval()
    pixels = torch.randint(0, 256, (4, 3, clip.view.height, clip.view.width), dtype=torch.uint8)
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    normalised = (pixels.float() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        ours = image.encode_images(clip.module, pixels, shift=clip.shift, scale=clip.scale)
        assert (ours - clip.module.encode_image(normalised, normalize=True)).abs().max() < 1e-5


def test_patches_are_dropped_as_open_clip_drops_them(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path, vision_cfg={**VISION, "image_size": 64, "patch_dropout": 0.5})
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    clip.module.train()
    torch.manual_seed(1)
    ours = image.encode_images(clip.module, pixels, shift=clip.shift, scale=clip.scale)
    torch.manual_seed(1)
    theirs = clip.module.encode_image((pixels - clip.shift) * clip.scale, normalize=True)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_text_features_are_open_clips_in_each_precision(tmp_path: Path, dtype: torch.dtype, apart: float) -> None:
    clip = tiny.make_clip(tmp_path)
    found = tokens_of(clip, TEXTS)
    with torch.no_grad():
        exact = clip.module.double().encode_text(clip.tokenizer(TEXTS), normalize=True)
        clip.module.float()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            ours = encode_texts(clip.module, found.groups)[found.text_of]
            theirs = clip.module.encode_text(clip.tokenizer(TEXTS), normalize=True)
    assert (ours - theirs).abs().max() < apart
    assert (ours - exact).abs().max() < apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_towers_have_open_clips_gradients_on_captions_of_many_lengths(tmp_path: Path, dtype: torch.dtype) -> None:
    """Under autocast, differences stay within what bf16 itself costs against float32."""
    clip = tiny.make_clip(tmp_path)
    pixels = torch.randint(0, 256, (len(TEXTS), 3, 32, 32), dtype=torch.uint8)
    found = tokens_of(clip, TEXTS)
    weight = torch.randn(len(TEXTS), 16)

    def gradients(ours: bool, autocast: bool) -> dict[str, torch.Tensor]:
        clip.module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if ours:
                images = image.encode_images(clip.module, pixels, shift=clip.shift, scale=clip.scale)
                texts = encode_texts(clip.module, found.groups)[found.text_of]
            else:
                images = clip.module.encode_image((pixels - clip.shift) * clip.scale, normalize=True)
                texts = clip.module.encode_text(clip.tokenizer(TEXTS), normalize=True)
        ((images.float() - weight) * (texts.float() + weight)).sum().backward()
        return {name: p.grad.clone() for name, p in clip.module.named_parameters() if p.grad is not None}

    exact = gradients(ours=False, autocast=False)
    mine = gradients(ours=True, autocast=dtype == torch.bfloat16)
    theirs = gradients(ours=False, autocast=dtype == torch.bfloat16)
    assert mine.keys() == exact.keys()
    for name, value in exact.items():
        largest = value.abs().max()
        own, other = ((gradient[name] - value).abs().max() / largest for gradient in (mine, theirs))
        assert own < (1e-4 if dtype == torch.float32 else max(0.02, 2 * other)), name


def loss_of(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, *, ids: torch.Tensor | None = None) -> LossGradients:
    ids = torch.arange(len(image)) if ids is None else ids
    return contrastive_loss(image, text, valid_b=torch.ones(len(image), dtype=torch.bool), text_id_b=ids, logit_scale=scale)


def test_loss_is_open_clips() -> None:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(14.0, dtype=torch.float64)
    assert torch.allclose(loss_of(image, text, scale).figures[0], ClipLoss()(image, text, scale), atol=1e-12)


def test_scores_count_equal_captions_as_right() -> None:
    text = torch.eye(3)
    image = text[[1, 0, 2]]  # the first two look like each other's captions
    scale = torch.tensor(5.0)
    _, image_to_text, text_to_image, probability = loss_of(image, text, scale, ids=torch.tensor([7, 7, 8])).figures
    assert image_to_text == text_to_image == 1.0
    assert loss_of(image, text, scale).figures[1] == pytest.approx(1 / 3)
    assert 0.9 < probability < 1.0


@pytest.mark.parametrize("chunk", [1 << 24, 20])
def test_losses_at_several_scales_are_those_of_the_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.model.loss.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(9, 5), dim=-1) for _ in range(2))
    valid = torch.arange(9) < 7
    scales = [1.0, 14.0, 100.0]
    found = losses_at(image, text, valid_b=valid, logit_scales=scales)
    expected = [
        contrastive_loss(image, text, valid_b=valid, text_id_b=torch.arange(9), logit_scale=torch.tensor(scale)).figures[0].item()
        for scale in scales
    ]
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(map(math.isnan, losses_at(image, text, valid_b=torch.arange(9) < 1, logit_scales=scales)))


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_loss_of_a_batch_is_that_of_the_step_that_learns_from_it(tmp_path: Path, micro_batch: int) -> None:
    clip = tiny.make_clip(tmp_path)
    batch = batch_of(clip)
    settings = StepSettings(global_batch_size=8, grad_clip=1.0, seed=0, micro_batch=micro_batch)  # two images are missing
    towers = make_towers(clip, world=ALONE)
    scale = clip.module.logit_scale.exp().item()
    [found] = batch_loss(clip.module, batch, towers=towers, settings=settings, world=ALONE, logit_scales=[scale])
    report = train_step(state_of(clip), batch, towers=towers, lr=1e-3, settings=settings, world=ALONE)
    assert found == pytest.approx(report.read()["loss"], rel=1e-5)


def step_of(state: TrainState, batch: Batch, clip: ClipModel, *, lr: float, seed: int = 0) -> StepReport:
    settings = StepSettings(global_batch_size=len(batch.images) + len(batch.bad), grad_clip=1.0, seed=seed)
    return train_step(state, batch, towers=make_towers(clip, world=ALONE), lr=lr, settings=settings, world=ALONE)


def state_of(clip: ClipModel, **changes: Any) -> TrainState:
    optimizer = make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    return TrainState(clip.module, optimizer, None, **changes)


def batch_of(clip: ClipModel, size: int = 6, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(pixels, tokens_of(clip, [f"thing {number % 5}" for number in range(size)]), ())


def test_steps_follow_open_clips_model_loss_and_adamw(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    peer = copy.deepcopy(clip.module)
    decayed = [p for p in peer.parameters() if p.ndim >= 2]
    plain = [p for p in peer.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.98), eps=1e-6
    )
    state = state_of(clip)
    for number in range(5):
        batch = batch_of(clip, seed=number)
        report = step_of(state, batch, clip, lr=1e-3).read()
        adamw.zero_grad()
        texts = [f"thing {index % 5}" for index in range(6)]
        image, text, scale = peer((batch.images - clip.shift) * clip.scale, clip.tokenizer(texts))
        loss = ClipLoss()(image, text, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        assert report["loss"] == pytest.approx(loss.item(), abs=2e-5)
    drift = max(
        (ours - theirs).abs().max().item() for ours, theirs in zip(clip.module.parameters(), peer.parameters(), strict=True)
    )
    assert drift < 1e-4


def test_a_gradient_that_is_not_finite_changes_only_the_position(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    state = state_of(clip)
    step_of(state, batch_of(clip), clip, lr=1e-3)
    before = copy.deepcopy({name: tensor.clone() for file in state.tensors().values() for name, tensor in file.items()})
    hook = clip.module.visual.proj.register_hook(lambda gradient: gradient * float("nan"))
    row = step_of(state, batch_of(clip), clip, lr=1e-3).read()
    hook.remove()
    take_row(state, row)
    assert row["gradient_norm"] is None
    assert (state.step, state.nonfinite_steps, state.nonfinite_in_a_row) == (2, 1, 1)
    for name, tensor in {n: t for file in state.tensors().values() for n, t in file.items()}.items():
        assert torch.equal(tensor, before[name]), name
    take_row(state, step_of(state, batch_of(clip), clip, lr=1e-3).read())
    assert (state.nonfinite_steps, state.nonfinite_in_a_row) == (1, 0)


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_without_negatives_only_moves_the_position(tmp_path: Path, size: int) -> None:
    clip = tiny.make_clip(tmp_path)
    state = state_of(clip)
    whole = batch_of(clip, 2)
    batch = Batch(whole.images[:size], whole.tokens, (("a.jpg", "broken"),) * (2 - size))
    row = step_of(state, batch, clip, lr=1e-3).read()
    assert row["loss"] is None
    take_row(state, row)
    assert (state.step, state.bad_samples, state.nonfinite_steps) == (1, 2 - size, 0)


@pytest.mark.parametrize(("largest", "clips"), [(0.05, True), (1e6, False), (0.0, False)])
def test_clipping_in_the_optimiser_is_torchs_clipping(tmp_path: Path, largest: float, clips: bool) -> None:
    updates = []
    for ours in (True, False):
        clip = tiny.make_clip(tmp_path / str(ours))
        state = state_of(clip)
        parameters = [parameter for parameter in clip.module.parameters() if parameter.requires_grad]
        for number in range(3):  # Adam forgets the size of a first gradient, not the relation of several
            generator = torch.Generator().manual_seed(number)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator) * (number + 1) / 100
            if ours:
                norm = _update(state, largest)
            else:
                norm = torch.nn.utils.clip_grad_norm_(parameters, largest or math.inf)
                state.optimizer.step()
            assert (norm > largest > 0) == clips
        updates.append([parameter.detach().clone() for parameter in parameters])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*updates, strict=True))


def test_logit_scale_never_passes_100(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    with torch.no_grad():
        clip.module.logit_scale.fill_(9.0)
    row = step_of(state_of(clip), batch_of(clip), clip, lr=1e-3).read()
    assert row["logit_scale"] == pytest.approx(100)


@pytest.mark.parametrize(("lock_image", "lock_text"), [(True, False), (False, True)])
def test_a_locked_tower_keeps_its_weights(tmp_path: Path, lock_image: bool, lock_text: bool) -> None:
    clip = tiny.make_clip(tmp_path)
    prepare_towers(clip.module, lock_image=lock_image, lock_text=lock_text, grad_checkpointing=True)
    before = {name: parameter.detach().clone() for name, parameter in clip.module.named_parameters()}
    step_of(state_of(clip), batch_of(clip), clip, lr=1e-2)
    changed = {name for name, parameter in clip.module.named_parameters() if not torch.equal(parameter, before[name])}
    image_changed = any(name.startswith("visual.") for name in changed)
    text_changed = any(name.startswith(("transformer.", "token_embedding")) for name in changed)
    assert (image_changed, text_changed) == (not lock_image, not lock_text)


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    other = ClipModel(copy.deepcopy(clip.module), clip.tokenizer, clip.view, clip.shift, clip.scale)
    prepare_towers(other.module, lock_image=False, lock_text=False, grad_checkpointing=True)
    rows = [step_of(state_of(c), batch_of(c), c, lr=1e-3).read() for c in (clip, other)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=1e-4)


def test_one_dimensional_parameters_do_not_decay(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    groups = make_optimizer(clip.module, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6).param_groups
    for group in groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [lr_at(step, peak=1.0, warmup=10, steps=100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert (warmup_steps(-1, 100), warmup_steps(-1, 10**6), warmup_steps(7, 100)) == (10, 500, 7)


def test_dropout_depends_on_the_step_alone(tmp_path: Path) -> None:
    rows = []
    for started_at in (0, 2):  # a run that goes on at step 2 draws what an uninterrupted one does there
        clip = tiny.make_clip(tmp_path / str(started_at), vision_cfg={**tiny.CONFIG["vision_cfg"], "patch_dropout": 0.5})
        prepare_towers(clip.module, lock_image=False, lock_text=False, grad_checkpointing=False)
        state = state_of(clip, step=started_at)
        for _ in range(3 - started_at):
            before = copy.deepcopy(clip.module.state_dict())
            row = step_of(state, batch_of(clip), clip, lr=0.0, seed=7).read()
        assert all(torch.equal(before[name], tensor) for name, tensor in clip.module.state_dict().items())
        rows.append(row)
    assert rows[0] == rows[1]
    other = step_of(state_of(clip, step=2), batch_of(clip), clip, lr=0.0, seed=8).read()
    assert other["loss"] != rows[1]["loss"]


def test_a_locked_tower_computes_as_in_evaluation_and_stays_so(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    prepare_towers(clip.module, lock_image=True, lock_text=False, grad_checkpointing=False)
    assert not clip.module.visual.training
    assert clip.module.transformer.training


def test_the_arithmetic_of_a_pair_is_what_the_layers_add_up_to(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    width, layers, features, tokens, patches = 32, 2, 16, 10, 5

    def transformer(length: int) -> int:
        block = 2 * 12 * length * width**2 + 2 * 2 * length**2 * width
        last = 2 * (2 * length + 10) * width**2 + 2 * 2 * length * width  # keys and values of all positions, the rest of one
        return (layers - 1) * block + last + 2 * width * features

    convolution = 2 * 4 * width * 3 * 16 * 16
    expected = 3 * (convolution + transformer(patches) + transformer(tokens))
    assert training_flops(clip, tokens_per_text=tokens) == expected
    for parameter in clip.module.visual.parameters():
        parameter.requires_grad_(False)
    assert training_flops(clip, tokens_per_text=tokens) == expected - 2 * (convolution + transformer(patches))


def test_counting_the_arithmetic_changes_nothing(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None}  # a ResNet
    clip = tiny.make_clip(tmp_path, vision_cfg=vision)
    clip.module.train()
    before = {name: value.clone() for name, value in clip.module.state_dict().items()}
    assert any("running_mean" in name for name in before)
    assert training_flops(clip, tokens_per_text=4) > 0
    assert all(torch.equal(value, before[name]) for name, value in clip.module.state_dict().items())
    assert clip.module.training


def test_the_peak_is_that_of_the_most_exact_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA L40S") == 362e12
    for name in ("NVIDIA GeForce GTX 1060 6GB", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400"):
        assert peak_flops(name) is None
