"""Where a step's time goes, part by part, against what this device could do: its own rate of matrix products and its bandwidth."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device import cpu_has_bf16, device_name
from benchmarks.machine import arguments, parsed, publish, say, spread, table
from benchmarks.synthetic import Training, make_training
from job.model.image import encode_images
from job.model.loss import contrastive_loss
from job.model.step import _on_device, _update
from job.model.text import encode_texts
from job.model.towers import set_compiled

BANDWIDTH_BYTES = 2**28
OPTIMISER_BYTES = 4 * (1 + 4 + 3)
"""Per weight: the norm reads the gradient, AdamW reads four numbers, clips on the way and writes three."""


@dataclass
class Parts:
    """Seconds of one step."""

    seconds: dict[str, float]
    """Of each part."""
    whole: float


def timed(work: Callable[[], Any], *, device: str) -> tuple[float, Any]:
    """(seconds until the device is done, what work returned)."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def parts_of_step(training: Training, *, device: str) -> Parts:
    """One step in pieces, each awaited, then one as the job runs it."""
    model, clip, settings = training.state.model, training.clip, training.settings
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        seconds[name], found = timed(work, device=device)
        return found

    def towers(work: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(device, dtype=settings.autocast, enabled=settings.autocast is not None):
            return work()

    on = torch.device(device)
    moved = part("transfer", lambda: _on_device(training.batch, rows=settings.global_batch_size, device=on))
    pixels, groups, text_of, valid, text_id, _ = moved
    image = part("image tower, forward", partial(towers, lambda: encode_images(model, pixels, shift=clip.shift, scale=clip.scale)))
    text = part("text tower, forward", partial(towers, lambda: encode_texts(model, groups)))
    gradients = part(
        "loss and its gradient",
        lambda: contrastive_loss(
            image.detach(),
            text.detach()[text_of],
            valid_b=valid,
            text_id_b=text_id,
            logit_scale=model.logit_scale.detach().exp().reshape(()),
        ),
    )
    training.state.optimizer.zero_grad(set_to_none=True)
    slope = gradients.text.new_zeros(text.shape).index_add_(0, text_of, gradients.text)
    part("image tower, backward", lambda: image.backward(gradients.image))
    part("text tower, backward", lambda: text.backward(slope))
    model.logit_scale.grad = gradients.logit_scale.reshape(model.logit_scale.shape)
    for group in training.state.optimizer.param_groups:
        group["lr"] = 1e-5
    part("clipping and AdamW", lambda: _update(training.state, settings.grad_clip))
    whole, _ = timed(lambda: training.step().read(), device=device)
    return Parts(seconds, whole)


@dataclass(frozen=True)
class Floor:
    """The least that a part can take, and why."""

    seconds: float
    why: str


def floors(training: Training, *, device: str, dtype: torch.dtype) -> dict[str, Floor]:
    model, batch = training.state.model, training.batch
    on, bandwidth = torch.device(device), copy_bandwidth(torch.device(device))
    width, size = int(model.visual.output_dim), len(batch.images)
    images = tower_work(model.visual, [size * (int(model.visual.positional_embedding.shape[0]))])
    texts = tower_work(model.transformer, [tokens.numel() for tokens in batch.tokens.groups])
    counted = counted_flops(training, device=device)
    found = {}
    for tower, shapes in (("image tower", images), ("text tower", texts)):
        for direction in ("forward", "backward"):
            rate = matmul_rate(shapes, dtype=dtype, device=on, backward=direction == "backward")
            flops = counted[f"{tower}, {direction}"]
            why = f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s"
            found[f"{tower}, {direction}"] = Floor(flops / rate, why)
    products = [(size, width, size, 4), (size, size, width, 2)]  # similarities twice for each side, gradients once
    rate = matmul_rate(products, dtype=torch.float32, device=on, backward=False)
    flops = sum(2 * m * k * n * times for m, k, n, times in products)
    found["loss and its gradient"] = Floor(flops / rate, f"{flops / 1e9:.3g} GFLOP at {rate / 1e9:.0f} GFLOP/s in float32")
    weights = sum(parameter.numel() for parameter in model.parameters())
    moved = weights * OPTIMISER_BYTES
    found["clipping and AdamW"] = Floor(moved / bandwidth, f"{moved / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s")
    if device == "cuda":
        rate = transfer_bandwidth(on)
        found["transfer"] = Floor(batch.images.nbytes / rate, f"{batch.images.nbytes / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s")
    else:
        found["transfer"] = Floor(0.0, "nothing to move")
    return found


Product = tuple[int, int, int, int]
"""m, k, n and how often: (m, k) times (k, n)."""


def tower_work(tower: Any, rows: Sequence[int]) -> list[Product]:
    """The products of a tower's blocks. Args: rows: positions in each group that goes through it at once."""
    blocks = tower.transformer.resblocks if hasattr(tower, "transformer") else tower.resblocks
    width, hidden = blocks[0].attn.embed_dim, blocks[0].mlp.c_fc.out_features
    shapes = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    return [(m, k, n, len(blocks)) for m in rows for k, n in shapes]


def counted_flops(training: Training, *, device: str) -> dict[str, float]:
    """What torch counts in each tower: products, convolutions, attention where it knows the kernel. Text at its real length."""
    model, batch, clip = training.state.model, training.batch, training.clip
    found = {}
    pixels, groups = batch.images.to(device), [tokens.to(device) for tokens in batch.tokens.groups]
    work = {
        "image tower": lambda: encode_images(model, pixels, shift=clip.shift, scale=clip.scale),
        "text tower": lambda: encode_texts(model, groups),
    }
    for name, encode in work.items():
        with FlopCounterMode(display=False) as forward, torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = encode()
        with FlopCounterMode(display=False) as backward:
            features.sum().backward()
        found[f"{name}, forward"] = float(forward.get_total_flops())
        found[f"{name}, backward"] = float(backward.get_total_flops())
    training.state.optimizer.zero_grad(set_to_none=True)
    return found


def matmul_rate(products: Sequence[Product], *, dtype: torch.dtype, device: torch.device, backward: bool) -> float:
    """FLOP/s over these products, each at its best of five. Backward: the two that give both gradients of a linear layer."""
    flops = seconds = 0.0
    for m, k, n, times in products:
        x, weight, slope = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        pieces = (lambda: slope @ weight, lambda: slope.T @ x) if backward else (lambda: F.linear(x, weight),)  # noqa: B023
        for piece in pieces:
            seconds += times * best(piece, device=device)
            flops += times * 2 * m * k * n
    return flops / seconds


def best(work: Callable[[], Any], *, device: torch.device, times: int = 5) -> float:
    work()
    return min(timed(work, device=device.type)[0] for _ in range(times))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory reads and writes."""
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * BANDWIDTH_BYTES / best(lambda: target.copy_(source), device=device)


def transfer_bandwidth(device: torch.device) -> float:
    """Bytes per second from pinned memory of the host."""
    source = torch.ones(BANDWIDTH_BYTES // 4, pin_memory=True)
    target = torch.empty(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / best(lambda: target.copy_(source, non_blocking=True), device=device)


def rows_of(found: Sequence[Parts], least: dict[str, Floor]) -> Iterator[tuple[str, ...]]:
    """One line for each part, one for what no part accounts for, one for the whole."""
    whole = median(one.whole for one in found)

    def line(name: str, seconds: Sequence[float], floor: Floor | None) -> tuple[str, ...]:
        middle = median(seconds)
        cells = (name, spread([1000 * one for one in seconds], 1), f"{100 * middle / whole:.1f} %")
        if floor is None or not floor.seconds:
            return *cells, "", "", "" if floor is None else floor.why
        return *cells, f"{1000 * floor.seconds:.1f}", f"{middle / floor.seconds:.2f}", floor.why

    for name in found[0].seconds:
        yield line(name, [one.seconds[name] for one in found], least[name])
    yield line("the rest", [one.whole - sum(one.seconds.values()) for one in found], None)
    bottom = sum(floor.seconds for floor in least.values())
    yield line("a whole step as the job runs it", [one.whole for one in found], Floor(bottom, "sum of the above"))


def main() -> int:
    parser = arguments(__doc__ or "", repeats=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="ViT-B-32", help="[default: %(default)s]")
    parser.add_argument("--precision", nargs="*", choices=("fp32", "bf16"), help="[default: both; fp32 on a CPU that has no other]")
    parser.add_argument("--batch", type=int, default=0, help="[default: 32 on the CPU, 1024 on a GPU; quick: 8 and 256]")
    parser.add_argument("--tokens", type=float, default=22, help="of a caption on average [default: %(default)s]")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    args = parsed(parser)
    on_gpu = args.device == "cuda"
    batch = args.batch or ((256 if args.quick else 1024) if on_gpu else (8 if args.quick else 32))
    rounds = 1 if args.quick else args.repeats
    texts, raw = [], {}
    precisions = args.precision or (("fp32", "bf16") if on_gpu or cpu_has_bf16() else ("fp32",))
    for precision, compiled in itertools.product(precisions, (False, True) if args.compile else (False,)):
        title = f"{precision}, compiled" if compiled else precision
        say(f"{title}: the device's own rates")
        training = make_training(model=args.model, device=args.device, precision=precision, batch=batch, tokens=args.tokens)
        least = floors(training, device=args.device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        say(f"{title}: steps")
        if compiled:
            set_compiled(training.clip.module, on=True)
        if compiled or not args.quick:
            parts_of_step(training, device=args.device)
        found = [parts_of_step(training, device=args.device) for _ in range(rounds)]
        columns = ("part", "ms", "of a step", "floor, ms", "times its floor", "the floor")
        texts.append(f"## {title}\n\n{table(columns, list(rows_of(found, least)))}")
        raw[title] = {"parts": [vars(one) for one in found], "floors": {name: vars(one) for name, one in least.items()}}
        del training
    what = f"{args.model} on {device_name(args.device)}, batch {batch}, captions of {args.tokens:g} tokens on average"
    made = (
        f"{what}, one made batch. Each part is awaited before the next begins; {rounds} rounds; median (min–max). The floor of a "
        "tower is what torch counts of its arithmetic over the rate of plain matrix products of its shapes and precision; of the "
        "optimiser, the bytes that it must move over the rate of a copy. Norms, activations, softmax and casts are not in it."
    )
    return publish(args, "Parts of a step", "\n\n".join((made, *texts)), limits=[], raw=raw)


if __name__ == "__main__":
    sys.exit(main())
