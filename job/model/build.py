"""The base model of a run, as a folder that open_clip itself can load.

The first attempt writes the folder (config, tokenizer, weights) into the run; every attempt, the first one too, builds its
model from there. So a restart calls no hub, and the model and its export can't differ in activation or preprocessing.
"""

import contextlib
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn

from job.data.captions import Tokenizer
from job.data.pixels import View
from job.errors import ConfigError, DataError, StorageError
from job.model.weights import first_line, load_weights, save_weights

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TEXT_CONFIG_FOLDER = "hf_text_config"


@dataclass(frozen=True)
class ClipModel:
    """A model with everything that its inputs need."""

    module: nn.Module
    tokenizer: Tokenizer
    view: View
    shift: Tensor
    """(1, 3, 1, 1) float32: subtracted from pixels on the scale 0–255."""
    scale: Tensor
    """(1, 3, 1, 1) float32: multiplied by afterwards."""

    def to(self, device: torch.device) -> "ClipModel":
        """The same model, moved."""
        return replace(self, module=self.module.to(device), shift=self.shift.to(device), scale=self.scale.to(device))


def write_base(folder: Path, *, model: str, pretrained: str, seed: int) -> None:
    """Writes the model that training starts from.

    Args:
        folder: empty or absent.
        model: an open_clip name, hf-hub:…, a folder that open_clip can load, or a model-config JSON.
        pretrained: a tag of open_clip, a local weights file, or a folder that `clipjob fetch` wrote; empty: random weights.
        seed: of random weights.
    Raises:
        ConfigError: no such model or tag. DataError: the weights file is missing, hostile, or of another model.
        StorageError: the hub can't be reached.
    """
    source = pretrained if os.path.isdir(pretrained) else model
    model_cfg, preprocess_cfg, weights = _find(source, "" if source == pretrained else pretrained)
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(folder, model_cfg=model_cfg, model=source)
    _write_config(folder, model_cfg, preprocess_cfg)
    torch.manual_seed(seed)
    module = _instantiate(folder, model=source)
    if weights:
        load_weights(module, weights, model=model)
    _write_config(folder, model_cfg, {**preprocess_cfg, **_preprocessing(module)})
    save_weights(module.state_dict(), folder / WEIGHTS_FILE)


def build_base(folder: Path) -> ClipModel:
    """The model in a folder that `write_base` or `write_export` wrote, on the CPU in float32, its weights not loaded yet.

    Raises: DataError, if the files are damaged.
    """
    module = _instantiate(folder, model=str(folder))
    cfg = _preprocessing(module)
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    interpolation = cfg["interpolation"] if cfg["interpolation"] in ("bicubic", "bilinear") else "bicubic"
    view = View(height, width, interpolation, cfg["resize_mode"], int(cfg["fill_color"] or 0))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (torch.tensor(cfg[name], dtype=torch.float32).view(1, 3, 1, 1) for name in ("mean", "std"))
    return ClipModel(module, tokenizer, view, shift=mean * 255, scale=1 / (std * 255))


def load_base(folder: Path, *, weights: Path | None = None) -> ClipModel:
    """The same model with its weights, or with those of a checkpoint. Raises: DataError."""
    clip = build_base(folder)
    load_weights(clip.module, str(weights or folder / WEIGHTS_FILE), model=str(folder))
    return clip


def prepare_towers(module: Any, *, lock_image: bool, lock_text: bool, grad_checkpointing: bool) -> None:
    """Sets a model up for training. A locked tower keeps all its weights and computes as in evaluation, without dropout."""
    module.train()
    if lock_image:
        module.lock_image_tower()
        module.visual.eval()
        module.visual.requires_grad_(False)  # open_clip leaves heads of some towers free
    if lock_text:
        module.lock_text_tower()
        (module.text if hasattr(module, "text") else module.transformer).eval()
        if hasattr(module, "text"):
            module.text.requires_grad_(False)
    if grad_checkpointing:
        module.set_grad_checkpointing(True)


