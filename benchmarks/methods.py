"""What methods are worth, each alone: the contest of benchmarks.quality in a plain loop that has them all, so that those which
clipjob lacks are measured as those which it has."""

import contextlib
import copy
import math
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from PIL import Image
from torch import Tensor, nn

from benchmarks.machine import publish, say, table
from benchmarks.quality import BATCH, Contest, contest_arguments, over_seeds, rate_found, train_base, written
from benchmarks.quality_data import FOLDS
from benchmarks.quality_scores import METRICS, RESAMPLES, Answers, answers, difference, draw, measure
from job.data.captions import split_tags
from job.data.staging import Staging
from job.evaluate.pairs import Reading, open_pairs
from job.model.build import WEIGHTS_FILE
from job.model.optimizer import lr_at
from job.model.weights import save_weights
from job.runtime.log import set_up_logging

LR = 5e-4
IMAGE_BLOCKS, TEXT_BLOCKS = 4, 2
"""Of the base's towers."""
PIXELS = 72
"""Side of the images in memory, of which crops are taken."""
PLAIN = "plain"
COMPARED = ("recall@1", "recall@5", "forgotten", "ECE")


@dataclass(frozen=True)
class Method:
    """What differs from the plain loop: AdamW, warm-up of a tenth, cosine, gradients clipped at 1, small crops, whole captions."""

    lr: float = LR
    clip: float = 1.0
    crop: float = 0.9
    text: str = "whole"
    """whole; subset (each tag with probability 0.7); shuffled; sample (every second caption is one of its tags)."""
    soft: float = 0.0
    """Share of the target that goes by the Jaccard index of tags."""
    smoothing: float = 0.0
    layer_decay: float = 1.0
    average: float = 0.0
    """Decay of an exponential moving average of the weights, which is what is scored."""
    locked: str = ""
    """image or text."""
    lora: int = 0
    """Rank of what is added to every matrix of the blocks; nothing else learns."""
    statistics: int = 0
    """Steps that only fill Adam's moments, before the first one that moves weights. They count as steps."""
    balanced: bool = False
    """Each group of images (its last tag) is drawn as often as any other."""
    sigmoid: bool = False
    scale: float = 0.0
    """First logit_scale; 0: the base's."""
    scale_rate: float = 1.0
    """Learning rate of logit_scale, over that of the rest."""
    mirrored: bool = False
    """Every second image, left to right."""
    alpha: float = 1.0
    """Where between base (0) and tuned weights (1) the weights are that are scored. Source: WiSE-FT, arXiv:2109.01903."""
    answers: float = 0.0
    """Weight of a second loss: the divergence from the base's own answers on the batch. Source: Learning without Forgetting,
    arXiv:1606.09282; for such models ZSCL, arXiv:2303.06628. It costs a forward pass of the base besides."""
    start: float = 0.0
    """Pull of each step towards the base's weights, over the learning rate. Source: L2-SP, arXiv:1802.01483; decoupled."""
    patches: float = 1.0
    """Share of an image's patches that the tower sees. Source: FLIP, arXiv:2212.00794."""


METHODS: dict[str, Method] = {
    PLAIN: Method(),
    "lr 1e-4": Method(lr=1e-4),
    "lr 1e-3": Method(lr=1e-3),
    "lr 3e-3": Method(lr=3e-3),
    "no clipping of gradients": Method(clip=0.0),
    "crops down to 0.6": Method(crop=0.6),
    "no crops": Method(crop=1.0),
    "soft targets 0.2": Method(soft=0.2),
    "soft targets 0.4": Method(soft=0.4),
    "label smoothing 0.1": Method(smoothing=0.1),
    "layer decay 0.7": Method(layer_decay=0.7),
    "average of weights (EMA 0.9)": Method(average=0.9),
    "locked image tower": Method(locked="image"),
    "locked text tower": Method(locked="text"),
    "LoRA, rank 8": Method(lora=8),
    "LoRA, rank 8, lr 5e-3": Method(lora=8, lr=5e-3),
    "Adam's statistics first, 10 steps": Method(statistics=10),
    "balanced groups": Method(balanced=True),
    "sigmoid loss": Method(sigmoid=True),
    "tags left out": Method(text="subset"),
    "tags shuffled": Method(text="shuffled"),
    "single tags": Method(text="sample"),
    "logit_scale from 4": Method(scale=4.0),
    "logit_scale from 8": Method(scale=8.0),
    "logit_scale at 30 times the rate": Method(scale_rate=30.0),
    "gradients clipped at 0.3": Method(clip=0.3),
    "images mirrored": Method(mirrored=True),
    "three quarters of the patches": Method(patches=0.75),
    "base's answers, weight 0.3": Method(answers=0.3),
    "base's answers, weight 1": Method(answers=1.0),
    "pulled to the base, 3": Method(start=3.0),
    "pulled to the base, 30": Method(start=30.0),
    "alpha 0.5": Method(alpha=0.5),
    "locked image tower, alpha 0.5": Method(locked="image", alpha=0.5),
}


