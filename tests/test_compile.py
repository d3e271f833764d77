"""--compile: the same numbers to rounding, one graph for all shapes, bits that a kill does not change, and a way on without."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from system import Job, assert_identical, finish, outcome, run_to_end
from test_model import tokens_of
from torch import Tensor
from torch._dynamo.utils import counters

from job import fitted
from job.config import Config
from job.model import fit
from job.model.build import ClipModel
from job.model.image import encode_images
from job.model.text import encode_texts
from job.model.towers import set_compiled
from job.runtime.world import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's compiler itself

LONG = "a much longer caption, with many words in it, so many that it is in a group of its own"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(clip: ClipModel, *, images: int, texts: list[str]) -> dict[str, Tensor]:
    """Of all weights, in bf16. (In float32 they differ by 1e-7 of ViT-B-32's.)"""
    clip.module.zero_grad(set_to_none=True)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = encode_images(clip.module, pixels, shift=clip.shift, scale=clip.scale)
        text = encode_texts(clip.module, tokens_of(clip, texts).groups)
    (image.mul(torch.arange(16.0)).sum() + text.mul(torch.arange(16.0)).sum()).backward()
    return {name: parameter.grad for name, parameter in clip.module.named_parameters() if parameter.grad is not None}


def test_gradients_are_the_same_to_rounding_and_shapes_need_no_new_graphs(tmp_path: Path) -> None:
    clip = tiny.make_clip(
        tmp_path,
        vision_cfg={**tiny.CONFIG["vision_cfg"], "width": 48, "layers": 4},
        text_cfg={**tiny.CONFIG["text_cfg"], "layers": 4},
    )
    batches: list[dict[str, Any]] = [
        {"images": 6, "texts": ["a dog", LONG, "cat"]},
        {"images": 9, "texts": ["a dog", "cat", "a red thing", "two", "three"]},
        {"images": 3, "texts": [LONG, LONG + " still", "a dog"]},
    ]
    expected = [gradients(clip, **batch) for batch in batches]
    assert set_compiled(clip.module, on=True) == 2
    graphs = []
    for batch, of_eager in zip(batches, expected, strict=True):
        for name, found in gradients(clip, **batch).items():
            assert (found - of_eager[name]).norm() <= 0.02 * of_eager[name].norm(), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [4, 4, 4]  # before and after attention, of two widths


def test_nothing_is_compiled_where_nothing_is_learnt(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    groups = tokens_of(clip, ["a dog", LONG]).groups
    with torch.no_grad():
        expected = encode_texts(clip.module, groups)
        set_compiled(clip.module, on=True)
        assert torch.equal(encode_texts(clip.module, groups), expected)
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("seconds", "kept"), [(0.01, True), (0.05, False), (0.08, False)])
def test_blocks_stay_compiled_only_if_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, kept: bool
) -> None:
    clip, clock = tiny.make_clip(tmp_path), [0.0]

    def trial(clip: ClipModel, *_: Any, **__: Any) -> None:
        clock[0] += seconds if compiled(clip) else 0.05

    monkeypatch.setattr(fit, "try_step", trial)
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert fit.compile_where_faster(clip, [], rows=4, at_most=4, autocast=None) is kept
    assert compiled(clip) is kept


def test_a_compiled_step_that_needs_more_memory_than_there_is_does_not_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny.make_clip(tmp_path)

    def trial(clip: ClipModel, *_: Any, **__: Any) -> None:
        if compiled(clip):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fit, "try_step", trial)
    assert not fit.compile_where_faster(clip, [], rows=4, at_most=4, autocast=None)
    assert not compiled(clip)


def test_towers_that_are_not_open_clips_usual_ones_are_left_alone(tmp_path: Path) -> None:
    vision = {**tiny.CONFIG["vision_cfg"], "pool_type": "avg"}
    text = {**tiny.CONFIG["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    clip = tiny.make_clip(tmp_path, custom_text=True, vision_cfg=vision, text_cfg=text)
    assert set_compiled(clip.module, on=True) == 0
    assert not compiled(clip)


def compiled(clip: ClipModel) -> bool:
    return any(getattr(part, "compiled", False) for part in clip.module.modules())


def on_a_gpu() -> Any:
    """An attempt that thinks it has one."""
    told = SimpleNamespace(beat=lambda _doing: None, check=lambda _doing: None)
    return SimpleNamespace(device=torch.device("cuda"), watchdog=told, stop=told, world=ALONE)


def test_auto_goes_on_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clip = tiny.make_clip(tmp_path)

    def fails(clip: ClipModel, *_: Any, **__: Any) -> bool:
        set_compiled(clip.module, on=True)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(fitted, "compile_where_faster", fails)
    config = Config(compile="auto", micro_batch=0, scratch=str(tmp_path))
    assert fitted._compiled(config, on_a_gpu(), clip, [], rows=4, autocast=None) == "off"
    assert not compiled(clip)
    assert "not compiled: Failed to find C compiler" in caplog.text


def test_memory_that_runs_out_is_not_taken_for_a_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fitted, "compile_where_faster", fails)
    config = Config(compile="auto", micro_batch=0, scratch=str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError):
        fitted._compiled(config, on_a_gpu(), tiny.make_clip(tmp_path), [], rows=4, autocast=None)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    csv, lmdb = tiny.write_data(tmp_path, 40)

    def command(run: str, *more: str) -> list[str]:
        places = ["--csv", str(csv), "--lmdb", str(lmdb), "--model", str(tiny.write_config(tmp_path)), "--run", str(tmp_path / run)]
        how = ["--global-batch-size", "8", "--epochs", "3", "--lr", "1e-3", "--precision", "fp32", "--torch-threads", "1"]
        rest = ["--metrics-port", "0", "--checkpoint-every", "5", "--log-every", "1", "--device", "cpu", "--threads", "2"]
        return ["train", *places, *how, *rest, "--scratch", str(tmp_path / "s"), *more]

    return command


def test_a_compiled_run_survives_a_kill_to_the_bit_and_keeps_its_code(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    finish(words("calm", "--compile", "on"))
    code = set((tmp_path / "s" / "compiled").rglob("*.so"))
    assert code
    with Job(*words("killed", "--compile", "on")) as first:
        first.wait_for("step", step=8)
        first.send(signal.SIGKILL)
        assert first.end() == -signal.SIGKILL
    finish(words("killed"))  # the run knows
    assert set((tmp_path / "s" / "compiled").rglob("*.so")) == code, "compiled again"
    assert_identical(tmp_path / "killed", outcome(tmp_path / "calm"))


def test_a_run_that_asks_for_it_where_nothing_can_be_compiled_says_so(words: Callable[..., list[str]]) -> None:
    broken = {"CXX": "/bin/false", "CC": "/bin/false"}
    code, ended = run_to_end(words("run", "--compile", "on"), environment=broken, program=[sys.executable, "-m", "job"])
    assert code == 71
    assert "go on with --compile off." in "".join(ended.text)


def test_on_a_cpu_auto_is_off_and_the_run_keeps_that(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    finish(words("run", "--compile", "auto", "--max-steps", "1"))
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["config"]["compile"] == "off"
