"""Scores of `clipjob evaluate` against counting by hand, CLIP_benchmark and scikit-learn, and the command on a real run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from system import finish, train_command
from torch import Tensor

from job.checkpoint.state import WEIGHTS
from job.checkpoint.store import RunStore
from job.cli import cli
from job.errors import ConfigError, DataError, ResumeError
from job.evaluate import calibration, retrieval
from job.evaluate.calibration import best_scale, calibration_at
from job.evaluate.classification import class_features, classification_scores, labels_of
from job.evaluate.pairs import Reading, captions_of, open_pairs
from job.evaluate.retrieval import retrieval_scores
from job.model.build import write_export

FIXTURE = Path(__file__).parent / "fixtures" / "run-format-1"


def features(seed: int, *, images: int = 40, texts: int = 60, coarse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features, and pairs: several texts per image and images per text. coarse: from few vectors, so many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    width = 4 if coarse else 6  # of four halves every product is exact, whatever the order of its sum
    image, text = (torch.randn(n, width, generator=generator) for n in (images, texts))
    if coarse:
        image, text = image.sign(), text.sign()
    image, text = (torch.nn.functional.normalize(part, dim=-1) for part in (image, text))
    pairs = {(number % images, number) for number in range(texts)} | {(number, (7 * number) % texts) for number in range(images)}
    return image, text, torch.tensor(sorted(pairs))


def matrix(pairs: Tensor, rows: int, columns: int) -> np.ndarray[Any, Any]:
    right = np.zeros((rows, columns), dtype=bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    return right


@pytest.fixture(params=[1 << 26, 100])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_are_what_counting_by_hand_gives(coarse: bool) -> None:
    image, text, pairs = features(1, coarse=coarse)
    scores = retrieval_scores(image, text, pairs, logit_scale=torch.tensor(9.0), median_ranks=True)
    similarity, right = (image @ text.T).numpy(), matrix(pairs, 40, 60)
    for name, score, is_right in (("text", similarity, right), ("image", similarity.T, right.T)):
        ranks = [1 + sum(row[~mine] >= row[mine].max()) for row, mine in zip(score, is_right, strict=True)]
        assert scores[f"{name}_retrieval_median_rank"] == np.median(ranks)
        for k in (1, 5, 10):
            assert scores[f"{name}_retrieval_recall@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))


@pytest.mark.usefixtures("chunk")
def test_retrieval_is_what_clip_benchmark_finds_of_the_same_features_and_pairs() -> None:
    image, text, pairs = features(6, images=80, texts=130)
    scores = retrieval_scores(image, text, pairs, logit_scale=torch.tensor(9.0))
    right = torch.from_numpy(matrix(pairs, 80, 130))
    for name, similarity, positive in (("text", image @ text.T, right), ("image", text @ image.T, right.T)):
        for k in (1, 5, 10):
            found = recall_at_k(similarity, positive.contiguous(), k) > 0  # as its own evaluate counts
            assert scores[f"{name}_retrieval_recall@{k}"] == pytest.approx(found.float().mean().item())
            assert 0 < found.sum() < len(found)


@pytest.mark.usefixtures("chunk")
def test_average_precision_is_what_clip_benchmark_finds() -> None:
    image, classes, _ = features(7, images=90, texts=12)
    target = torch.arange(90) % 12
    scores = classification_scores(image, classes, torch.tensor(list(enumerate(target.tolist()))))
    one_hot = torch.nn.functional.one_hot(target, 12)
    assert scores["mean_average_precision"] == pytest.approx(average_precision_per_class(image @ classes.T, one_hot).mean().item())
    image, classes, labels = features(8, images=70, texts=15)
    several = classification_scores(image, classes, labels)["mean_average_precision"]
    right = torch.from_numpy(matrix(labels, 70, 15))
    assert several == pytest.approx(average_precision_per_class(image @ classes.T, right).mean().item())


@pytest.mark.usefixtures("chunk")
def test_one_class_per_image_gives_what_scikit_learn_gives() -> None:
    image, classes, _ = features(2, images=90, texts=12)
    target = np.arange(90) % 11  # class 11 has no image
    labels = torch.tensor(list(enumerate(target)))
    scores = classification_scores(image, classes, labels)
    similarity = (image @ classes.T).numpy()
    order = np.argsort(-similarity, axis=1)
    assert scores["acc1"] == pytest.approx((order[:, 0] == target).mean())
    assert scores["acc5"] == pytest.approx((order[:, :5] == target[:, None]).any(axis=1).mean())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert scores["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(target, order[:, 0]))
    expected = np.mean([average_precision_score(target == c, similarity[:, c]) for c in range(11)])
    assert scores["mean_average_precision"] == pytest.approx(expected)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("coarse", [False, True])
def test_several_classes_per_image_give_what_scikit_learn_gives(coarse: bool) -> None:
    image, classes, labels = features(3, images=70, texts=15, coarse=coarse)
    scores = classification_scores(image, classes, labels)
    similarity, right = (image @ classes.T).numpy(), matrix(labels, 70, 15)
    expected = [average_precision_score(right[:, c], similarity[:, c]) for c in range(15)]
    assert scores["mean_average_precision"] == pytest.approx(np.mean(expected))
    put = np.array([[(row >= row[c]).sum() <= mine.sum() for c in range(15)] for row, mine in zip(similarity, right, strict=True)])
    assert scores["mean_per_class_recall"] == pytest.approx(((put & right).sum(axis=0) / right.sum(axis=0)).mean())


def test_a_model_that_gives_everything_the_same_feature_finds_no_class() -> None:
    same = torch.ones(40, 4) / 2
    scores = classification_scores(same, same[:8], torch.tensor([(n, n % 8) for n in range(40)]))
    assert scores["acc1"] == scores["acc5"] == scores["mean_per_class_recall"] == 0
    assert scores["mean_average_precision"] == pytest.approx(1 / 8)


def test_images_without_a_class_count_nowhere() -> None:
    image, classes, labels = features(4, images=30, texts=10)
    more = torch.cat([image, classes[:5]])
    assert classification_scores(image, classes, labels) == classification_scores(more, classes, labels)


@pytest.mark.usefixtures("chunk")
def test_calibration_error_is_what_counting_by_hand_gives() -> None:
    image, text, pairs = features(5)
    found = calibration_at(image, text, pairs, logit_scale=6.0)
    logits, right = 6.0 * (image @ text.T).double().numpy(), matrix(pairs, 40, 60)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, correct = probability.max(axis=1), right[np.arange(40), probability.argmax(axis=1)]
    ece = 0.0
    for number in range(15):
        mine = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert found.bins[number].count == mine.sum()
        if mine.any():
            assert found.bins[number].accuracy == pytest.approx(correct[mine].mean())
            assert found.bins[number].confidence == pytest.approx(confidence[mine].mean(), rel=1e-5)
            ece += mine.mean() * abs(confidence[mine].mean() - correct[mine].mean())
    assert found.ece == pytest.approx(ece, rel=1e-5)
    assert found.nll == pytest.approx(-np.log((probability * right).sum(axis=1)).mean(), rel=1e-5)


def test_the_best_scale_is_that_of_the_least_nll() -> None:
    image, _, _ = features(6, images=50)
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(image + 0.7 * torch.randn(50, 6, generator=generator), dim=-1)
    pairs = torch.tensor([(n, n) for n in range(50)])
    scale = best_scale(image, text, pairs)
    logits = image @ text.T
    fitted = torch.tensor(1.0, requires_grad=True)  # log, by another method
    optimizer = torch.optim.LBFGS([fitted], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(fitted.exp() * logits, torch.arange(50))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)
    assert calibration.SCALES[0] < scale < calibration.SCALES[1]
    assert scale == pytest.approx(float(fitted.exp().detach()), rel=2e-3)
    assert not calibration_at(image, text, pairs, logit_scale=scale).warning()


def test_of_many_images_some_find_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    near = torch.nn.functional.normalize(text + 0.7 * torch.randn(40, 8, generator=generator), dim=-1)
    pairs = torch.tensor([(n, n) for n in range(40)] + [(n, (n + 1) % 40) for n in range(40)])  # the second half not in order
    monkeypatch.setattr(calibration, "MOST_SEARCHED", 14)  # every third
    every_third = torch.tensor([(n, text) for n, third in enumerate(range(0, 40, 3)) for text in (third, (third + 1) % 40)])
    some = best_scale(near, text, pairs)
    monkeypatch.undo()
    assert some == best_scale(near[::3], text, every_third) != best_scale(near, text, pairs)


MILLION = """
import torch
from benchmarks.machine import peak_rss_bytes
from job.evaluate import calibration, retrieval
from job.runtime.ranks import Ranks
from job.runtime.world import World