def write_export(folder: Path, *, base: Path, weights: Path) -> None:
    """A folder with the base's config and tokenizer and these weights, for open_clip's `local-dir:` and `pretrained=`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(WEIGHTS_FILE), dirs_exist_ok=True)
    shutil.copyfile(weights, folder / WEIGHTS_FILE)


def parameter_count(model: str) -> int:
    """Parameters of a model, counted without taking memory for them. Raises: ConfigError, StorageError like `write_base`."""
    model_cfg, preprocess_cfg, _ = _find(model, "")
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        _write_config(Path(folder), model_cfg, preprocess_cfg)
        return sum(parameter.numel() for parameter in _instantiate(Path(folder), model=model, device="meta").parameters())


def tokenizer_for(model: str) -> tuple[Tokenizer, int]:
    """The tokenizer of a model and its context length, without building the model."""
    model_cfg, preprocess_cfg, _ = _find(model, "")
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(Path(folder), model_cfg=model_cfg, model=model)
        _write_config(Path(folder), model_cfg, preprocess_cfg)
        return open_clip.get_tokenizer(f"local-dir:{folder}"), int(model_cfg["text_cfg"].get("context_length", 77))


def _find(model: str, pretrained: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(model_cfg, preprocess_cfg, path of the weights or "") of a model name or folder and a tag or weights file."""
    if model.startswith("hf-hub:"):
        name = model.removeprefix("hf-hub:")
        with _hub(f"the model {model}"):
            found = open_clip.factory._get_hf_config(name)  # noqa: SLF001  the only way to the config alone
            weights = pretrained or open_clip.pretrained.download_pretrained_from_hf(name)
        return found["model_cfg"], found.get("preprocess_cfg", {}), weights
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        found = _read_json(folder / CONFIG_FILE)
        if "model_cfg" not in found:
            raise ConfigError(
                f"{folder / CONFIG_FILE} has no model_cfg; expected a folder that open_clip or `clipjob fetch` wrote."
            )
        weights = pretrained or open_clip.factory._find_checkpoint_in_dir(folder)  # noqa: SLF001
        return found["model_cfg"], found.get("preprocess_cfg", {}), _existing(weights) if weights else ""
    if model.endswith(".json"):
        found = _read_json(folder)
        if "embed_dim" not in found or not all(isinstance(found.get(part), dict) for part in ("vision_cfg", "text_cfg")):
            raise ConfigError(
                f"{model} is not an open_clip model config: it must have embed_dim and the objects vision_cfg and text_cfg."
            )
        return found, {}, _existing(pretrained) if pretrained else ""
    model_cfg = open_clip.get_model_config(model)
    if model_cfg is None:
        close = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(f"--model {model} is neither a model of open_clip nor a config file or folder.{hint}")
    if not pretrained:
        return model_cfg, {}, ""
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag:
        return model_cfg, {}, _existing(pretrained, tags=open_clip.list_pretrained_tags_by_model(model))
    # Weights trained with QuickGELU run with any activation, but worse: the tag knows, so the user need not.
    model_cfg["quick_gelu"] = tag.get("quick_gelu", model_cfg.get("quick_gelu", False))
    with _hub(f"the weights {pretrained} of {model}"):
        weights = open_clip.download_pretrained(tag)
    preprocess_cfg = {name: tag[name] for name in ("mean", "std", "interpolation", "resize_mode") if tag.get(name)}
    return model_cfg, preprocess_cfg, weights


def _existing(path: str, *, tags: list[str] | None = None) -> str:
    if os.path.isfile(path):
        return path
    known = f" The model's tags are {', '.join(tags)}." if tags else ""
    if os.sep not in path and not path.endswith((".safetensors", ".pt", ".pth", ".bin")):
        known = known or " Tags belong to open_clip's own models; with a config file, give a weights file."
        raise ConfigError(f"--pretrained {path} is neither a tag of this model nor a file.{known}")
    raise DataError(f"The weights file {path} does not exist. Check --pretrained.{known}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The model config {path} can't be read ({error.strerror}). Check --model and --pretrained.") from None
    except ValueError as error:
        raise ConfigError(f"The model config {path} is not valid JSON: {error}. Mend it, or check --model.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"The model config {path} must hold one JSON object. Check --model.")
    return found


@contextlib.contextmanager
def _hub(what: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"The hub has no {what.removeprefix('the ')}: {first_line(error)} Check --model.") from None
    except Exception as error:  # noqa: BLE001  hub clients raise whatever their transport raises
        raise StorageError(
            f"The hub can't be reached for {what}: {first_line(error)}. On a machine without a network, run "
            "`clipjob fetch TAG DIR` where there is one, copy DIR, and give it as --pretrained DIR."
        ) from None


def _write_config(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2), encoding="utf-8"
    )


def _save_tokenizer(folder: Path, *, model_cfg: dict[str, Any], model: str) -> None:
    """The files of a Hugging Face tokenizer or text tower. open_clip's own tokenizer needs none."""
    text_cfg = model_cfg["text_cfg"]
    if text_cfg.get("hf_tokenizer_name"):
        _need_transformers(model)
        with _hub(f"the tokenizer {text_cfg['hf_tokenizer_name']}"):
            here = Path(model.removeprefix("local-dir:"))
            source = f"local-dir:{here}" if (here / "tokenizer_config.json").is_file() else None
            tokenizer = (
                open_clip.get_tokenizer(source) if source else open_clip.tokenizer.HFTokenizer(text_cfg["hf_tokenizer_name"])
            )
        tokenizer.save_pretrained(str(folder))
    if text_cfg.get("hf_model_name"):
        from transformers import AutoConfig

        here = Path(model.removeprefix("local-dir:")) / TEXT_CONFIG_FOLDER
        with _hub(f"the text tower {text_cfg['hf_model_name']}"):
            AutoConfig.from_pretrained(str(here) if here.is_dir() else text_cfg["hf_model_name"]).save_pretrained(
                str(folder / TEXT_CONFIG_FOLDER)
            )


def _need_transformers(model: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ConfigError(f"--model {model} uses a Hugging Face tokenizer; install it with `pip install 'clipjob[hf]'`.") from None


def _instantiate(folder: Path, *, model: str, device: str = "cpu") -> nn.Module:
    """The architecture with random weights, no hub asked. Args: model: what the user calls it."""
    overrides = {}
    if (folder / TEXT_CONFIG_FOLDER).is_dir():
        text_cfg = _read_json(folder / CONFIG_FILE)["model_cfg"]["text_cfg"]
        overrides["text_cfg"] = {**text_cfg, "hf_model_name": str(folder / TEXT_CONFIG_FOLDER), "hf_model_pretrained": False}
    try:
        module: nn.Module = open_clip.create_model(
            f"local-dir:{folder}", device=device, load_weights=False, pretrained_text=False, **overrides
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ConfigError(f"open_clip can't build {model} from its config: {first_line(error)}. Check --model.") from None
    return module


def _preprocessing(module: Any) -> dict[str, Any]:
    return dict(module.visual.preprocess_cfg)
