import contextlib
import io
import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from job.data.check import check_data, hash_column, quick_check
from job.data.check_report import Problem, Report, render_table
from job.data.images import Images, open_images
from job.data.manifest import Column, Manifest, read_manifest
from job.errors import DataError

OPENMOJI = Path(__file__).parent.parent / "job" / "demo" / "openmoji"


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # OSError is no ValueError: see below


def decode_or_value_error(data: bytes) -> np.ndarray:
    try:
        return decode(data)
    except OSError as error:
        raise ValueError(str(error)) from None


def word_lengths(texts: list[str]) -> np.ndarray:
    return np.array([len(text.split()) + 2 for text in texts])


def byte_lengths(texts: list[str]) -> np.ndarray:
    """A tokenizer that knows English words and shatters everything else, as CLIP's does."""
    return np.array([(len(text.split()) if text.isascii() else len(text.encode())) + 2 for text in texts])


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 7)).save(out, "PNG")
    return out.getvalue()


class Data:
    """A data set in a temporary folder: pairs for the CSV, images for the LMDB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs = [(f"{number}.png", f"caption number {number}") for number in range(40)]
        self.images = {f"{number}.png": png(number) for number in range(40)}

    def open(self) -> tuple[Manifest, Images]:
        path = self.folder / "data.csv"
        path.write_text("path|tags\n" + "".join(f"{key}|{caption}\n" for key, caption in self.pairs), encoding="utf-8")
        with lmdb.open(str(self.folder / "x.lmdb"), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
            for key, value in self.images.items():
                transaction.put(key.encode(), value)
        return read_manifest(path), open_images(self.folder / "x.lmdb")

    def check(self, **changes) -> Report:
        defaults = {
            "token_lengths": word_lengths,
            "decode": decode_or_value_error,
            "context_length": 77,
            "global_batch_size": 8,
            "epochs": 2,
            "val_fraction": 0.2,
            "threads": 2,
        }
        manifest, images = self.open()
        with contextlib.closing(images):
            return check_data(manifest, images, **(defaults | changes))

    def quick(self, **changes) -> list[Problem]:
        manifest, images = self.open()
        defaults = {"training": np.arange(len(manifest)), "global_batch_size": 8, "max_bad_samples": 0.1}
        with contextlib.closing(images):
            return quick_check(manifest, images, **(defaults | changes))


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def names(report: Report) -> dict[str, str]:
    return {problem.name: problem.severity for problem in report.problems}


def text_of(report: Report, name: str) -> str:
    return next(problem.text for problem in report.problems if problem.name == name)


def test_good_data_has_facts_and_no_problems(data):
    report = data.check(weight_bytes=100, optimizer_bytes=200, run="s3://bucket/run")
    assert report.ok
    assert report.problems == []
    facts = report.facts
    assert (facts["rows"], facts["images_in_lmdb"], facts["distinct_keys"], facts["missing_keys"]) == (40, 40, 40, 0)
    assert facts["training_rows"] + facts["held_out_rows"] == 40
    assert facts["steps"] == -(-2 * facts["training_rows"] // 8)
    assert (facts["mean_caption_tokens"], facts["longest_caption_tokens"], facts["truncated_captions_share"]) == (5, 5, 0)
    assert (facts["images_decoded"], facts["image_formats"], facts["median_image_pixels"]) == (40, {"png": 40}, "8 x 8")
    assert (facts["checkpoint_bytes"], facts["checkpoints_kept"], facts["run_needed_bytes"]) == (300, 4, 1200)


def test_the_demo_data_passes():
    images = open_images(OPENMOJI / "images.lmdb")
    report = check_data(
        read_manifest(OPENMOJI / "data.csv"),
        images,
        token_lengths=word_lengths,
        decode=decode,
        context_length=77,
        global_batch_size=64,
        epochs=1,
        val_fraction=0.1,
        all_images=True,
    )
    images.close()
    assert report.ok
    assert (report.facts["held_out_rows"], report.facts["images_decoded"]) == (263, 2465)
    assert names(report) == {"repeated-images": "advice", "leaked-images": "warning"}


def test_missing_keys_are_an_error_above_the_allowed_share_and_a_warning_below(data):
    del data.images["7.png"], data.images["9.png"]
    report = data.check(max_bad_samples=0.01)
    assert names(report)["missing-keys"] == "error"
    assert "2 of 40 rows" in text_of(report, "missing-keys")
    assert "'7.png', '9.png'" in text_of(report, "missing-keys")
    assert not report.ok
    report = data.check(max_bad_samples=0.1)
    assert names(report) == {"missing-keys": "warning"}
    assert report.ok
    assert report.facts["images_decoded"] == 38


def test_undecodable_images_are_named_with_the_reason(data):
    data.images["3.png"] = data.images["3.png"][:40]
    data.images["4.png"] = b"<html>404</html>"
    report = data.check(max_bad_samples=0.01)
    assert names(report) == {"undecodable-images": "error"}
    assert "2 of 40 images" in text_of(report, "undecodable-images")
    assert "'4.png': cannot identify image file" in text_of(report, "undecodable-images")
    assert report.facts["image_formats"] == {"png": 39, "other": 1}
    assert names(data.check(max_bad_samples=0.1)) == {"undecodable-images": "warning"}


def test_only_a_sample_is_decoded_unless_all_images_are_asked_for(data, monkeypatch):
    monkeypatch.setattr("job.data.check.SAMPLED_IMAGES", 10)
    assert data.check().facts["images_decoded"] == 10
    assert data.check(all_images=True).facts["images_decoded"] == 40


def test_a_bug_in_decode_is_not_taken_for_a_bad_image(data):
    data.images["3.png"] = b"no image"
    with pytest.raises(OSError, match="cannot identify"):
        data.check(decode=decode)


def test_an_image_with_several_captions_is_decoded_once_and_not_called_repeated(data):
    data.pairs += [("0.png", "another caption"), ("0.png", "a third")]
    report = data.check()
    assert (report.facts["rows"], report.facts["distinct_keys"], report.facts["images_decoded"]) == (42, 40, 40)
    assert names(report) == {}


def test_the_same_bytes_under_two_keys_are_noticed_most_of_all_across_the_split(data):
    data.images = dict.fromkeys(data.images, png(1))
    report = data.check()
    assert names(report) == {"repeated-images": "advice", "leaked-images": "warning"}
    assert "39 of 40" in text_of(report, "repeated-images")
    assert f"{report.facts['held_out_rows']} held-out images" in text_of(report, "leaked-images")


def test_repeated_rows_are_noticed(data):
    data.pairs += data.pairs[:3]
    report = data.check()
    assert names(report) == {"repeated-rows": "advice"}
    assert report.facts["repeated_rows"] == 3


@pytest.mark.parametrize(("share", "severity"), [(3, "warning"), (30, "error")])
def test_empty_captions_are_counted(data, share, severity):
    data.pairs[:share] = [(key, "" if number % 2 else "  ") for number, (key, _) in enumerate(data.pairs[:share])]
    report = data.check()
    assert report.facts["empty_captions"] == share
    assert names(report)["empty-captions"] == severity


def test_the_most_common_caption_is_named_with_its_share(data):
    data.pairs[:20] = [(key, "a photo") for key, _ in data.pairs[:20]]
    report = data.check()
    assert names(report) == {"common-caption": "advice"}
    assert (report.facts["most_common_caption"], report.facts["most_common_caption_share"]) == ("a photo", 0.5)
    assert report.facts["distinct_captions"] == 21


def test_one_caption_for_all_is_an_error(data):
    data.pairs = [(key, "image") for key, _ in data.pairs]
    assert names(data.check()) == {"one-caption": "error"}


def test_truncated_captions_are_counted_and_the_longest_is_shown(data):
    data.pairs[5] = (data.pairs[5][0], "word " * 100)
    report = data.check()
    assert names(report) == {"truncated-captions": "warning"}
    assert report.facts["longest_caption_tokens"] == 102
    assert report.facts["truncated_captions_share"] == 1 / 40
    assert "1 of 40 captions" in text_of(report, "truncated-captions")


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("一只黑色的猫坐在窗台上", "cjk"),
        ("чёрная кошка на окне", "cyrillic"),
        ("قطة سوداء على النافذة", "arabic"),
        ("黒い猫がいる", "hiragana"),
    ],
)
def test_captions_in_a_script_unknown_to_the_tokenizer_lead_to_a_multilingual_model(data, caption, script):
    data.pairs = [(key, f"{caption} {number}") for number, (key, _) in enumerate(data.pairs)]
    report = data.check(token_lengths=byte_lengths)
    assert names(report) == {"shattered-script": "warning"}
    assert script in text_of(report, "shattered-script")
    assert "xlm-roberta-base-ViT-B-32" in text_of(report, "shattered-script")
    known = data.check(
        token_lengths=lambda texts: np.array([int(len(text) * 0.7 * (0.3 if " " in caption else 1)) + 2 for text in texts])
    )
    assert names(known) == {}


def test_accents_and_emoji_are_no_foreign_script(data):
    data.pairs = [(key, f"naïve café 🐈🐈🐈🐈 {number}") for number, (key, _) in enumerate(data.pairs)]
    assert names(data.check(token_lengths=byte_lengths)) == {}


def test_fewer_rows_than_a_batch_is_an_error(data):
    report = data.check(global_batch_size=64)
    assert names(report) == {"too-few-rows": "error"}
    assert "--global-batch-size" in text_of(report, "too-few-rows")


def test_a_split_without_held_out_rows_is_a_warning(data):
    assert names(data.check(val_fraction=1e-9)) == {"nothing-held-out": "warning"}
    assert names(data.check(val_fraction=0)) == {}


def test_large_images_lead_to_clipjob_pack(data):
    data.images = {key: png(number, (600, 500)) for number, key in enumerate(data.images)}
    report = data.check()
    assert names(report) == {"large-images": "advice"}
    assert report.facts["largest_image_pixels"] == "600 x 500"


def test_a_disk_too_small_for_the_checkpoints_is_an_error(data, tmp_path):
    report = data.check(
        weight_bytes=10**15, optimizer_bytes=2 * 10**15, run=str(tmp_path / "new" / "run"), keep_every=5, max_steps=20
    )
    assert names(report) == {"disk-too-small": "error"}
    assert report.facts["checkpoints_kept"] == 8
    assert "need 24,000 TB" in text_of(report, "disk-too-small")
    assert str(tmp_path) in text_of(report, "disk-too-small")
    assert not (tmp_path / "new").exists()


def test_the_report_is_json_and_a_table(data):
    data.pairs[0] = ("0.png", "")
    del data.images["1.png"]
    report = data.check()
    loaded = json.loads(report.to_json())
    assert loaded["ok"] is False
    assert loaded["facts"] == report.facts
    assert [problem["name"] for problem in loaded["problems"]] == [problem.name for problem in report.problems]
    table = render_table(report, width=80)
    assert "\nheld out rows " in table
    assert table.index("ERROR missing-keys: ") < table.index("WARNING empty-captions: ")
    assert table.endswith("The data is not fit for training: 1 error, 1 warning.")
    assert max(map(len, table.splitlines())) <= 80
    starts = {line.index("  " + line.split("  ")[-1].strip()) for line in table.split("\n\n")[0].splitlines()}
    assert len(starts) == 1, "the values stand in one column"


def test_the_quick_check_is_silent_for_good_data(data):
    assert data.quick() == []


def test_the_quick_check_returns_warnings(data):
    data.pairs[0] = ("0.png", "")
    del data.images["1.png"]
    assert [(problem.severity, problem.name) for problem in data.quick()] == [
        ("warning", "missing-keys"),
        ("warning", "empty-captions"),
    ]


def test_the_quick_check_ends_the_job_with_every_error_in_one_message(data):
    data.images = {"pictures/" + key: value for key, value in data.images.items()}
    with pytest.raises(DataError, match=r"20 training rows do not fill.*40 of 40 rows.*--key-prefix 'pictures/'"):
        data.quick(training=np.arange(20), global_batch_size=32)


def test_equal_texts_have_equal_hashes_and_others_do_not():
    texts = [str(number % 70_000) for number in range(140_000)]
    hashes = hash_column(Column.of(texts))
    assert (hashes[:70_000] == hashes[70_000:]).all()
    assert len(np.unique(hashes)) == 70_000


def test_nothing_is_printed_where_there_is_no_terminal(data, capfd):
    data.check()
    assert capfd.readouterr() == ("", "")
