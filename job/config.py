"""The one configuration of a job: a frozen, flat record. job/settings.py fills it from flags, environment, TOML and config.json.

One name everywhere: ``--max-steps`` = ``CLIPJOB_MAX_STEPS`` = ``max_steps`` in TOML and config.json = ``Config.max_steps``.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import ConfigError
from job.fields import AUTO, Interval, check_value, flag, option, parse, stands_for_auto

RECALLS = tuple(f"{asked}_retrieval_recall@{k}" for asked in ("image", "text") for k in (1, 5, 10))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a job does. Fields in the order of `clipjob train --help`; each says what it means in its help text."""

    # Where things are
    run: str = option("", "Folder or URI of this run (s3://…); the same for every attempt.", may_change=True)
    csv: str = option("", "CSV of image keys and captions: path or URI.", may_change=True)
    lmdb: str = option("", "LMDB of encoded images: folder, file or URI.", may_change=True)
    val_csv: str = option("", "CSV of held-out pairs; default: a part of --csv (--val-fraction).", may_change=True)
    val_lmdb: str = option("", "LMDB of the held-out images; default: --lmdb.", may_change=True)
    guard_csv: str = option("", "CSV of pairs that the model must not forget, scored beside the held-out ones.", may_change=True)
    guard_lmdb: str = option("", "LMDB of their images.", may_change=True)
    scratch: str = option(
        "", "Local folder for staged files; default: clipjob-<user id> in the system's temporary folder.", may_change=True
    )
    scratch_limit: str = option(
        "",
        "Most bytes of staged files to keep there, such as 200GB; the oldest go first. Empty: what the disk holds.",
        may_change=True,
    )
    keep_staged: bool = option(
        False, "Keep staged files when the run is complete, for other runs on this node with the same data.", may_change=True
    )
    storage_option: str = option(
        "",
        "key=value for every request to the store, such as RequestPayer=requester or ServerSideEncryption=aws:kms; repeatable.",
        may_change=True,
        repeats=True,
    )
    storage_patience: Interval = option(
        Interval("seconds", 7200),
        "How long checkpoints may wait locally for a store that fails; training goes on.",
        may_change=True,
    )

    # Reading the data
    csv_separator: str = option(AUTO, "Column separator of the CSV: auto, a character, or 'tab'.")
    image_column: str = option(AUTO, "Column of image keys: auto (path, filepath, image, key, …) or a name.")
    caption_column: str = option(AUTO, "Column of captions: auto (tags, title, caption, text, …) or a name.")
    key_prefix: str = option("", "Put before every key of the CSV to make a key of the LMDB.")
    caption_mode: str = option(
        "whole", "whole: the whole text is the caption. sample: one tag at random per visit.", choices=("whole", "sample")
    )
    tag_separator: str = option(
        AUTO, "Separator of tags in a caption, for --caption-mode sample and --soft-targets: auto or a string."
    )
    template: str = option("{}", 'Text around each caption or tag, such as "a photo of {}".')
    val_fraction: float = option(0.05, "Part of the images held out (by hash of the key), 0 for none.", at_least=0, at_most=0.5)
    max_bad_samples: float = option(
        0.01, "Highest share of images that may fail to decode.", at_least=0, at_most=1, may_change=True
    )

    # The model
    model: str = option("ViT-B-32", "open_clip model name, or the path of a model-config JSON.")
    pretrained: str = option("", "open_clip tag (openai, laion2b_s34b_b79k, …) or a weights file; empty: random weights.")
    init_from: str = option("", "Start from the exported weights of another run (its best, else its final ones).")
    lock_image: bool = option(False, "Keep the image tower as it is.")
    lock_text: bool = option(False, "Keep the text tower as it is.")
    grad_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, about 30 % more time.")
    precision: str = option(
        AUTO, "Arithmetic of the towers; auto: bf16 or fp16 where it pays.", choices=(AUTO, "fp32", "bf16", "fp16")
    )
    device: str = option(AUTO, "auto, cuda, cuda:N, mps or cpu; a device asked for and absent ends the job.", may_change=True)

    # Learning
    epochs: float = option(10.0, "Passes over the training rows.", above=0, at_most=1e6)
    max_steps: int = option(0, "Steps in all; wins over --epochs. 0: as many as --epochs needs.", at_least=0)
    global_batch_size: int = option(256, "Pairs per step, over all devices.", at_least=2)
    micro_batch: int = option(
        -1,
        "Pairs per device in the towers at a time: less memory, a third more time. 0: all. auto: as many as fit the GPU.",
        at_least=0,
        may_change=True,
        auto=-1,
    )
    compile: str = option(
        "off",
        "on: norms and activations of the towers' blocks are compiled. auto: if a step on this GPU is faster so.",
        choices=("off", "on", AUTO),
        may_change=True,
    )
    loss: str = option("clip", "clip: softmax over the global batch. siglip: a sigmoid for each pair.", choices=("clip", "siglip"))
    soft_targets: float = option(
        0.0,
        "Share of the target that goes to pairs whose captions share tags, by how many (--tag-separator). 0: none.",
        at_least=0,
        at_most=0.9,
    )
    lr: float = option(
        1e-5,
        "Peak learning rate. auto: for weights that have learnt, measured on the training data before the first step; else 5e-4.",
        above=0,
        auto=-1,
    )
    weight_decay: float = option(0.1, "AdamW's decay of matrices (never of biases, norms and logit_scale).", at_least=0)
    beta1: float = option(0.9, "AdamW's beta1.", at_least=0, at_most=0.9999)
    beta2: float = option(0.98, "AdamW's beta2.", at_least=0, at_most=0.999999)
    eps: float = option(1e-6, "AdamW's epsilon.", above=0)
    warmup: int = option(-1, "Steps of linear warm-up; auto: the lesser of 500 and a tenth of all steps.", at_least=0, auto=-1)
    grad_clip: float = option(1.0, "Largest norm of the gradient; 0: no clipping.", at_least=0)
    crop_scale: float = option(0.9, "Smallest share of an image that a random crop keeps; 1: no random crops.", above=0, at_most=1)
    seed: int = option(0, "Seed of the order, the crops and the caption choice.", at_least=0, at_most=2**63 - 1)
    max_nonfinite_steps: int = option(20, "Steps in a row without a finite gradient that end the job.", at_least=1, may_change=True)

    # Checkpoints and evaluation
    checkpoint_every: Interval = option(
        Interval(AUTO), "Interval of checkpoints; auto: rare enough to cost nothing, 10m at most.", may_change=True
    )
    keep_checkpoints: int = option(2, "Newest checkpoints kept, besides the best one.", at_least=2, may_change=True)
    keep_every: int = option(0, "Also keep the checkpoints at multiples of this step; 0: none.", at_least=0, may_change=True)
    evaluate_every: Interval = option(
        Interval("epochs", 1), "Interval of held-out evaluation, in steps or epochs; 0: only first and last."
    )
    best_metric: str = option(
        "mean_recall",
        "Held-out metric that chooses the best checkpoint: the highest, or the last within its noise.",
        choices=("mean_recall", *RECALLS),
    )
    patience: int = option(
        0, "Evaluations in a row that are not the best so far, after which the run is complete; 0: all its steps.", at_least=0
    )
    hang_timeout: Interval = option(
        Interval("seconds", 1800), "Silence after which a job that does not get on ends itself with 70. 0: never.", may_change=True
    )
    max_idle_attempts: int = option(
        10, "Attempts in a row without a checkpoint that end the run; 0: no limit.", at_least=0, may_change=True
    )

    # Running
    nproc_per_node: int = option(1, "Processes to start on this node, one per GPU.", at_least=1, may_change=True)
    nnodes: int = option(1, "Nodes that run this command, with MASTER_ADDR and NODE_RANK set.", at_least=1, may_change=True)
    threads: int = option(0, "Threads that decode images; 0: one per core, 16 at most.", at_least=0, may_change=True)
    jpeg_decoder: str = option(
        "cpu",
        "What decodes training images: cpu, gpu (JPEGs), or auto: the faster one.",
        choices=("cpu", "gpu", AUTO),
        may_change=True,
    )
    torch_threads: int = option(0, "Threads of torch on the CPU; 0: one per core. The bits of a run depend on it.", at_least=0)
    metrics_port: int = option(
        9465, "Port of /metrics and /healthz; taken: a free one. 0: none.", at_least=0, at_most=65535, may_change=True
    )
    metrics_host: str = option("0.0.0.0", "Address that /metrics listens on.", may_change=True)  # noqa: S104  scraped from afar
    metrics_textfile: str = option("", "Folder for a .prom file with the same, for node_exporter.", may_change=True)
    tensorboard: str = option("", "Folder for TensorBoard's event files, of every attempt; needs its package.", may_change=True)
    log_every: Interval = option(Interval("seconds", 10), "Interval of log lines, where there is no terminal.", may_change=True)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check_value(spec, getattr(self, spec.name))
        if self.template.count("{}") != 1:
            raise ConfigError(
                f'--template must contain {{}} once, where the caption goes, such as "a photo of {{}}"; found "{self.template}".'
            )
        if not self.tag_separator:
            raise ConfigError("--tag-separator must be auto or what stands between two tags, such as a comma; found nothing.")
        if self.evaluate_every.kind == "seconds":
            raise ConfigError(
                f"--evaluate-every must be counted in steps or epochs (200, 1ep); found {self.evaluate_every}. "
                "By the clock, the best checkpoint would depend on the machine's speed."
            )
        for name in ("storage_patience", "hang_timeout"):
            if getattr(self, name).kind not in ("seconds", "never"):
                raise ConfigError(f"{flag(name)} must be a time (30s, 10m, 2h) or 0; found {getattr(self, name)}.")
        _ = self.scratch_limit_bytes
        if self.lock_image and self.lock_text:
            raise ConfigError("--lock-image and --lock-text together leave nothing to train; give one of them.")
        if bool(self.guard_csv) != bool(self.guard_lmdb):
            raise ConfigError("--guard-csv and --guard-lmdb belong together; give both or neither.")
        if (self.guard_csv or self.patience) and not (self.val_csv or self.val_fraction):
            raise ConfigError("--guard-csv and --patience go with held-out pairs: --val-fraction above 0, or --val-csv.")
        if self.patience and self.evaluate_every.kind == "never":
            raise ConfigError("--patience counts evaluations, and --evaluate-every 0 leaves only the first and the last.")
        if self.soft_targets and self.loss != "clip":
            raise ConfigError("--soft-targets belongs to --loss clip; siglip has a target for each pair by itself.")
        if self.init_from and self.pretrained:
            raise ConfigError("--init-from and --pretrained both name the first weights; give one of them.")

    @property
    def scratch_limit_bytes(self) -> int | None:
        """None: no limit. Raises: ConfigError, when --scratch-limit is no number of bytes."""
        if not self.scratch_limit:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", self.scratch_limit.strip().lower())
        if not match:
            raise ConfigError(f"--scratch-limit must be bytes, such as 200GB or 500GiB; found {self.scratch_limit!r}.")
        power = " kmgt".index(match[2] or " ")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, intervals as text."""
        values = dataclasses.asdict(self)
        return {
            name: str(getattr(self, name)) if isinstance(getattr(self, name), Interval) else value for name, value in values.items()
        }


FIELDS: dict[str, dataclasses.Field[Any]] = {spec.name: spec for spec in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)


def parse_value(name: str, value: Any, *, origin: str) -> Any:
    """Turns text (flag, environment) or a TOML/JSON value into the field's type.

    Raises: ConfigError, naming origin (such as "CLIPJOB_LR" or "job.toml: lr"), what was expected and what was found.
    """
    return parse(FIELDS[name], _TYPES[name], value, origin=origin)


def starts_random(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings starts from random weights: no tag or file is given, no run, and the model is a name or a
    config, not a folder or a model of the hub."""
    model = str(settings.get("model", ""))
    is_place = model.startswith(("hf-hub:", "local-dir:")) or ("/" in model and not model.endswith(".json"))
    return not (settings.get("pretrained") or settings.get("init_from") or is_place)


def is_auto(name: str, value: Any) -> bool:
    """Whether a field's value is the number that stands for auto."""
    return name in FIELDS and stands_for_auto(FIELDS[name], value)


def type_name(name: str) -> str:
    """The type of a field as documentation shows it."""
    return {str: "text", int: "whole number", float: "number", bool: "true or false", Interval: "interval"}[_TYPES[name]]


def field_type(name: str) -> type:
    """str, int, float, bool or Interval."""
    kind: type = _TYPES[name]
    return kind