@dataclass(frozen=True)
class Pairs:
    images: Tensor
    """uint8 (N, 3, PIXELS, PIXELS)"""
    captions: list[str]


def read_pairs(contest: Contest, fold: int) -> Pairs:
    rows = [line.split("|") for line in contest.data.csv("train-files", fold).read_text(encoding="utf-8").splitlines()[1:]]
    resized = (Image.open(path).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC) for path, _ in rows)
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in resized])
    return Pairs(images, [tags for _, tags in rows])


def train(contest: Contest, pairs: Pairs, method: Method, seed: int, weights: Path) -> None:
    """Writes the tuned weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    name = f"local-dir:{contest.base}"
    model: Any = open_clip.create_model(name)
    tokenizer = open_clip.get_tokenizer(name)
    if method.scale:
        model.logit_scale.data.fill_(math.log(method.scale))
    bias = nn.Parameter(torch.tensor(-10.0 if method.sigmoid else 0.0))
    if method.locked:
        for parameter_name, parameter in model.named_parameters():
            of_images = parameter_name.startswith("visual.")
            parameter.requires_grad_(parameter_name == "logit_scale" or of_images != (method.locked == "image"))
    added = add_lora(model, method.lora) if method.lora else []
    if method.patches < 1:
        model.visual.patch_dropout = PatchDropout(1 - method.patches)
    model.train()
    groups = [
        {"params": [parameter], "weight_decay": 0.1 if parameter.ndim >= 2 else 0.0, "lr_scale": lr_scale(parameter_name, method)}
        for parameter_name, parameter in [*model.named_parameters(), *([("logit_bias", bias)] if method.sigmoid else [])]
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, lr=method.lr, betas=(0.9, 0.98), eps=1e-6)
    average = copy.deepcopy(model) if method.average else None
    base: Any = open_clip.create_model(name)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = order_of(pairs, generator, balanced=method.balanced)
    for step in range(contest.steps):
        rows = [next(order) for _ in range(BATCH)]
        captions = [pairs.captions[row] for row in rows]
        seen = [changed(caption, method.text, numbers) for caption in captions]
        seen_images = cropped(pairs.images[rows], model, method.crop, generator)
        if method.mirrored:
            mirrored_B = torch.rand(len(rows), generator=generator) < 0.5
            seen_images = torch.where(mirrored_B.view(-1, 1, 1, 1), seen_images.flip(-1), seen_images)
        image_BD = model.encode_image(seen_images, normalize=True)
        text_BD = model.encode_text(tokenizer(seen), normalize=True)
        logits = model.logit_scale.exp() * image_BD @ text_BD.T
        loss = loss_of(logits, captions, method, bias)
        if method.answers:
            with torch.no_grad():
                wanted = base(seen_images, tokenizer(seen))
                wanted = wanted[2] * wanted[0] @ wanted[1].T
            loss = loss + method.answers * divergence(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        if method.clip:
            nn.utils.clip_grad_norm_(learning, method.clip)
        lr = lr_at(step, peak=method.lr, warmup=contest.steps // 10, steps=contest.steps)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step < method.statistics else lr * group["lr_scale"]
        optimizer.step()
        with torch.no_grad():
            if method.start:
                for parameter, first in zip(model.parameters(), base.parameters(), strict=True):
                    parameter.lerp_(first, lr * method.start)
            model.logit_scale.clamp_(0, math.log(100))
            if average is not None:
                kept = min(method.average, (1 + step) / (10 + step))
                for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(new, 1 - kept)
    for module in added:
        nn.utils.parametrize.remove_parametrizations(module[0], module[1])
    tuned = (average or model).state_dict()
    if method.alpha < 1:
        first_state = base.state_dict()
        tuned = {
            key: torch.lerp(first_state[key], value, method.alpha) if value.is_floating_point() else value
            for key, value in tuned.items()
        }
    save_weights(tuned, weights)


def lr_scale(name: str, method: Method) -> float:
    """What a parameter's learning rate is multiplied by. Layer decay is from the top of a tower down, with its embeddings below
    all blocks. Source: BEiT, arXiv:2106.08254, appendix."""
    if name == "logit_scale":
        return method.scale_rate
    block = re.search(r"resblocks\.(\d+)", name)
    is_lowest = re.search(r"conv1|ln_pre|embedding", name)
    blocks = IMAGE_BLOCKS if name.startswith("visual.") else TEXT_BLOCKS
    below = blocks - int(block[1]) if block else blocks + 1 if is_lowest else 0
    return method.layer_decay**below


class LowRank(nn.Module):
    """A matrix plus the product of two thin ones, of which one is zero at first. Source: LoRA, arXiv:2106.09685; alpha = rank."""

    def __init__(self, matrix: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, matrix.shape[1]) / math.sqrt(matrix.shape[1]))
        self.up = nn.Parameter(torch.zeros(matrix.shape[0], rank))

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.up @ self.down


def add_lora(model: nn.Module, rank: int) -> list[tuple[nn.Module, str]]:
    """On the matrices of all blocks. Returns: each module and its parameter."""
    model.requires_grad_(requires_grad=False)
    places = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and name in ("weight", "in_proj_weight") and not isinstance(module, nn.Embedding)
    ]
    for module, name in places:
        nn.utils.parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))
    model.get_parameter("logit_scale").requires_grad_()
    return places


def order_of(pairs: Pairs, generator: torch.Generator, *, balanced: bool) -> Any:
    """Rows for ever: each once per epoch, or drawn by group."""
    groups = [caption.rsplit(", ", 1)[-1] for caption in pairs.captions]
    share = torch.tensor([1 / groups.count(group) for group in groups])
    while True:
        if balanced:
            yield from torch.multinomial(share, len(groups), replacement=True, generator=generator).tolist()
        else:
            yield from torch.randperm(len(groups), generator=generator).tolist()


def changed(caption: str, how: str, numbers: np.random.Generator) -> str:
    """The caption as one visit sees it."""
    tags = split_tags(caption, ", ")
    if how == "subset":
        return ", ".join([tag for tag in tags if numbers.random() < 0.7] or [str(numbers.choice(tags))])
    if how == "shuffled":
        return ", ".join(numbers.permutation(tags))
    return str(numbers.choice(tags)) if how == "sample" and numbers.random() < 0.5 else caption


def cropped(images: Tensor, model: Any, smallest: float, generator: torch.Generator) -> Tensor:
    """A random part of each, in the size and with the scaling that the model expects."""
    count, side = len(images), model.visual.image_size[0]
    area = torch.rand(count, generator=generator) * (1 - smallest) + smallest
    ratio = torch.exp((torch.rand(count, generator=generator) * 2 - 1) * (1 - smallest) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    views = torch.zeros(count, 2, 3)
    for axis, size in enumerate((width, height)):
        views[:, axis, axis] = size
        views[:, axis, 2] = (torch.rand(count, generator=generator) * 2 - 1) * (1 - size)
    grid = F.affine_grid(views, [count, 3, side, side], align_corners=False)
    found = F.grid_sample(images.float() / 255, grid, align_corners=False, padding_mode="border")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    return (found - mean) / std


def loss_of(logits: Tensor, captions: Sequence[str], method: Method, bias: Tensor) -> Tensor:
    """Of a batch. Args: logits: (B, B)."""
    targets = torch.eye(len(captions))
    if method.sigmoid:
        return F.softplus((1 - 2 * targets) * (logits + bias)).sum() / len(captions)
    if method.soft:
        sets = [set(split_tags(caption, ", ")) for caption in captions]
        shared = torch.tensor([[len(one & other) / len(one | other) for other in sets] for one in sets])
        targets = (1 - method.soft) * targets + method.soft * shared / shared.sum(dim=1, keepdim=True)
    targets = (1 - method.smoothing) * targets + method.smoothing / len(captions)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of the answers to a batch from those wanted, both ways. Args: both (B, B)."""
    each = [
        F.kl_div(own.log_softmax(dim=1), other.log_softmax(dim=1), reduction="batchmean", log_target=True)
        for own, other in ((logits, wanted), (logits.T, wanted.T))
    ]
    return (each[0] + each[1]) / 2


