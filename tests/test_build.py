"""Any open_clip model becomes a base folder, and what is exported loads in open_clip as what was trained."""

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, PreTrainedTokenizerFast

from job.checkpoint.state import WEIGHTS
from job.errors import ConfigError, DataError
from job.model.build import CONFIG_FILE, WEIGHTS_FILE, load_base, parameter_count, tokenizer_for, write_base, write_export
from job.model.text import encode_texts


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(tiny.write_config(tmp_path))


def base_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return content


def test_openai_weights_get_quickgelu_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "downloaded.safetensors"
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    save_file(model.state_dict(), weights)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _model, tag: {"hf_hub": "x/", "quick_gelu": tag == "openai"})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _cfg: str(weights))
    write_base(tmp_path / "openai", model="ViT-S-32-alt", pretrained="openai", seed=0)
    write_base(tmp_path / "laion", model="ViT-S-32-alt", pretrained="laion2b", seed=0)
    assert base_config(tmp_path / "openai")["model_cfg"]["quick_gelu"] is True
    assert base_config(tmp_path / "laion")["model_cfg"]["quick_gelu"] is False
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'openai'}")
    assert type(exported.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_the_tag_openai_is_known_to_need_quickgelu() -> None:
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["quick_gelu"] is True
    assert not open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k").get("quick_gelu")


def test_random_weights_follow_the_seed(tmp_path: Path, config: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_base(tmp_path / name, model=config, pretrained="", seed=seed)
    a, b, c = (load_file(tmp_path / name / WEIGHTS_FILE) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["visual.proj"], c["visual.proj"])


@pytest.mark.parametrize("kind", ["safetensors", "pt", "state_dict in pt", "module. prefix"])
def test_weights_files_of_all_kinds_load(tmp_path: Path, config: str, kind: str) -> None:
    write_base(tmp_path / "source", model=config, pretrained="", seed=5)
    weights = load_file(tmp_path / "source" / WEIGHTS_FILE)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "pt":
        torch.save(weights, path)
    elif kind == "state_dict in pt":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    write_base(tmp_path / "base", model=config, pretrained=str(path), seed=0)
    found = load_file(tmp_path / "base" / WEIGHTS_FILE)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


class _Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.witness, "it ran"))


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path: Path, config: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / "hostile.pt"
    torch.save({"visual.proj": torch.zeros(2), "payload": _Hostile(witness)}, path)
    with pytest.raises(DataError, match=r"hostile\.pt is not plain tensors"):
        write_base(tmp_path / "base", model=config, pretrained=str(path), seed=0)
    path.write_bytes(pickle.dumps(_Hostile(witness), protocol=2))
    with pytest.raises(DataError, match=r"hostile\.pt"):
        write_base(tmp_path / "base", model=config, pretrained=str(path), seed=0)
    assert not witness.exists()


def test_a_folder_that_fetch_wrote_is_a_source(tmp_path: Path, config: str) -> None:
    write_base(tmp_path / "fetched", model=config, pretrained="", seed=9)
    write_base(tmp_path / "base", model="ViT-B-32", pretrained=str(tmp_path / "fetched"), seed=0)
    assert base_config(tmp_path / "base") == base_config(tmp_path / "fetched")
    assert (tmp_path / "base" / WEIGHTS_FILE).read_bytes() == (tmp_path / "fetched" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("name", ["ViT-B-23", "vit-b-32"])
def test_an_unknown_model_suggests_near_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model {name} is neither .* Did you mean .*ViT"):
        write_base(tmp_path / "base", model=name, pretrained="", seed=0)


def test_parameters_are_counted_without_memory() -> None:
    assert parameter_count("ViT-B-32") == 151_277_313


def test_tokenizer_of_a_model_comes_without_its_weights() -> None:
    tokenizer, context_length = tokenizer_for("ViT-B-32")
    assert context_length == 77
    assert torch.equal(tokenizer(["a dog"]), open_clip.get_tokenizer("ViT-B-32")(["a dog"]))


@pytest.mark.parametrize("changes", [{}, {"quick_gelu": True}, {"custom_text": True}], ids=["gelu", "quickgelu", "custom text"])
def test_an_export_loads_in_open_clip_and_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = tiny.make_clip(tmp_path, **changes)
    with torch.no_grad():
        for parameter in clip.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    trained = tmp_path / WEIGHTS
    save_file(clip.module.state_dict(), trained)
    write_export(tmp_path / "export", base=tmp_path / "base", weights=trained)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    pixels, tokens = torch.randn(2, 3, 32, 32), open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(["a dog", "x"])
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), clip.module.encode_image(pixels))
        assert torch.equal(model.encode_text(tokens), clip.module.encode_text(tokens))
    assert preprocess.transforms[0].size in (32, (32, 32))
    open_clip.add_model_config(tiny.write_config(tmp_path, **changes))
    by_file = open_clip.create_model("tiny-model", pretrained=str(trained))
    with torch.no_grad():
        assert torch.equal(by_file.encode_image(pixels), clip.module.encode_image(pixels))


def local_tokenizer(folder: Path) -> Path:
    """A Hugging Face tokenizer of a handful of words, as its hub would serve it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "cat", "a", "photo"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def test_a_model_with_a_hugging_face_tokenizer_works_without_its_hub_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = local_tokenizer(tmp_path / "hub")
    text_cfg = {**tiny.CONFIG["text_cfg"], "vocab_size": 8, "hf_tokenizer_name": str(hub), "context_length": 12}
    write_base(tmp_path / "base", model=str(tiny.write_config(tmp_path, text_cfg=text_cfg)), pretrained="", seed=0)
    hub.rename(tmp_path / "hub is gone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = load_base(tmp_path / "base")
    tokens = clip.tokenizer(["a photo", "dog"])
    assert tokens.shape == (2, 12)
    assert tokens[1, 0] == 4
    write_export(tmp_path / "export", base=tmp_path / "base", weights=tmp_path / "base" / WEIGHTS_FILE)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(["a photo", "dog"]), tokens)


def test_a_hugging_face_text_tower_is_built_from_the_base_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = local_tokenizer(tmp_path / "hub")
    BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).save_pretrained(hub)
    text_cfg = {
        "hf_model_name": str(hub),
        "hf_tokenizer_name": str(hub),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "hf_model_pretrained": False,
        "context_length": 12,
    }
    write_base(tmp_path / "base", model=str(tiny.write_config(tmp_path, text_cfg=text_cfg)), pretrained="", seed=0)
    hub.rename(tmp_path / "hub is gone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = load_base(tmp_path / "base")
    features = encode_texts(clip.module, [clip.tokenizer(["a photo", "dog"])])
    assert features.shape == (2, 16)
