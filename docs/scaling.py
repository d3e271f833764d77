"""Prints docs/scaling.md: what limits 8, 64 and 512 GPUs, computed. `python docs/scaling.py > docs/scaling.md`"""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import open_clip
import torch

# H100 SXM. Sources: NVIDIA's data sheet (dense rates, NVLink 4, PCIe 5 x16), 400 Gb/s network cards of usual 8-GPU machines.
BF16_FLOPS, FP32_FLOPS = 989e12, 67e12
NVLINK_BYTES, NIC_BYTES, PCIE_BYTES = 450e9, 50e9, 64e9
ETHERNET_NODE_BYTES = 12.5e9  # 100 Gb/s for all 8 GPUs of an ordinary cloud machine
# Assumptions, not measurements.
COMPUTE_SHARE = 0.40  # of the bf16 peak that towers reach; LAION's runs of ViT-B-32 reached 12 % on A100s
FP32_SHARE = 0.50
WIRE_SHARE = 0.80  # of a link's rate that a ring reaches
STORE_NODE_BYTES = 5e9  # what one machine gets out of an object store
GPUS_PER_NODE = 8
TEXT_TOKENS = 22  # the mean of tag captions; padding is not computed
LEAST_PAIRS = 64  # per GPU; below it kernels are too small to fill an H100


@dataclass(frozen=True)
class Model:
    """What a step of one pair costs."""

    name: str
    parameters: int
    width: int
    """Of the features, D."""
    image_flops: float
    """One forward pass of one image."""
    text_flops: float
    """One forward pass of one text of TEXT_TOKENS tokens."""
    full_text_flops: float
    """The same with all positions."""


def transformer_flops(tokens: int, *, width: int, layers: int, mlp_ratio: float = 4.0) -> float:
    """Forward FLOPs of one sequence, 2 per multiply-add: projections, attention, MLP."""
    per_token = 2 * (4 * width**2 + 2 * mlp_ratio * width**2)
    return layers * (tokens * per_token + 4 * tokens**2 * width)


def model_of(name: str) -> Model:
    """From open_clip's own config; parameters counted without memory."""
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    embed = 2 * patches * 3 * vision["patch_size"] ** 2 * vision["width"]
    image = embed + transformer_flops(patches + 1, width=vision["width"], layers=vision["layers"])
    texts = [
        transformer_flops(length, width=text["width"], layers=text["layers"]) for length in (TEXT_TOKENS, text["context_length"])
    ]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in open_clip.create_model(name, device="meta").parameters())
    return Model(name, parameters, config["embed_dim"], image, *texts)


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts on one of W GPUs."""

    pairs: float
    compute: float
    gradients: float
    """All-reduce of float32 gradients."""
    exposed: float
    """The part of it that the backward pass does not hide."""
    features: float
    loss: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.features + self.loss

    @property
    def efficiency(self) -> float:
        return self.compute / self.total


def step_of(model: Model, *, gpus: int, batch: int, node_bytes: float) -> Step:
    """Args: node_bytes: what a machine sends per second to others, all its GPUs together; within one, NVLink counts."""
    pairs = batch / gpus
    compute = pairs * 3 * (model.image_flops + model.text_flops) / (BF16_FLOPS * COMPUTE_SHARE)
    wire = (NVLINK_BYTES if gpus <= GPUS_PER_NODE else node_bytes / GPUS_PER_NODE) * WIRE_SHARE
    # Between machines a ring, or a tree over one, sends each gradient once per machine: the 8 GPUs of a machine share its links.
    sent = 2 * (gpus - 1) / gpus * 4 * model.parameters / (1 if gpus <= GPUS_PER_NODE else GPUS_PER_NODE)
    gradients = sent / wire
    gathered = batch * 2 * model.width * 4 / (wire if gpus <= GPUS_PER_NODE else wire * GPUS_PER_NODE)
    loss = 6 * 2 * pairs * batch * model.width / (FP32_FLOPS * FP32_SHARE)
    return Step(pairs, compute, gradients, max(0.0, gradients - compute * 2 / 3), gathered, loss)


def step_table(model: Model, *, node_bytes: float) -> list[str]:
    lines = ["| global batch | GPUs | pairs per GPU | compute | gradients (exposed) | features | loss | efficiency |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in (4096, 32768):
        for gpus in (8, 64, 512):
            step = step_of(model, gpus=gpus, batch=batch, node_bytes=node_bytes)
            few = " (too few)" if step.pairs < LEAST_PAIRS else ""
            lines.append(
                f"| {batch} | {gpus} | {step.pairs:.0f}{few} | {ms(step.compute)} | {ms(step.gradients)} ({ms(step.exposed)}) | "
                f"{ms(step.features)} | {ms(step.loss)} | {step.efficiency:.0%} |"
            )
    return lines


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    models = [model_of(name) for name in ("ViT-B-32", "ViT-L-14")]
    print(INTRODUCTION)
    print("| model | parameters | forward, image | forward, text | text with all positions | checkpoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in models:
        flops = (model.image_flops, model.text_flops, model.full_text_flops)
        cells = [model.name, f"{model.parameters / 1e6:.0f} M", *(f"{each / 1e9:.1f} GFLOP" for each in flops)]
        print("| " + " | ".join([*cells, f"{12 * model.parameters / 1e9:.2f} GB"]) + " |")
    print(f"\n{STEP}")
    for model in models:
        for title, node_bytes in (("400 Gb/s per GPU", NIC_BYTES * GPUS_PER_NODE), ("100 Gb/s per node", ETHERNET_NODE_BYTES)):
            print("\n".join(["", f"## {model.name}, {title}", "", *step_table(model, node_bytes=node_bytes)]))
    print(what_else_grows(models[0]))
    print("\n## What follows\n")
    for model in models:
        for batch in (4096, 32768):
            networks = NIC_BYTES * GPUS_PER_NODE, ETHERNET_NODE_BYTES
            fast, slow = (most_gpus(model, batch=batch, node_bytes=node_bytes) for node_bytes in networks)
            print(
                f"- {model.name}, global batch {batch}: four fifths of the time are compute up to {fast} GPUs with 400 Gb/s each, "
                f"up to {slow} with 100 Gb/s per node."
            )
    print(CONCLUSIONS)


INTRODUCTION = f"""# What limits 8, 64, 512 GPUs

