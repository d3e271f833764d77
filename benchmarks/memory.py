"""GPU memory of training: whether a batch fits a smaller card, tried with no more memory than that card has."""

import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import LIMIT_COLUMNS, Limit, arguments, in_child, publish, say, table

GB = 10**9
STEPS = 3
"""The optimiser's state is there from the second on."""


@dataclass(frozen=True)
class Case:
    precision: str
    batch: int
    micro_batch: int
    tokens: float
    """Of a caption on average; 77: every caption as long as the context."""
    card_gb: int
    required: bool

    @property
    def name(self) -> str:
        micro = f", --micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"batch {self.batch}{micro}, {self.precision}, {self.tokens:g} tokens"


CASES = (
    Case("bf16", 128, 0, 22, 6, required=True),
    Case("bf16", 128, 0, 77, 6, required=False),
    Case("fp32", 128, 0, 22, 6, required=False),
    Case("fp32", 128, 32, 22, 6, required=True),  # a GTX 1060 has no bf16
    Case("bf16", 4096, 256, 22, 24, required=True),
    Case("bf16", 4096, 256, 77, 24, required=False),
)


@dataclass(frozen=True)
class Peak:
    """Bytes. context: what CUDA and its libraries take besides what torch allocates."""

    allocated: int
    reserved: int
    context: int
    fits: bool

    @property
    def total_gb(self) -> float:
        return (self.reserved + self.context) / GB


def peak(case: Case, model: str, limited: bool) -> Peak:
    """A few steps of the job. Args: limited: torch gets no more than the card has; it frees what it only keeps before failing."""
    import torch

    from benchmarks.synthetic import make_training

    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    if limited:
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (case.card_gb * GB - context) / total)))
    fits = True
    try:
        training = make_training(
            model=model,
            device="cuda",
            precision=case.precision,
            batch=case.batch,
            tokens=case.tokens,
            micro_batch=case.micro_batch,
        )
        for _ in range(STEPS):
            training.step().read()
    except torch.OutOfMemoryError:
        fits = False
    free, total = torch.cuda.mem_get_info()
    context = max(context, total - free - torch.cuda.memory_reserved())
    return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), context, fits)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--device", default="cuda", choices=("cuda",), help="there is no other")
    parser.add_argument("--model", default="ViT-B-32", help="[default: %(default)s]")
    args = parser.parse_args()
    heading = f"{args.model}; {STEPS} steps of training, AdamW in float32; captions all different."
    if not in_child(has_cuda):
        rows = [(case.name, f"{case.card_gb} GB", "not measured: no CUDA device") for case in CASES]
        return publish(args, "GPU memory", f"{heading}\n\n{table(('case', 'card', 'peak'), rows)}", limits=[], raw={})
    from benchmarks.device import device_name

    rows, limits, raw = [], [], {}
    for case in CASES[:1] if args.quick else CASES:
        say(case.name)
        free, bound = in_child(peak, case, args.model, False), in_child(peak, case, args.model, True)
        raw[case.name] = {"unlimited": vars(free), "limited": vars(bound)}
        rows.append((case.name, f"{case.card_gb} GB", *_cells(free), "yes" if bound.fits else "no"))
        if case.required:
            found = bound.total_gb if bound.fits else float("inf")
            told = f"{found:.2f}" if bound.fits else f"does not fit; unlimited it takes {free.total_gb:.2f}"
            what = f"{case.name}, with no more memory than a card of {case.card_gb} GB"
            limits.append(Limit(what, found, case.card_gb, "GB", spread=told))
    columns = ("case", "card", "allocated at most, GB", "reserved at most, GB", "CUDA itself, GB", "fits the card")
    made = (
        f"{heading} On {in_child(device_name, 'cuda')}. Each case runs twice: with all the memory, which gives the figures, and "
        "with no more than that card has, which says whether it fits. A card's GB are 10⁹ bytes."
    )
    text = "\n\n".join((made, table(columns, rows), table(LIMIT_COLUMNS, [limit.row() for limit in limits])))
    return publish(args, "GPU memory", text, limits=limits, raw=raw)


def _cells(found: Peak) -> tuple[Any, ...]:
    return tuple(f"{number / GB:.2f}" for number in (found.allocated, found.reserved, found.context))


if __name__ == "__main__":
    sys.exit(main())