def compete(contest: Contest, pairs: Pairs, name: str, seed: int) -> dict[str, Answers]:
    """Trains with a method, and answers on the held-out and guard pairs."""
    weights = contest.place(name, seed) / "weights.safetensors"
    train(contest, pairs, METHODS[name], seed, weights)
    with contextlib.ExitStack() as closing:
        found = answered(contest, weights, closing.enter_context(Staging(contest.folder / "scratch")), fold=seed)
    weights.unlink()
    return found


def answered(contest: Contest, weights: Path, staging: Staging, *, fold: int) -> dict[str, Answers]:
    found = {}
    for part, csv in (("held-out", contest.data.csv("held-out", fold)), ("guard", contest.data.csv("guard"))):
        opened = open_pairs(str(csv), str(contest.data.images), staging=staging, reading=Reading())
        try:
            found[part] = answers(weights, contest.base, opened)
        finally:
            opened.images.close()
    return found


def main() -> int:
    parser = contest_arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="these, besides plain")
    args = parser.parse_args()
    args.repeats = 1 if args.quick else min(args.repeats, FOLDS)
    set_up_logging()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name).absolute()
        contest = Contest(written(args, folder), folder, epochs=1 if args.quick else 10)
        train_base(contest, epochs=1 if args.quick else 20)
        pairs = [read_pairs(contest, fold) for fold in range(args.repeats)]
        csvs = {"train": contest.data.csv("train", 0), "base": contest.data.csv("base")}
        rates = {} if args.quick else {part: rate_found(contest, csv) for part, csv in csvs.items()}
        with Staging(folder / "scratch") as staging:
            base = contest.base / WEIGHTS_FILE
            of_base = [answered(contest, base, staging, fold=fold) for fold in range(args.repeats)]
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn")) as pool:
            running = {
                method: [pool.submit(compete, contest, pairs[seed], method, seed) for seed in range(args.repeats)]
                for method in METHODS
                if method == PLAIN or method in args.only
            }
            found = {}
            for method, futures in running.items():
                found[method] = [future.result() for future in futures]
                say(method)
    sizes = {part: len(answers.text_ranks) for part, answers in of_base[0].items()}
    draws = draw(held_out=sizes["held-out"], guard=sizes["guard"], seeds=args.repeats)
    measured = {method: measure(of_seeds, of_base, draws) for method, of_seeds in found.items()}
    rows = [(method, *(over_seeds(values[metric][:, 0]) for metric in METRICS)) for method, values in measured.items()]
    differences = [
        (method, *(str(difference(values[metric], measured[PLAIN][metric], draws)) for metric in COMPARED))
        for method, values in measured.items()
        if method != PLAIN
    ]
    about = (
        f"{contest.data.rows['train']} training pairs, batch {BATCH}, {contest.steps} steps, AdamW with lr {LR:g}, "
        f"{args.repeats} seeds, each with {sizes['held-out']} other images held out; {sizes['guard']} images of the guard; the "
        "weights of the last step. "
        f"Second table: less plain, with 95 % intervals of {RESAMPLES} paired resamples of queries and seeds."
    )
    if rates:
        about += f" `--lr auto` finds {rates['train']:.1e} on these pairs, and {rates['base']:.1e} on those that the base learnt."
    text = "\n\n".join((about, table(("", *METRICS), rows), table(("", *COMPARED), differences)))
    raw = {method: {metric: values[:, 0].tolist() for metric, values in of.items()} for method, of in measured.items()}
    return publish(args, "Methods", text, limits=[], raw=raw)


if __name__ == "__main__":
    sys.exit(main())