Computed by `docs/scaling.py` from open_clip's model configs and the bandwidths named there; nothing here was measured on such
a machine. H100 SXM, {GPUS_PER_NODE} per node; towers at {COMPUTE_SHARE:.0%} of the bf16 peak, links at {WIRE_SHARE:.0%} of
their rate; texts of {TEXT_TOKENS} tokens.
"""

STEP = """A step is its compute, plus the all-reduce of gradients that the backward pass (two thirds of compute) does not hide, plus
the gather of all features, plus the loss: six products of a rank's rows with the whole batch, in float32."""

CONCLUSIONS = """- The global batch belongs to the run, so more GPUs mean fewer pairs for each, while gradients cost the same. A
  larger batch is what lets more GPUs help, and it is another run with other learning.
- Fine-tuning sets of 5 thousand to 10 million images need few GPUs for long: 8 in one machine see no network at all."""


def what_else_grows(model: Model) -> str:
    batch, nodes = 32768, 64
    checkpoint, store = 12 * model.parameters, STORE_NODE_BYTES / 1e9
    return f"""
## What else grows

- **Memory of the loss** at a global batch of {batch}, D = {model.width}: {batch * 2 * model.width * 4 / 1e6:.0f} MB of features
  and a fixed chunk of similarities; the whole matrix would be {batch**2 * 4 / 1e9:.1f} GB. It does not limit.
- **Checkpoints** of {model.name}: {checkpoint / 1e9:.2f} GB in all, however many GPUs; on {nodes} each sends
  {checkpoint / nodes / 1e6:.0f} MB. The stall is a copy over PCIe, {ms(checkpoint / 8 / PCIE_BYTES)} on 8 GPUs, less on more.
- **Staging**: every node takes all data. 10 GB (400 000 packed images) take {10 / store:.0f} s, 250 GB (10 million)
  {250 / store:.0f} s at {store:.0f} GB/s; {nodes} nodes at once ask {nodes * store:.0f} GB/s of the store.
- **Votes and figures**: two small reductions per step, beside it."""


def most_gpus(model: Model, *, batch: int, node_bytes: float) -> int:
    """The largest number of GPUs that compute for four fifths of the time, each with enough pairs."""
    steps = {gpus: step_of(model, gpus=gpus, batch=batch, node_bytes=node_bytes) for gpus in (8, 16, 32, 64, 128, 256, 512)}
    return max((gpus for gpus, step in steps.items() if step.efficiency >= 0.8 and step.pairs >= LEAST_PAIRS), default=0)


if __name__ == "__main__":
    main()