class OneOfMany(World):
    # ranks its share of the queries; those of other ranks count as found
    def total(self, values):
        return values

def scores(count):
    image, text = (torch.randn(count, 32) for _ in range(2))
    for feature in (image, text):
        feature.div_(feature.norm(dim=1, keepdim=True))
    pairs = torch.arange(count).repeat(2, 1).T.contiguous()
    before = peak_rss_bytes()
    world = OneOfMany(Ranks(0, count // 16, 0, count // 16))
    assert len(world.part(count)) == 16
    found = retrieval.retrieval_scores(image, text, pairs, logit_scale=torch.tensor(10.0), median_ranks=True, world=world)
    calibration.calibration_at(image[:16], text, pairs[:16], logit_scale=10.0)
    calibration.best_scale(image[:16], text, pairs[:16])
    assert 1 - 16 / count <= found["mean_recall"] < 1
    return peak_rss_bytes() - before

torch.manual_seed(0)
calibration.TRIES, calibration.ROUNDS = 2, 1
retrieval.CHUNK_ELEMENTS = 1 << 23  # 8 queries of a million answers
scores(1024)
print(scores(1 << 20))
"""


def test_a_million_pairs_need_their_features_and_a_few_parts_of_similarities() -> None:
    found = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    part, pairs = 2**23 * 4, 2 * 2**20 * 8
    assert int(found.stdout) < 10 * (part + pairs)  # 0.5 GB beside features and pairs; all similarities would be 4.4 TB


def test_a_scale_at_an_end_of_the_search_is_warned_of() -> None:
    image, pairs = torch.eye(8), torch.tensor([(n, n) for n in range(8)])
    wrong = calibration_at(image, -image, pairs, logit_scale=best_scale(image, -image, pairs))
    assert "lies at an end of the range searched, 1 to 1000" in wrong.warning()
    assert "too few, or too hard" in wrong.warning()
    near = torch.nn.functional.normalize(torch.eye(8) + 10, dim=-1)  # told apart by little: the NLL falls up to any scale
    right = calibration_at(near, near, pairs, logit_scale=best_scale(near, near, pairs))
    assert "too few, or too easy" in right.warning()


def test_class_features_are_means_over_templates(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    csv, lmdb = tiny.write_data(tmp_path, 4)
    pairs = open_pairs(str(csv), str(lmdb), staging=_Local(), reading=Reading())
    templates = ["a photo of {}", "{}, drawn"]
    names = [f"thing {number}" for number in range(300)]
    found = class_features(clip, names, templates=templates, captions=captions_of(pairs, clip), autocast=None)
    pairs.images.close()
    with torch.no_grad():
        for number in (0, 129, 299):
            tokens = clip.tokenizer([template.replace("{}", names[number]) for template in templates])
            expected = torch.nn.functional.normalize(clip.module.encode_text(tokens), dim=-1).mean(dim=0)  # type: ignore[operator]
            assert torch.allclose(found[number], expected / expected.norm(), atol=1e-5)


class _Local:
    """Staging of files that are here already."""

    def file(self, uri: str, *, flag: str) -> Path:
        return Path(uri)

    def lmdb(self, uri: str, *, flag: str) -> list[Path]:
        return [Path(uri)]


def test_tags_become_classes_and_a_class_list_chooses_among_them() -> None:
    rows = [("a", ["dog", "animal"]), ("b", ["cat"]), ("a", ["dog"]), ("c", ["car"])]
    every = labels_of(rows, keys=["a", "b", "c"], names=None)
    assert every.names == ["dog", "animal", "cat", "car"]
    assert every.pairs.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    some = labels_of(rows, keys=["a", "b", "c"], names=["bird", "cat", "dog"])
    assert some.pairs.tolist() == [[0, 2], [1, 1]]
    with pytest.raises(DataError, match="--classes"):
        labels_of(rows, keys=["a", "b", "c"], names=["Dog"])


# The command on a run that an older release made, completed here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return complete_run(folder)


def complete_run(folder: Path) -> Path:
    """A copy of the fixture's run beside its data, with its step 10 exported as best."""
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    run = folder / "run"
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["config"] |= {"run": str(run), "csv": str(folder / "data.csv"), "lmdb": str(folder / "images.lmdb")}
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    store = RunStore(str(run))
    weights = store.fetch_file(10, WEIGHTS, folder)
    store.attempt = 1
    write_export(folder / "export", base=run / "base", weights=weights)
    store.put_folder("export/best", folder / "export")
    shutil.rmtree(folder / "export")
    return run


def evaluate(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments), "--json", "--device", "cpu"], catch_exceptions=False)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_run_scores_what_its_training_wrote(tmp_path: Path) -> None:
    run = tmp_path / "run"  # trained here: answers that are nearly equally good may change places on another processor
    csv, lmdb = tiny.write_data(tmp_path, 200)
    settings = {
        "csv": csv,
        "lmdb": lmdb,
        "model": tiny.write_config(tmp_path),
        "scratch": tmp_path / "scratch",
        "val_fraction": 0.2,
    }
    finish(train_command(run, **settings, global_batch_size=16, max_steps=10, precision="fp32", pretrained=None))
    expected = RunStore(str(run)).commits()[0].info["metrics"]
    by_export, by_step = evaluate(run, "--batch-size", 16)[0], evaluate(run, "--batch-size", 16, "--step", 10)[0]
    for found, label in ((by_export, "best"), (by_step, "step-10")):
        assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, abs=2e-6)
        assert found["pretrained"] == f"{run} ({label})"
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= by_export.keys()
    assert (by_export["task"], by_export["language"], by_export["dataset"]) == ("zeroshot_retrieval", "en", "data-held-out")


