"""What two models say of the same images: bounded, the same whatever the order of the data, and over when a signal comes."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from report_runs import a_gallery, write_run

from job.checkpoint.store import RunStore
from job.data.captions import Captions
from job.data.images import open_images
from job.errors import DataError, Superseded
from job.evaluate import gallery
from job.evaluate.encode import group_pairs
from job.evaluate.export import export_run
from job.evaluate.gallery import choose, judge, make_gallery, reliability_of, thumbnail
from job.model.build import load_base
from job.model.weights import save_weights


def look(folder: Path, images: dict[str, bytes], *, stopping: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """A tiny model against itself with other weights."""
    clip = tiny.make_clip(folder)
    before = folder / "base" / "open_clip_model.safetensors"
    after = folder / "after.safetensors"
    other = load_base(folder / "base").module
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    save_weights(other.state_dict(), after)
    held_out = group_pairs((key, [f"text of {key}", "shared"]) for key in images)
    texts = Captions(held_out.texts, clip.tokenizer, lengths_of=None, mode="whole", tag_separator="", template="{}", seed=0)
    store = open_images(tiny.write_lmdb(folder / "images.lmdb", images))
    found = make_gallery(
        clip,
        held_out,
        before=before,
        after=after,
        images=store,
        captions=texts,
        batch_size=4,
        threads=2,
        autocast=None,
        stopping=stopping,
    )
    store.close()
    return found


def test_the_gallery_shows_images_with_what_both_models_prefer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CHUNK", 7)  # so that several chunks meet
    images = {f"{number}.jpg": tiny.picture(number) for number in range(40)} | {"broken.jpg": b"broken"}
    found = look(tmp_path, images)
    assert found is not None
    assert (found["images"], found["candidates"], found["of_images"]) == (40, 42, 41)
    assert len(found["gallery"]) == 24
    for entry in found["gallery"]:
        assert entry["thumbnail"].startswith("data:image/jpeg;base64,")
        right = {found["texts"][str(text)] for text in entry["right"]}
        assert right == {f"text of {entry['key']}", "shared"}
        for name in ("before", "after"):
            top = entry[name]["top"]
            assert [item["probability"] for item in top] == sorted((item["probability"] for item in top), reverse=True)
            assert all(item["right"] == (item["text"] in entry["right"]) for item in top)
            assert (entry[name]["rank"] == 0) == top[0]["right"]
    assert found["gallery"][0]["before"] != found["gallery"][0]["after"]
    ranks = [entry["after"]["rank"] for entry in found["mistakes"]]
    assert ranks == sorted(ranks, reverse=True)
    assert all(sum(item["count"] for item in curve["bins"]) == 40 for curve in found["reliability"].values())


def test_a_signal_ends_the_gallery(tmp_path: Path) -> None:
    asked = iter([False] * 5)
    images = {f"{number}.jpg": tiny.picture(number) for number in range(40)}
    assert look(tmp_path, images, stopping=lambda: next(asked, True)) is None


def test_nothing_decodable_makes_an_empty_gallery(tmp_path: Path) -> None:
    found = look(tmp_path, {"a": b"broken"})
    assert found is not None
    assert (found["gallery"], found["of_images"]) == ([], 1)


def test_time_is_bounded_and_both_models_see_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CHUNK", 5)
    monkeypatch.setattr(gallery, "BUDGET_SECONDS", 0.0)
    found = look(tmp_path, {f"{number}.jpg": tiny.picture(number) for number in range(40)})
    assert found is not None
    assert (found["images"], found["of_images"]) == (5, 40)
    assert {sum(item["count"] for item in curve["bins"]) for curve in found["reliability"].values()} == {5}


def test_the_sample_is_bounded_and_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "IMAGES", 50)
    monkeypatch.setattr(gallery, "TEXTS", 60)
    rows = [(f"{number}.jpg", [f"a {number}", f"b {number % 20}"]) for number in range(500)]
    one, other = choose(group_pairs(rows)), choose(group_pairs(reversed(rows)))
    assert one.keys == other.keys
    assert 0 < len(one.keys) <= 50
    assert len(one.texts) <= 60
    for image, text in one.pairs.tolist():
        assert one.texts[text].split()[0] in "ab"
        assert one.texts[text] in dict(rows)[one.keys[image]]
    many = choose(group_pairs([("only.jpg", [str(number) for number in range(500)])]))
    assert (len(many.keys), len(many.texts)) == (1, 60)


def test_reliability_is_what_counting_by_hand_gives() -> None:
    right = torch.eye(4, 6, dtype=torch.bool)
    probability = torch.full((4, 6), 0.02)
    probability[0, 0], probability[1, 1], probability[2, 5], probability[3, 3] = 0.9, 0.9, 0.9, 0.31
    found = reliability_of(gallery.Judged(probability, torch.zeros(4)), right)
    filled = {at: item for at, item in enumerate(found["bins"]) if item["count"]}
    assert {at: item["count"] for at, item in filled.items()} == {4: 1, 13: 3}
    assert filled[13]["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["ece"] == pytest.approx((3 * abs(0.9 - 2 / 3) + abs(0.31 - 1)) / 4, abs=1e-4)
    assert found["accuracy"] == 0.75


def test_the_rank_counts_wrong_texts_at_or_above_the_best_right_one() -> None:
    image = torch.eye(3)
    text = torch.eye(3)[[1, 0, 0, 2]]
    right = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    judged = judge(image, text, right, logit_scale=10.0)
    assert judged.rank.tolist() == [1, 0, 3]
    assert judged.probability.sum(dim=1).tolist() == pytest.approx([1, 1, 1])
    broken = judge(image * torch.nan, text, right, logit_scale=10.0)
    assert broken.probability.isfinite().all()
    assert broken.rank.tolist() == [3, 3, 3]


def test_a_thumbnail_is_small_whatever_the_image() -> None:
    noise = tiny.Image.fromarray(tiny.np.random.default_rng(0).integers(0, 255, (900, 1600, 3), dtype=tiny.np.uint8))
    stream = tiny.io.BytesIO()
    noise.save(stream, "PNG")
    assert 1000 < len(thumbnail(stream.getvalue())) < 45_000
    assert thumbnail(b"") == thumbnail(b"no image") == ""


# At the end of a run


def end(run: Path, look: Any) -> bool:
    """Ends a run whose exports are there. Returns: what export_run does."""
    for name in ("final", "best"):
        (run / "export" / name).mkdir(parents=True)
        (run / "export" / name / "files.json").write_text('{"format": 1, "files": {}}', encoding="utf-8")
    store = RunStore(str(run))
    store.claim({})
    state: Any = SimpleNamespace(
        step=40, best_step=40, before={}, after={}, best={}, range_test={}, seconds=1.0, nonfinite_steps=0, bad_samples=0
    )
    store.fetch_file = lambda *_: run / "weights"  # type: ignore[method-assign]
    return export_run(store, state, base=run, scratch=run, global_batch_size=8, look=look, stopping=lambda: False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", complete=False)


def test_a_complete_run_has_its_page_and_its_result(run: Path) -> None:
    assert end(run, lambda _before, _after: a_gallery())
    assert "images/0003.jpg" in (run / "report.html").read_text(encoding="utf-8")
    assert '<span class="pill done">complete</span>' in (run / "report.html").read_text(encoding="utf-8")
    assert (run / "eval" / "gallery.json").is_file()
    assert (run / "result.json").is_file()


def test_what_an_earlier_attempt_looked_at_is_not_looked_at_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", complete=False, gallery=a_gallery())
    assert end(run, lambda _before, _after: pytest.fail("looked again"))
    assert "images/0003.jpg" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), DataError("the weights are damaged")])
def test_pictures_that_can_not_be_made_fail_no_run(run: Path, failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_before: Path, _after: Path) -> None:
        raise failure

    with caplog.at_level(logging.WARNING):
        assert end(run, fail)
    assert (run / "result.json").is_file()
    told = [record for record in caplog.records if record.message == "no pictures of held-out images could be made"]
    assert str(failure) in told[0].__dict__["reason"]
    assert "no pictures of held-out images" in (run / "report.html").read_text(encoding="utf-8")


def test_a_page_that_can_not_be_made_fails_no_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("job.evaluate.export.render", lambda _facts: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert end(run, lambda _before, _after: a_gallery())
    assert (run / "result.json").is_file()
    assert [record.message for record in caplog.records] == ["no report could be made"]


def test_a_signal_during_the_report_leaves_the_run_to_the_next_attempt(run: Path) -> None:
    assert not end(run, lambda _before, _after: None)
    assert not (run / "result.json").exists()
    assert not (run / "eval").exists()


def test_an_attempt_that_was_replaced_meanwhile_writes_no_report(run: Path) -> None:
    def slow(_before: Path, _after: Path) -> dict[str, Any]:
        RunStore(str(run)).claim({})
        return a_gallery()

    with pytest.raises(Superseded):
        end(run, slow)
    assert not (run / "report.html").exists()
    assert not (run / "eval").exists()
