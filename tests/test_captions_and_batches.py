"""From rows to batches: captions, tokens, pixels, and images that can't be decoded."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch

from job.data.batches import Batch, DecodeTally, Samples, load_batches
from job.data.captions import Captions, find_tag_separator, full_lengths, split_tags
from job.data.images import open_images
from job.data.pixels import View

TOKENIZER = open_clip.get_tokenizer("ViT-B-32")
TEXTS = ["a red apple, fruit, sweet", "a blue car", "", "a red apple, fruit, sweet", "x " * 200]


def lengths_to_end_of_text(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.argmax(dim=-1) + 1


def captions(texts: list[str] = TEXTS, **changes: object) -> Captions:
    given = {"lengths_of": lengths_to_end_of_text, "mode": "whole", "tag_separator": ", ", "template": "{}", "seed": 0}
    return Captions(texts, TOKENIZER, **{**given, **changes})


def rebuilt(found: object, count: int) -> torch.Tensor:
    """The tokens of each caption asked for, padded again to the context length."""
    rows = [torch.nn.functional.pad(row, (0, 77 - len(row))) for group in found.groups for row in group]
    return torch.stack([rows[at] for at in found.text_of[:count]])


def test_tokens_are_open_clips_each_distinct_text_once() -> None:
    found = captions().tokens(TEXTS)
    assert torch.equal(rebuilt(found, 5), TOKENIZER(TEXTS))
    assert sum(len(group) for group in found.groups) == 4
    assert found.text_of[0] == found.text_of[3]


def test_at_most_seven_positions_of_a_caption_are_padding() -> None:
    for group in captions().tokens(TEXTS).groups:
        assert group.shape[1] - (group.argmax(dim=-1) + 1).min() <= 7


def test_a_tower_that_looks_at_all_positions_gets_them() -> None:
    (group,) = captions(lengths_of=None).tokens(TEXTS).groups
    assert group.shape == (4, 77)


def test_each_text_is_tokenised_once() -> None:
    asked: list[str] = []

    def counting(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return TOKENIZER(texts)

    source = Captions(TEXTS, counting, lengths_of=None, mode="whole", tag_separator="", template="{}", seed=0)
    source.tokens(TEXTS)
    source.tokens(TEXTS[::-1])
    assert sorted(asked) == sorted(set(TEXTS))


def test_sampled_tags_depend_on_the_position_alone() -> None:
    source = captions(mode="sample", template="a photo of {}")
    visits = source.at(np.zeros(60, dtype=np.int64), np.arange(60))
    assert set(visits) == {"a photo of a red apple", "a photo of fruit", "a photo of sweet"}
    assert source.at([0], np.array([41])) == [visits[41]]
    assert captions(mode="sample", template="a photo of {}", seed=1).at(np.zeros(60, dtype=np.int64), np.arange(60)) != visits


@pytest.mark.parametrize(("rows", "count", "found"), [(127, 64, 64), (64, 64, 64), (10, 64, 10), (1000, 3, 3)])
def test_a_sample_of_captions_is_as_large_as_asked_and_evenly_spread(rows: int, count: int, found: int) -> None:
    texts = [f"text {number}" for number in range(rows)]
    source = Captions(texts, TOKENIZER, lengths_of=None, mode="whole", tag_separator=", ", template="{}", seed=0)
    chosen = [int(text.split()[1]) for text in source.sample(count)]
    assert len(chosen) == len(set(chosen)) == found
    gaps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
    assert max(gaps) - min(gaps) <= 1
    assert chosen[0] == 0
    assert rows - chosen[-1] <= max(gaps) + 1


def test_tags_are_those_of_the_caption_without_its_template() -> None:
    source = Captions(
        ["red, round", "round,  red, red", ""],
        TOKENIZER,
        lengths_of=None,
        mode="whole",
        tag_separator=",",
        template="a {}.",
        seed=0,
        with_tags=True,
    )
    tags = source.tokens(source.at([0, 1, 2], np.arange(3))).tags
    assert (tags[0] == tags[1]).all()
    assert [int((row != 0).sum()) for row in tags] == [2, 2, 0]


@pytest.mark.parametrize(
    ("threads", "side", "words"),
    [
        (1, 224, "1 of 4 cores decode: start again with --threads 4"),
        (4, 500, "clipjob pack --resize 256"),
        (4, 256, "more cores for each GPU"),
    ],
)
def test_a_pipeline_that_is_too_slow_says_what_helps(threads: int, side: int, words: str) -> None:
    tally, view = DecodeTally(), View(224, 224, "bicubic", "shortest")
    assert tally.remedy(threads=threads, cores=4, view=view) == ""
    tally.add(images=10, pixels=10 * side * side, seconds=0.03)
    remedy = tally.remedy(threads=threads, cores=4, view=view)
    assert words in remedy
    assert "An image takes 3.0 ms of a thread" in remedy


def test_a_row_without_tags_keeps_its_text() -> None:
    assert captions(mode="sample").choices(2) == [""]
    assert captions(mode="sample").choices(1) == ["a blue car"]


@pytest.mark.parametrize(
    ("texts", "separator"),
    [(["a, b", "c, d"], ", "), (["a,b", "c,d"], ","), (["a;b", "c"], ";"), (["plain"], ", "), (["a|b"], "|"), (["a/b"], "/")],
)
def test_tag_separator_is_found(texts: list[str], separator: str) -> None:
    assert find_tag_separator(texts) == separator


def test_empty_tags_are_no_tags() -> None:
    assert split_tags("a, , b,  ", ", ") == ["a", "b"] or split_tags("a, , b,  ", ",") == ["a", "b"]


def test_full_lengths_count_what_truncation_would_cut() -> None:
    assert full_lengths(TOKENIZER, ["a blue car", "x " * 200]).tolist() == [5, 202]


VIEW = View(32, 32, "bicubic", "shortest")


class Store:
    def __init__(self, content: dict[str, bytes]) -> None:
        self._content = content

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[str], bytes | None]]:
        yield self._content.get


def load(*, threads: int, crop_scale: float = 0.5, broken: tuple[int, ...] = ()) -> list[Batch]:
    keys = [f"{number}.jpg" for number in range(40)]
    content = {key: tiny.picture(number) for number, key in enumerate(keys)}
    content |= {keys[number]: b"broken" for number in broken}
    texts = [f"thing {number}" for number in range(40)]
    samples = [Samples(np.arange(at, at + 12), (np.arange(at, at + 12) * 7) % 40) for at in range(0, 60, 12)]
    return list(
        load_batches(
            samples,
            keys=keys,
            images=Store(content),
            captions=captions(texts),
            view=VIEW,
            threads=threads,
            seed=3,
            crop_scale=crop_scale,
        )
    )


@pytest.mark.parametrize("threads", [2, 5])
def test_batches_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    for one, other in zip(load(threads=1), load(threads=threads), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens.text_of, other.tokens.text_of)


def test_an_image_that_cannot_be_decoded_is_left_out_and_named() -> None:
    whole, holed = load(threads=2), load(threads=2, broken=(7, 14))
    first = holed[0]
    assert first.bad == (("7.jpg", "cannot identify image file"), ("14.jpg", "cannot identify image file")) or [
        key for key, _ in first.bad
    ] == [
        "7.jpg",
        "14.jpg",
    ]
    kept = [at for at in range(12) if at not in (1, 2)]
    assert torch.equal(first.images, whole[0].images[kept])
    assert len(first.tokens.text_of) == 10


def test_without_random_crops_training_sees_the_evaluation_view() -> None:
    first = load(threads=1, crop_scale=1.0)[0]
    from job.data.pixels import decode, whole_view

    assert np.array_equal(first.images[3].permute(1, 2, 0), whole_view(decode(tiny.picture(21)), VIEW))


def test_batches_outlive_the_file_that_their_pixels_lay_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, VIEW.height, VIEW.width, 3), dtype=np.uint8)
    header = f"P6\n{VIEW.width} {VIEW.height}\n255\n".encode()
    keys = [str(number) for number in range(40)]
    packed = {key: header + picture.tobytes() for key, picture in zip(keys, pictures, strict=True)}
    images = open_images(tiny.write_lmdb(tmp_path / "images.lmdb", packed))
    samples = [Samples(np.arange(at, at + 20), np.arange(at, at + 20)) for at in (0, 20)]
    made = list(
        load_batches(samples, keys=keys, images=images, captions=captions(keys), view=VIEW, threads=4, seed=0, crop_scale=1.0)
    )
    images.close()
    (tmp_path / "images.lmdb" / "data.mdb").write_bytes(b"")
    assert np.array_equal(torch.cat([batch.images for batch in made]).permute(0, 2, 3, 1), pictures)


def test_closing_early_ends_the_threads(tmp_path: Path) -> None:
    import threading

    keys = [f"{number}.jpg" for number in range(40)]
    images = Store({key: tiny.picture(number) for number, key in enumerate(keys)})
    forever = (Samples(np.arange(12), np.arange(12)) for _ in iter(int, 1))
    batches = load_batches(forever, keys=keys, images=images, captions=captions(keys), view=VIEW, threads=3, seed=0, crop_scale=1.0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_decode_threads_leave_torchs_own_threads_alone() -> None:
    before = torch.get_num_threads()
    load(threads=2)
    assert torch.get_num_threads() == before