def test_run_export_folder_and_model_by_name_score_the_same(run: Path, tmp_path: Path) -> None:
    data = ("--csv", run.parent / "data.csv", "--lmdb", run.parent / "images.lmdb", "--task", "retrieval")
    (tmp_path / "model.json").write_text(
        json.dumps(json.loads((run / "base" / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]), encoding="utf-8"
    )
    weights = run / "export" / "best" / "open_clip_model.safetensors"
    data += ("--precision", "fp32")  # the run's own; a model by name takes what the device does best
    of_run, of_folder = evaluate(run, *data)[0], evaluate(run / "export" / "best", *data)[0]
    by_name = evaluate(tmp_path / "model.json", "--pretrained", weights, *data)[0]
    assert of_run["metrics"] == of_folder["metrics"] == by_name["metrics"]
    assert of_run["counts"] == {"images": 36, "texts": 36, "pairs": 36}


def test_classes_of_a_file_and_saved_records(run: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a red square\n\na blue square\nnumber 3\n", encoding="utf-8")
    data = ("--csv", run.parent / "data.csv", "--lmdb", run.parent / "images.lmdb", "--classes", tmp_path / "classes.txt")
    arguments = (run, *data, "--tag-separator", ",", "--template", "{}", "--template", "this is {}", "--dataset", "my squares")
    before = sorted(path for path in run.rglob("*"))
    found = evaluate(*arguments)
    assert sorted(path for path in run.rglob("*")) == before
    assert [record["task"] for record in found] == ["zeroshot_retrieval", "zeroshot_classification"]
    assert found[1]["counts"] == {"images": 13, "classes": 3, "labels": 13, "images_without_a_class": 23}
    assert set(found[1]["metrics"]) == {"acc1", "mean_per_class_recall", "mean_average_precision"}
    assert evaluate(*arguments, "--save") == found
    assert json.loads((run / "eval" / "my-squares-best.json").read_text(encoding="utf-8")) == found


def test_the_table_names_every_metric(run: Path) -> None:
    shown = CliRunner().invoke(cli, ["evaluate", str(run), "--device", "cpu"], catch_exceptions=False).stdout
    assert "retrieval on data-held-out: 9 images" in shown
    assert "median rank" in shown
    assert "calibrated" in shown
    assert "recall@1 " in shown


def test_what_can_not_be_evaluated_says_why(run: Path, tmp_path: Path) -> None:
    csv, lmdb = tiny.write_data(tmp_path, 4)
    data = ("--csv", csv, "--lmdb", lmdb)
    for arguments, error, words in (
        ((run, "--step", 11), ResumeError, "no checkpoint of step 11.*these steps: 10"),
        ((run, "--which", "final"), ResumeError, "no exported model 'final'"),
        ((tmp_path / "nowhere",), ConfigError, "no run and no exported model"),
        ((tmp_path,), ConfigError, "neither a run"),
        (("ViT-B-32", *data), ConfigError, "--pretrained"),
        ((run / "export" / "best",), ConfigError, "--csv and --lmdb"),
        ((run, "--csv", csv), ConfigError, "belong together"),
        ((run / "export" / "best", *data, "--save"), ConfigError, "--save writes into a run"),
        ((run, *data, "--template", "photo"), ConfigError, "--template"),
        ((run, *data, "--classes", tmp_path / "none.txt"), DataError, "--classes"),
        ((run, "--csv", tmp_path / "none.csv", "--lmdb", lmdb), DataError, "none.csv"),
    ):
        with pytest.raises(error, match=words):
            evaluate(*arguments)


def test_broken_images_are_left_out_up_to_a_limit(run: Path, tmp_path: Path) -> None:
    keys = [f"{number}.jpg" for number in range(10)]
    csv = tiny.write_csv(tmp_path / "data.csv", [(key, f"thing {key}") for key in keys])
    lmdb = tiny.write_lmdb(tmp_path / "images.lmdb", {key: tiny.picture(n) for n, key in enumerate(keys)} | {"3.jpg": b"broken"})
    with pytest.raises(DataError, match="1 of 10 images"):
        evaluate(run, "--csv", csv, "--lmdb", lmdb)
