"""Recall both ways, with several captions per image, several images per caption, and equal scores."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from job.data.captions import Captions
from job.data.images import open_images
from job.evaluate import retrieval
from job.evaluate.encode import HeldOut, group_pairs
from job.evaluate.retrieval import evaluate_retrieval, retrieval_scores

SCALE = torch.tensor(10.0)


def by_hand(image: torch.Tensor, text: torch.Tensor, pairs: list[tuple[int, int]], k: int) -> tuple[float, float]:
    """(image->text, text->image) recall@k, counted in plain Python."""
    similarity = (image @ text.T).tolist()

    def recall(queries: int, answers: int, score: object, right: object) -> float:
        hits = 0
        for query in range(queries):
            best = max(score(query, answer) for answer in range(answers) if right(query, answer))
            hits += sum(score(query, answer) >= best and not right(query, answer) for answer in range(answers)) < k
        return hits / queries

    images, texts = len(image), len(text)
    return (
        recall(images, texts, lambda q, a: similarity[q][a], lambda q, a: (q, a) in pairs),
        recall(texts, images, lambda q, a: similarity[a][q], lambda q, a: (a, q) in pairs),
    )


def example(seed: int, images: int = 20, texts: int = 30) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (images, texts))
    pairs = {(number % images, number) for number in range(texts)} | {(number, (7 * number) % texts) for number in range(images)}
    return image, text, sorted(pairs)


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_recall_is_what_counting_by_hand_gives(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK_ELEMENTS", chunk)
    image, text, pairs = example(seed=chunk)
    scores = retrieval_scores(image, text, torch.tensor(pairs), logit_scale=SCALE)
    for k in (1, 5, 10):
        image_to_text, text_to_image = by_hand(image, text, pairs, k)
        assert scores[f"text_retrieval_recall@{k}"] == pytest.approx(image_to_text)
        assert scores[f"image_retrieval_recall@{k}"] == pytest.approx(text_to_image)
    recalls = [value for name, value in scores.items() if "recall@" in name]
    assert scores["mean_recall"] == pytest.approx(sum(recalls) / 6)
    probability = (SCALE * image @ text.T).softmax(dim=1)
    expected = sum(probability[a, b].item() for a, b in pairs) / len(image)
    assert scores["right_caption_probability"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_gives_everything_the_same_feature_scores_nothing() -> None:
    same = torch.ones(30, 4) / 2
    scores = retrieval_scores(same, same, torch.tensor([(n, n) for n in range(30)]), logit_scale=SCALE)
    assert scores["image_retrieval_recall@10"] == scores["text_retrieval_recall@10"] == 0


def test_features_that_are_no_numbers_are_no_hits() -> None:
    broken = torch.full((30, 4), float("nan"))
    scores = retrieval_scores(broken, broken, torch.tensor([(n, n) for n in range(30)]), logit_scale=SCALE)
    assert set(scores.values()) == {0.0}


def test_any_caption_of_an_image_and_any_image_of_a_caption_counts() -> None:
    held_out = group_pairs([("a", ["dog"]), ("b", ["dog"]), ("a", ["animal"]), ("c", ["cat"])])
    assert (held_out.keys, held_out.texts) == (["a", "b", "c"], ["dog", "animal", "cat"])
    assert held_out.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [2, 2]]
    axis = torch.eye(3)
    image, text = axis[[0, 0, 1]], axis[[0, 2, 1]]
    scores = retrieval_scores(image, text, held_out.pairs, logit_scale=SCALE)
    assert scores["text_retrieval_recall@1"] == 1


def evaluate(tmp_path: Path, images: dict[str, bytes], held_out: HeldOut, **changes: object) -> dict[str, float] | None:
    clip = tiny.make_clip(tmp_path)
    captions = Captions(held_out.texts, clip.tokenizer, lengths_of=None, mode="whole", tag_separator="", template="{}", seed=0)
    given = {"batch_size": 4, "threads": 2, "autocast": None, "stopping": lambda: False}
    store = open_images(tiny.write_lmdb(tmp_path / "images.lmdb", images))
    found = evaluate_retrieval(clip, held_out, images=store, captions=captions, **{**given, **changes})
    store.close()
    return found


def test_an_undecodable_image_is_left_out_with_its_own_texts(tmp_path: Path) -> None:
    keys = [f"{number}.jpg" for number in range(10)]
    images = {key: tiny.picture(number) for number, key in enumerate(keys)} | {"3.jpg": b"broken"}
    whole = group_pairs((key, [f"text {key}"]) for key in keys)
    without = group_pairs((key, [f"text {key}"]) for key in keys if key != "3.jpg")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert evaluate(tmp_path / "a", images, whole) == evaluate(tmp_path / "b", images, without)


def test_batch_size_does_not_change_the_ranking(tmp_path: Path) -> None:
    keys = [f"{number}.jpg" for number in range(10)]
    images = {key: tiny.picture(number) for number, key in enumerate(keys)}
    held_out = group_pairs((key, [f"text {key}", "shared"]) for key in keys)
    found = []
    for size in (3, 10):
        (tmp_path / str(size)).mkdir()
        found.append(evaluate(tmp_path / str(size), images, held_out, batch_size=size))
    assert found[0] is not None
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], abs=1e-5)


def test_a_signal_ends_an_evaluation_at_once(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    keys = [f"{number}.jpg" for number in range(40)]
    images = {key: tiny.picture(number) for number, key in enumerate(keys)}
    assert evaluate(tmp_path, images, group_pairs((key, [key]) for key in keys), stopping=lambda: next(asked)) is None


def test_nothing_decodable_gives_no_metrics(tmp_path: Path) -> None:
    assert evaluate(tmp_path, {"a": b"broken"}, group_pairs([("a", ["text"])])) == {}


def test_evaluation_leaves_the_model_in_training_mode(tmp_path: Path) -> None:
    clip = tiny.make_clip(tmp_path)
    clip.module.train()
    images = {f"{n}": tiny.picture(n) for n in range(4)}
    store = open_images(tiny.write_lmdb(tmp_path / "images.lmdb", images))
    captions = Captions(list(images), clip.tokenizer, lengths_of=None, mode="whole", tag_separator="", template="{}", seed=0)
    held_out = group_pairs((key, [key]) for key in images)
    evaluate_retrieval(
        clip, held_out, images=store, captions=captions, batch_size=2, threads=1, autocast=None, stopping=lambda: False
    )
    store.close()
    assert clip.module.training
    assert np.isfinite(held_out.pairs.numpy()).all()
