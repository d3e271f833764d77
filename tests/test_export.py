"""What `clipjob export` writes loads in open_clip as what was meant, and alpha keeps its promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from test_evaluate import complete_run, evaluate

from job.checkpoint.store import RunStore
from job.cli import cli
from job.errors import ConfigError, ResumeError
from job.evaluate.alpha import ALPHAS, GUARD_LIMIT, Scored, largest_within_guard, mix
from job.evaluate.calibration import calibration_at
from job.evaluate.card import MODEL_FILE
from job.evaluate.encode import encode_held_out
from job.evaluate.pairs import captions_of, held_out_of, open_pairs, reading_of
from job.evaluate.retrieval import recall_at_5
from job.model.build import CONFIG_FILE, WEIGHTS_FILE, ClipModel, load_base

LOAD = """
import sys, torch, open_clip
from PIL import Image
name, options = sys.argv[1], eval(sys.argv[3])
model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
model.eval()
tokenizer = open_clip.get_tokenizer(name)
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(sys.argv[2]).convert("RGB"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a red square, number 0"]), normalize=True)
gelu = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
print([image[0].tolist(), text[0].tolist(), float(model.logit_scale), gelu])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_run(tmp_path_factory.mktemp("export"))


def export(run: Path, to: Path, *arguments: object) -> dict[str, Any]:
    """Returns: alpha.json."""
    words = ["export", str(run), "--to", str(to), "--device", "cpu", *map(str, arguments)]
    CliRunner().invoke(cli, words, catch_exceptions=False)
    facts: dict[str, Any] = json.loads((to / "alpha.json").read_text(encoding="utf-8"))
    return facts


def loaded_elsewhere(name: str, picture: Path, **options: Any) -> Any:
    """[image feature, text feature, logit_scale, activation] in a process that knows nothing of clipjob."""
    command = [sys.executable, "-c", LOAD, name, str(picture), repr(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=picture.parent)
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@torch.no_grad()
def loaded_here(clip: ClipModel, base: Path, picture: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the picture and of the text that LOAD encodes. Args: base: the folder with the model's preprocessing."""
    module: Any = clip.module.eval()
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{base}")[2]
    with Image.open(picture) as image:
        image_feature = module.encode_image(preprocess(image)[None], normalize=True)[0]
    return image_feature, module.encode_text(clip.tokenizer(["a red square, number 0"]), normalize=True)[0]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_open_clip_alone_computes_the_same_features(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "--alpha", 0.5)
    (tmp_path / "red.jpg").write_bytes(tiny.picture(1, width=16, height=16))
    image, text, logit_scale, _ = loaded_elsewhere(f"local-dir:{tmp_path / 'out'}", tmp_path / "red.jpg")
    clip = load_base(run / "base")
    clip.module.load_state_dict(mix(run / "base" / WEIGHTS_FILE, run / "export" / "best" / WEIGHTS_FILE, 0.5))
    expected = loaded_here(clip, run / "base", tmp_path / "red.jpg")
    assert torch.allclose(torch.tensor(image), expected[0], atol=1e-6)
    assert torch.allclose(torch.tensor(text), expected[1], atol=1e-6)
    module: Any = clip.module
    assert logit_scale == pytest.approx(module.logit_scale.item(), abs=1e-6)


def test_quickgelu_survives_in_every_format(run: Path, tmp_path: Path) -> None:
    """The run's base as if its tag had said quick_gelu."""
    quick = complete_run(tmp_path / "quick")
    for folder in (quick / "base", quick / "export" / "best"):
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config["model_cfg"]["quick_gelu"] = True
        (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        tensors = load_file(folder / WEIGHTS_FILE)
        large = {name: tensor * 20 for name, tensor in tensors.items() if ".mlp.c_proj." in name}  # so the activation matters
        save_file(tensors | large, folder / WEIGHTS_FILE)
        listed = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # whose hashes are others now
            del listed["files"][name]
        (folder / "files.json").write_text(json.dumps(listed), encoding="utf-8")
    (tmp_path / "red.jpg").write_bytes(tiny.picture(1, width=16, height=16))
    export(quick, tmp_path / "folder", "--format", "hf")
    image, _, _, activation = loaded_elsewhere(f"local-dir:{tmp_path / 'folder'}", tmp_path / "red.jpg")
    assert activation == "QuickGELU"
    clips = [load_base(whose / "base", weights=quick / "export" / "best" / WEIGHTS_FILE) for whose in (quick, run)]
    expected, with_gelu = (loaded_here(clip, run / "base", tmp_path / "red.jpg")[0] for clip in clips)
    assert torch.allclose(torch.tensor(image), expected, atol=1e-6)
    assert not torch.allclose(torch.tensor(image), with_gelu, atol=1e-3)
    export(quick, tmp_path / "file", "--format", "safetensors")
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["README.md", "alpha.json", MODEL_FILE, WEIGHTS_FILE]
    assert json.loads((tmp_path / "file" / MODEL_FILE).read_text(encoding="utf-8"))["quick_gelu"] is True
    card = (tmp_path / "file" / "README.md").read_text(encoding="utf-8")
    code = card[card.rindex("```python") + len("```python") : card.rindex("```")] + "\nprint(type(model).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "file")
    assert (done.returncode, done.stdout.strip().rsplit("\n", 1)[-1]) == (0, "CLIP"), done.stderr
    assert equal(weights_of(tmp_path / "file"), weights_of(tmp_path / "folder"))


def test_the_ends_are_the_base_and_the_tuned_model_bit_for_bit(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "0", "--alpha", 0)
    export(run, tmp_path / "1", "--alpha", 1)
    export(run, tmp_path / "default")
    assert equal(weights_of(tmp_path / "0"), weights_of(run / "base"))
    assert equal(weights_of(tmp_path / "1"), weights_of(run / "export" / "best"))
    assert equal(weights_of(tmp_path / "default"), weights_of(run / "export" / "best"))
    assert not equal(weights_of(tmp_path / "0"), weights_of(tmp_path / "1"))


def test_a_mix_is_the_weighted_mean_and_keeps_what_did_not_move(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"moved": torch.randn(50, generator=generator), "locked": torch.randn(50, generator=generator)}
    base |= {"count": torch.tensor(3), "half": torch.randn(50, generator=generator).half(), "logit_scale": torch.tensor(2.0)}
    tuned = base | {
        "moved": base["moved"] + 1,
        "count": torch.tensor(7),
        "half": base["half"] + 1,
        "logit_scale": torch.tensor(4.0),
    }
    save_file(base, tmp_path / "base")
    save_file(tuned, tmp_path / "tuned")
    for alpha in ALPHAS:
        found = mix(tmp_path / "base", tmp_path / "tuned", alpha)
        assert torch.allclose(found["moved"], (1 - alpha) * base["moved"] + alpha * tuned["moved"], atol=1e-6)
        assert torch.equal(found["locked"], base["locked"])
        assert found["logit_scale"] == pytest.approx(2 + 2 * alpha)
        assert found["half"].dtype == torch.float16
    assert mix(tmp_path / "base", tmp_path / "tuned", 0.5)["count"] == 7
    save_file({"other": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ResumeError, match="same model"):
        mix(tmp_path / "base", tmp_path / "other", 0.5)


def scored(guard: dict[float, float]) -> list[Scored]:
    return [
        Scored(alpha, {}, {"image_retrieval_recall@5": value + 0.1, "text_retrieval_recall@5": value - 0.1})
        for alpha, value in guard.items()
    ]


def test_auto_takes_the_largest_alpha_within_the_limit() -> None:
    assert largest_within_guard(scored({0.0: 0.60, 0.5: 0.55, 0.8: 0.59, 1.0: 0.589})) == 0.8  # not the first that fails
    assert largest_within_guard(scored({0.0: 0.60, 0.5: 0.61, 1.0: 0.70})) == 1.0
    assert largest_within_guard(scored({0.0: 0.60, 0.5: 0.40, 1.0: 0.30})) == 0.0


def test_auto_respects_the_guard_on_a_run(run: Path, tmp_path: Path) -> None:
    """The guard's captions say what the base model says of its images, so training must have cost some of them."""
    data = (run.parent / "data.csv", run.parent / "images.lmdb")
    base = load_base(run / "base")
    config = RunStore(str(run)).load_config() or {}
    pairs = open_pairs(*map(str, data), staging=_Here(), reading=reading_of(config["config"]))  # type: ignore[arg-type]
    captions = captions_of(pairs, base)
    held_out = held_out_of(pairs, captions)
    found = encode_held_out(base, held_out, images=pairs.images, captions=captions, batch_size=36, threads=1, autocast=None)
    assert found is not None
    pairs.images.close()
    best = linear_sum_assignment((found.images @ found.texts.T).numpy(), maximize=True)  # one text each, as the base likes it most
    chosen = [(held_out.keys[image], held_out.texts[text]) for image, text in zip(*best, strict=True)]
    guard = tiny.write_csv(tmp_path / "guard.csv", chosen)
    facts = export(run, tmp_path / "out", "--alpha", "auto", "--guard-csv", guard, "--guard-lmdb", data[1])
    rows = {row["alpha"]: row for row in facts["scores"]}
    assert tuple(rows) == ALPHAS
    recalls = {alpha: recall_at_5(row["guard"]) for alpha, row in rows.items()}
    assert facts["alpha"] < 1
    assert recalls[facts["alpha"]] >= recalls[0.0] - GUARD_LIMIT
    assert all(recall < recalls[0.0] - GUARD_LIMIT for alpha, recall in recalls.items() if alpha > facts["alpha"])
    tuned = evaluate(run)[0]["metrics"]
    assert rows[1.0]["validation"] == pytest.approx({name: tuned[name] for name in rows[1.0]["validation"]}, abs=2e-6)
    expected = mix(run / "base" / WEIGHTS_FILE, run / "export" / "best" / WEIGHTS_FILE, facts["alpha"])
    assert equal(weights_of(tmp_path / "out"), expected)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| **{facts['alpha']:g}** |" in card


class _Here:
    """Staging of files that are here already."""

    def file(self, uri: str, *, flag: str) -> Path:
        return Path(uri)

    def lmdb(self, uri: str, *, flag: str) -> list[Path]:
        return [Path(uri)]


def test_auto_without_a_guard_is_the_tuned_model_and_says_so(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), "--to", str(tmp_path / "out"), "--alpha", "auto"]
    told = CliRunner().invoke(cli, words, catch_exceptions=False).stdout
    assert "alpha = 1. There were no guard data" in told
    assert "There were no guard data" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert equal(weights_of(tmp_path / "out"), weights_of(run / "export" / "best"))


def test_calibration_changes_logit_scale_alone_and_lowers_nll(run: Path, tmp_path: Path) -> None:
    facts = export(run, tmp_path / "out", "--step", 10, "--calibrate")
    before, after = facts["calibration"]
    assert after["nll"] < before["nll"]
    found, tuned = weights_of(tmp_path / "out"), weights_of(run / "export" / "best")
    scale = found.pop("logit_scale")
    assert float(scale.exp()) == pytest.approx(after["logit_scale"], rel=1e-5)
    assert scale.shape == tuned.pop("logit_scale").shape
    assert equal(found, tuned)
    assert "## Calibration" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert calibration_at(torch.eye(2), torch.eye(2), torch.tensor([[0, 0], [1, 1]]), logit_scale=1e3).ece == pytest.approx(0)


def test_the_card_says_where_the_model_comes_from_and_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: open_clip\n")
    config = RunStore(str(run)).load_config() or {}
    for words in ("model.json", config["data"]["csv_sha256"], "36 in images.lmdb", "`--lr 0.01`", "create_model_and_transforms"):
        assert words in card
    assert "Licence" in card
    for place in (str(run.parent), str(tmp_path), "/data/"):
        assert place not in card
    assert not (tmp_path / "out" / "files.json").exists()


def test_an_export_in_an_object_store_scores_as_the_local_one(run: Path, tmp_path: Path, s3_uri: str) -> None:
    words = ["export", str(run), "--to", f"{s3_uri}/model", "--alpha", "0.3"]
    CliRunner().invoke(cli, words, catch_exceptions=False)
    export(run, tmp_path / "out", "--alpha", 0.3)
    data = ("--csv", run.parent / "data.csv", "--lmdb", run.parent / "images.lmdb")
    here, there = (evaluate(place, *data, "--task", "retrieval")[0] for place in (tmp_path / "out", f"{s3_uri}/model"))
    assert here["metrics"] == there["metrics"]
    with pytest.raises(ConfigError, match="not an empty folder"):
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_what_can_not_be_exported_says_why(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    new = tmp_path / "new"
    for arguments, error, words in (
        ((run, "--to", tmp_path / "full"), ConfigError, "not an empty folder"),
        ((run, "--to", new, "--alpha", "1.5"), ConfigError, "--alpha"),
        ((run, "--to", new, "--alpha", "nan"), ConfigError, "--alpha"),
        ((run, "--to", new, "--step", 3), ResumeError, "no checkpoint of step 3"),
        ((run, "--to", new, "--guard-csv", "a.csv"), ConfigError, "--guard-lmdb"),
        ((run / "export" / "best", "--to", new), ConfigError, "no run"),
    ):
        with pytest.raises(error, match=words):
            CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=False)
        assert not new.exists()
