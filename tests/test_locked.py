"""A locked tower's features are computed once, and a run that has them learns what a run without them would."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from system import Job, assert_identical, finish, outcome
from test_model import batch_of, state_of, step_of

from job.data.batches import Batch
from job.data.captions import Captions, Known
from job.data.images import open_images
from job.evaluate.encode import encode_captions, encode_keys, evaluating
from job.locked import LARGEST_BYTES
from job.model.build import ClipModel, prepare_towers
from job.model.image import encode_images
from job.model.step import StepReport

COUNT = 60
HOW: dict[str, Any] = {"batch_size": 7, "autocast": None}


def captions_of(clip: ClipModel, texts: list[str]) -> Captions:
    return Captions(texts, clip.tokenizer, lengths_of=None, mode="whole", tag_separator=", ", template="{}", seed=0)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_step_on_known_features_is_the_step_that_computes_them(tmp_path: Path, tower: str) -> None:
    texts = [f"thing {number % 5}" for number in range(6)]
    images = {f"{number}.png": tiny.picture(number, width=32, height=32) for number in range(6)}

    def step(known: bool) -> tuple[StepReport, dict[str, Any]]:
        clip = tiny.make_clip(tmp_path / str(known))
        prepare_towers(clip.module, lock_image=tower == "image", lock_text=tower == "text", grad_checkpointing=False)
        batch = batch_of(clip)
        if known and tower == "image":
            keyed = dict(zip(images, batch.images, strict=True))
            batch = Batch(_features_of_pixels(clip, list(keyed.values())), batch.tokens, ())
        if known and tower == "text":
            distinct = list(dict.fromkeys(texts))
            features = encode_captions(clip, distinct, captions=captions_of(clip, texts), **HOW)
            assert features is not None
            batch = Batch(
                batch.images, captions_of(clip, texts).known(texts, Known(dict(zip(distinct, range(5), strict=True)), features)), ()
            )
        state = state_of(clip)
        report = step_of(state, batch, clip, lr=1e-3)
        return report, {name: parameter.grad for name, parameter in clip.module.named_parameters() if parameter.grad is not None}

    (computed, expected), (known, found) = step(known=False), step(known=True)
    assert torch.allclose(computed.values, known.values, rtol=1e-4, atol=1e-6)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-6) for name, value in expected.items())


def _features_of_pixels(clip: ClipModel, pixels: list[torch.Tensor]) -> torch.Tensor:
    with evaluating(clip, autocast=None):
        return encode_images(clip.module, torch.stack(pixels), shift=clip.shift, scale=clip.scale)


def test_an_image_that_cannot_be_decoded_is_left_out_of_the_known_ones(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    content = {f"{number}.jpg": tiny.picture(number) for number in range(5)} | {"2.jpg": b"no image"}
    images = open_images(tiny.write_lmdb(tmp_path / "images.lmdb", content))
    found = encode_keys(clip, [*sorted(content), "absent.jpg"], images=images, threads=2, **HOW)
    assert found is not None
    features, there = found
    assert there.tolist() == [True, True, False, True, True, False]
    assert features.shape == (6, 16)
    images.close()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("locked")
    csv, lmdb = tiny.write_data(folder, COUNT)
    model = tiny.write_config(folder)

    def words(run: Path, *more: str) -> list[str]:
        places = ["--csv", str(csv), "--lmdb", str(lmdb), "--model", str(model), "--run", str(run), "--scratch", str(folder / "s")]
        how = ["--global-batch-size", "8", "--epochs", "3", "--lr", "1e-3", "--precision", "fp32", "--torch-threads", "1"]
        rest = ["--metrics-port", "0", "--checkpoint-every", "5", "--log-every", "1", "--device", "cpu", "--threads", "2"]
        return ["train", *places, *how, *rest, *more]

    return words


@pytest.mark.parametrize("locked", [("--lock-image", "--crop-scale", "1"), ("--lock-text",)], ids=["image", "text"])
def test_a_run_with_a_locked_tower_survives_a_kill_to_the_bit(
    tmp_path: Path, command: Callable[..., list[str]], locked: tuple[str, ...]
) -> None:
    calm = finish(command(tmp_path / "calm", *locked))
    tower = locked[0].removeprefix("--lock-")
    assert len(calm.seen(f"features of the locked {tower} tower")) == 1
    with Job(*command(tmp_path / "killed", *locked)) as first:
        first.wait_for("step", step=8)
        first.send(signal.SIGKILL)
        assert first.end() == -signal.SIGKILL
    finish(command(tmp_path / "killed", *locked))
    assert_identical(tmp_path / "killed", outcome(tmp_path / "calm"))


def test_features_are_not_kept_where_no_row_comes_twice_or_crops_differ(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    once = finish(command(tmp_path / "once", "--lock-text", "--max-steps", "4"))
    crops = finish(command(tmp_path / "crops", "--lock-image"))
    for ended in (once, crops):
        assert not [line for line in ended.events if line["event"].startswith("features of the locked")]
    assert [line for line in crops.events if "--crop-scale 1" in line["event"]]


def test_more_features_than_memory_should_hold_are_computed_as_they_are_met(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    assert LARGEST_BYTES // (4 * 512) >= 2_000_000
    small = "import job.locked; job.locked.LARGEST_BYTES = 64; from job.launch import main; main()"
    limited = finish(command(tmp_path / "run", "--lock-text"), program=[sys.executable, "-c", small])
    assert not limited.seen("features of the locked text tower")
    assert [line for line in limited.events if "more than fit in memory" in line["event"]]
