"""The model that users take, ViT-B-32, through the whole job: weights file, photographs, kill, resume, export."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from job.checkpoint.state import WEIGHTS
from job.checkpoint.store import RunStore
from job.data.pixels import decode, whole_view
from job.model.build import load_base
from job.model.image import encode_images
from job.model.text import encode_texts


def photographs() -> dict[str, bytes]:
    """Sixteen JPEGs cut from two photographs."""
    found = {}
    for name, image in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for number in range(8):
            left, top = 40 * (number % 4), 60 * (number // 4)
            stream = io.BytesIO()
            Image.fromarray(image).crop((left, top, left + 500, top + 367)).save(stream, "JPEG", quality=88)
            found[f"{name}/{number}.jpg"] = stream.getvalue()
    return found


@pytest.mark.system
def test_three_real_steps_killed_resumed_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    del model
    images = photographs()
    assert all(len(data) > 20_000 for data in images.values())
    csv = tiny.write_csv(tmp_path / "data.csv", [(key, f"{key.split('/')[0]}, view number {key[-5]}") for key in images])
    tiny.write_lmdb(tmp_path / "images.lmdb", images)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "job", "train", "--csv", str(csv), "--lmdb", str(tmp_path / "images.lmdb"), "--run", str(run)]
    command += ["--model", "ViT-B-32-quickgelu", "--pretrained", str(tmp_path / "weights.safetensors"), "--val-fraction", "0.3"]
    command += [
        "--max-steps",
        "3",
        "--global-batch-size",
        "6",
        "--checkpoint-every",
        "1",
        "--lr",
        "1e-4",
        "--scratch",
        str(tmp_path / "scratch"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLIPJOB_")}

    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        while not [commit for commit in run.glob("commits/*.json") if not commit.name.endswith("-s000000000000.json")]:
            assert first.poll() is None  # a slow disk may still hold the start when the steps are done, never the last commit
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    (tmp_path / "weights.safetensors").unlink()  # the run keeps its own base
    subprocess.run(command, env=environment, check=True, capture_output=True)

    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert (result["step"], result["attempts"]) == (3, 2)
    rows = [row for row in RunStore(str(run)).read_history() if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)

    commit = RunStore(str(run)).commits()[0]
    trained = load_base(run / "base", weights=run / "data" / commit.data / WEIGHTS)
    exported, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run / 'export' / 'final'}")
    exported.eval()
    trained.module.eval()
    keys = sorted(images)[:4]
    pixels = torch.from_numpy(np.stack([whole_view(decode(images[key]), trained.view) for key in keys])).permute(0, 3, 1, 2)
    theirs = torch.stack([preprocess(Image.open(io.BytesIO(images[key])).convert("RGB")) for key in keys])
    tokens = trained.tokenizer(["a temple", "a flower"])
    with torch.no_grad():
        ours = encode_images(trained.module, pixels, shift=trained.shift, scale=trained.scale)
        same = torch.nn.functional.normalize(exported.encode_image((pixels - trained.shift) * trained.scale), dim=-1)
        assert (ours - same).abs().max() < 1e-6
        assert (ours * exported.encode_image(theirs, normalize=True)).sum(dim=1).min() > 0.995  # its own preprocessing, in float
        difference = encode_texts(trained.module, [tokens]) - exported.encode_text(tokens, normalize=True)
        assert difference.abs().max() < 1e-5
    assert np.isfinite(ours.numpy()).all()
    base = load_base(run / "base")
    assert not torch.equal(base.module.visual.proj, trained.module.visual.proj)
