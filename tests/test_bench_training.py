"""The benchmarks of training measure what they say: captions of a known length, the right steps of the other trainer's log."""

import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest

from benchmarks.captions import make_captions
from benchmarks.open_clip_trainer import command, environment, read_log, steady

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("tokens", "most"), [(22, 45), (8, 17)])
def test_made_captions_have_the_asked_number_of_tokens_and_a_long_tail(tokens: int, most: int) -> None:
    captions = make_captions(256, tokens=tokens, seed=0)
    lengths = sorted((open_clip.get_tokenizer("ViT-B-32")(captions).argmax(dim=-1) + 1).tolist())
    assert sum(lengths) / 256 == tokens
    assert len(set(captions)) == 256
    assert tokens * 1.6 < lengths[243] < most
    assert captions == make_captions(256, tokens=tokens, seed=0)


def test_open_clips_trainer_knows_the_flags_that_it_is_given(tmp_path: Path) -> None:
    from open_clip_train.params import parse_args

    words = command(tmp_path / "a.csv", model="ViT-B-32", device="cpu", precision="bf16", batch=4, workers=2, window=1)
    args = parse_args(words[3:])
    assert (args.dataset_type, args.csv_separator, args.precision, args.batch_size) == ("csv", "|", "amp_bf16", 4)


def test_open_clips_trainer_starts_whether_or_not_tar_files_can_be_read(tmp_path: Path) -> None:
    code = "import open_clip_train.main"
    found = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]


def line(step: int, *, batch: int, steps: int, data: float, seconds: float) -> str:
    done = f"[{step * batch:>3}/{steps * batch} ({100 * step / steps:.0f}%)]"
    times = f"Data (t): {data:.3f} Batch (t): {seconds:.3f}, {batch / seconds:#g}/s, {batch / seconds:#g}/s/gpu"
    return f"2026-01-01,00:00:00 | INFO | Train Epoch: 0 {done} {times} LR: 0.000010 Logit Scale: 14.286 Loss: 3.4 (3.4)"


def test_only_lines_about_steady_steps_count() -> None:
    log = "\n".join(line(step, batch=4, steps=14, data=0.25, seconds=step) for step in (1, 6, 11, 14))
    lines = read_log("INFO | Start epoch 0\n" + log, batch=4)
    assert lines == [(1, 1.0, 0.25), (6, 6.0, 0.25), (11, 11.0, 0.25), (14, 14.0, 0.25)]
    assert steady(lines, skipped=2, window=5) == [(11.0, 0.25)]  # 14 is about three steps only
    each = read_log("\n".join(line(step, batch=4, steps=5, data=0, seconds=step) for step in range(1, 6)), batch=4)
    assert [seconds for seconds, _ in steady(each, skipped=2, window=1)] == [3.0, 4.0, 5.0]


def test_gpu_memory_is_not_invented_where_there_is_no_gpu() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--quick"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "not measured: no CUDA device" in found.stdout
