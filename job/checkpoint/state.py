"""What survives a restart, in one place."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
FACTS = "state.json"
FORMAT = 1


@dataclass
class TrainState:
    """All that decides what the rest of the run does, beyond its config.

    Not saved, because they follow from (config, step): order of samples, crops, caption choices, dropout, learning rate.
    Not saved, because they decide nothing: prefetched batches, caches of tokens, throughput.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: "torch.amp.GradScaler | None"
    """Only for fp16."""
    step: int = 0
    """Global batches consumed, skipped ones included."""
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    bad_samples: int = 0
    """Images that could not be decoded, each time one was met."""
    evaluated_step: int = -1
    """The last step that was evaluated."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at step 0."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at evaluated_step."""
    best_step: int = -1
    best: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at best_step."""
    best_score: float = float("-inf")
    evaluations_since_best: int = 0
    """In a row, up to now."""
    range_test: dict[str, Any] = field(default_factory=dict)
    """With --lr auto, "lr" and, where it was measured, the curve: see job/range_test.py. The config keeps its auto."""
    seconds: float = 0.0
    """Time spent in all attempts up to this state, start-up included."""

    def take_metrics(self, metrics: dict[str, float], *, chosen: str = "mean_recall", last_of: int = 0) -> bool:
        """Keeps the held-out metrics of this step. Returns: whether it is the best so far by the chosen one.

        Args: last_of: at the last step, how many pairs are held out. It is the best, too, where they can't tell it from the best by
        one standard error of a share, for its learning rate has come down. But the base is not given up for what scores lower.
        """
        self.evaluated_step, self.after = self.step, metrics
        if self.step == 0:
            self.before = metrics
        score = metrics.get(chosen)
        if score is None:  # nothing could be evaluated, so no step is better or worse
            return False
        if score <= self.best_score and not (last_of and self._is_alike(score, self.before.get(chosen, -math.inf), last_of)):
            self.evaluations_since_best += 1
            return False
        self.evaluations_since_best = 0
        self.best_step, self.best_score, self.best = self.step, score, metrics
        return True

    def _is_alike(self, score: float, of_base: float, pairs: int) -> bool:
        return score > of_base and score >= self.best_score - math.sqrt(self.best_score * (1 - self.best_score) / pairs)

    def tensors(self, *, rank: int = 0, ranks: int = 1) -> dict[str, dict[str, Tensor]]:
        """File name -> tensors, on the device, not copied. Optimiser tensors are named `exp_avg:visual.proj` and the like.

        All ranks hold the same; each saves a part of equal size, rank 0 the weights with it.
        """
        optimizer = {
            f"{kind}:{name}": value
            for name, parameter in self.model.named_parameters()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        weights = dict(self.model.state_dict())
        if ranks == 1:
            return {WEIGHTS: weights, OPTIMIZER: optimizer}
        loads = [sum(tensor.nbytes for tensor in weights.values()), *[0] * (ranks - 1)]
        mine = {}
        for name, tensor in sorted(optimizer.items(), key=lambda item: (-item[1].nbytes, item[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += tensor.nbytes
            if lightest == rank:
                mine[name] = tensor
        return ({} if rank else {WEIGHTS: weights}) | {f"optimizer-{rank:05}-of-{ranks:05}.safetensors": mine}

    def facts(self) -> dict[str, Any]:
        """Everything but tensors, as JSON values."""
        names = (
            "step",
            "nonfinite_steps",
            "nonfinite_in_a_row",
            "bad_samples",
            "evaluated_step",
            "before",
            "after",
            "best_step",
            "best",
            "evaluations_since_best",
            "range_test",
            "seconds",
        )
        facts = {name: getattr(self, name) for name in names}
        facts["best_score"] = None if self.best_step < 0 else self.best_score
        facts["scaler"] = self.scaler.state_dict() if self.scaler else None
        return {"format": FORMAT, **facts}

    def restore(self, folder: Path, names: Iterable[str]) -> None:
        """Takes over a checkpoint's optimiser and facts; the model has its weights already (`load_base(weights=…)`).

        Args: names: of all files of the checkpoint, by however many ranks.
        """
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        scaler, best_score = facts.pop("scaler"), facts.pop("best_score")
        facts.pop("format")
        for name, value in facts.items():
            setattr(self, name, value)
        self.best_score = float("-inf") if best_score is None else best_score
        if self.scaler and scaler:
            self.scaler.load_state_dict(scaler)
        parameters = dict(self.model.named_parameters())
        for file in sorted(name for name in names if name.startswith("optimizer") and name.endswith(".safetensors")):
            for name, value in load_file(folder / file).items():
                kind, _, parameter_name = name.partition(":")
                parameter = parameters[parameter_name]
                # A copy: load_file maps the file, and the checkpoint will be removed while training goes on.
                self.optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)


def write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> dict[str, Path]:
    """Writes the files of a checkpoint from tensors in host memory. Returns: file name -> path.

    Args: facts: of rank 0; of the others empty, and not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tensors.items():
        save_file(content, folder / name, metadata={"format": "pt"})  # one entry: safetensors writes several in any order
        # safetensors makes its files private; another user id may have to resume this run.
        (folder / name).chmod(folder.stat().st_mode & 0o666)
    if not facts:
        return {name: folder / name for name in tensors}
    (folder / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return {name: folder / name for name in (*tensors, FACTS)}
