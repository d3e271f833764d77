"""JPEGs decoded by a GPU. The device here is the CPU, which torchvision decodes a list of JPEGs on in the same way."""

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from system import finish, run_to_end
from test_captions_and_batches import VIEW, captions

from job import fitted
from job.config import Config
from job.data import gpu_jpeg
from job.data.batches import Batch, DecodeTally, Samples, load_batches
from job.data.gpu_jpeg import GpuJpegs
from job.data.images import open_images
from job.data.manifest import read_manifest
from job.data.pixels import Encoded, View, _resized_in_float, pixels_of_common_jpeg
from job.runtime.world import ALONE

CPU = torch.device("cpu")
COUNT = 300


def saved(mode: str = "RGB", size: tuple[int, int] = (40, 30), *, form: str = "JPEG", **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, 7).convert(mode).save(stream, form, **how)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(exif=exif)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (tiny.picture(1), 40 * 30),
        (saved(quality=30, subsampling=0), 40 * 30),
        (saved(progressive=True), 0),
        (saved("L"), 0),
        (saved("CMYK"), 0),
        (turned(), 0),
        (saved(form="PNG"), 0),
        (tiny.picture(1)[:20], 0),
        (b"\xff\xd8\xff", 0),
        (b"", 0),
    ],
    ids=["photo", "4:4:4", "progressive", "grey", "CMYK", "turned", "PNG", "cut off", "mark alone", "empty"],
)
def test_only_jpegs_that_all_decoders_take_alike_go_to_the_gpu(data: bytes, pixels: int) -> None:
    assert pixels_of_common_jpeg(data) == pixels
    assert GpuJpegs(CPU).each({5: data}, lambda _place, image: image.shape[0] * image.shape[1]) == ({5: pixels} if pixels else {})


class Mixed:
    """Photos, every tenth a PNG, one that is broken behind its header, one that is not there."""

    BROKEN, ABSENT = 131, 140

    def __init__(self) -> None:
        self._content = {f"{number}": tiny.picture(number) for number in range(COUNT)}
        self._content |= {f"{number}": saved(form="PNG") for number in range(0, COUNT, 10)}
        whole = self._content[str(self.BROKEN)]
        self._content[str(self.BROKEN)] = whole[: whole.index(b"\xff\xda") + 14]
        del self._content[str(self.ABSENT)]

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[str], bytes | None]]:
        yield self._content.get


def load(gpu: GpuJpegs | None, tally: DecodeTally | None = None, *, threads: int = 4) -> list[Batch]:
    keys = [str(number) for number in range(COUNT)]
    samples = [Samples(rows, rows) for rows in np.split(np.arange(COUNT), 2)]
    how: dict[str, Any] = {"captions": captions(keys), "view": VIEW, "threads": threads, "seed": 3, "crop_scale": 0.5}
    return list(load_batches(samples, keys=keys, images=Mixed(), gpu_jpegs=gpu, tally=tally, **how))


def test_batches_are_those_of_the_cpu_whatever_is_among_them(caplog: pytest.LogCaptureFixture) -> None:
    tallies = DecodeTally(), DecodeTally()
    expected = load(None, tallies[0])
    assert [len(batch.images) for batch in expected] == [148, 150]
    for one, other in zip(load(GpuJpegs(CPU), tallies[1]), expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.bad == other.bad
        assert torch.equal(one.tokens.text_of, other.tokens.text_of)
    assert (tallies[0]._images, tallies[0]._pixels) == (tallies[1]._images, tallies[1]._pixels)
    assert len([record for record in caplog.records if "the CPU does" in record.getMessage()]) == 1  # of the broken one


def watch_rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images of each call that decodes."""
    decoded: list[int] = []
    real = gpu_jpeg.decode_common_jpegs

    def watched(data: Any, *, device: torch.device) -> Any:
        decoded.append(len(data))
        return real(data, device=device)

    monkeypatch.setattr(gpu_jpeg, "decode_common_jpegs", watched)
    return decoded


def test_the_gpu_decodes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = watch_rounds(monkeypatch)
    load(GpuJpegs(CPU), threads=1)
    assert decoded == [115, 20, 10, 5, 5, 10, 115, 20]  # chunks of 128 and 22 without PNGs; halves, until the broken one is found


def test_a_task_keeps_to_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_jpeg, "ROUND_PIXELS", 3 * 40 * 30)
    decoded = watch_rounds(monkeypatch)
    photos = {at: tiny.picture(at) for at in range(7)} | {7: tiny.picture(7, width=400, height=300)}
    assert set(GpuJpegs(CPU).each(photos, lambda place, _image: place)) == set(range(7))
    assert decoded == [3, 3, 1]
    expected = load(None)
    assert all(torch.equal(one.images, other.images) for one, other in zip(load(GpuJpegs(CPU)), expected, strict=True))


def test_memory_that_runs_out_leaves_the_rest_to_the_cpu() -> None:
    seen: list[int] = []

    def view(place: int, image: torch.Tensor) -> int:
        seen.append(place)
        if len(seen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return place

    done = GpuJpegs(CPU).each({at: tiny.picture(at) for at in range(5)}, view)
    assert list(done) == seen[:2]
    assert len(seen) == 3


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no such error")
def test_a_gpu_that_is_lost_is_not_taken_for_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(gpu_jpeg, "decode_common_jpegs", fails)
    with pytest.raises(torch.AcceleratorError):
        GpuJpegs(CPU).each({0: tiny.picture(0)}, lambda place, _image: place)


def test_few_tasks_are_on_the_gpu_at_a_time() -> None:
    gpu, inside, most = GpuJpegs(CPU), [0], [0]
    lock, photo = threading.Lock(), tiny.picture(0)

    def view(_place: int, _image: torch.Tensor) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1

    threads = [threading.Thread(target=gpu.each, args=({0: photo}, view)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == gpu_jpeg.AT_ONCE


@pytest.mark.parametrize("size", [(224, 224), (300, 100)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_resize_of_a_gpu_is_that_of_pillow_to_two_levels(size: tuple[int, int], interpolation: str) -> None:
    with Image.open(io.BytesIO(tiny.picture(3, width=340, height=260))) as photo:
        pixels = np.array(photo)
    planes = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # as nvJPEG has them
    resized = _resized_in_float(planes.permute(1, 2, 0)[10:250, 20:330], *size, interpolation)
    assert resized.dtype == torch.uint8
    assert resized.is_contiguous()
    pixels = pixels[10:250, 20:330]
    how = Image.Resampling[interpolation.upper()]
    expected = np.array(Image.fromarray(pixels).resize(size[::-1], how))
    differences = np.abs(resized.numpy().astype(int) - expected)
    assert np.quantile(differences, 0.999) <= 2
    assert differences.mean() < 0.5


class Quick(GpuJpegs):
    """Has decoded everything before it is asked. Args: error: in levels, of one image in a hundred."""

    def __init__(self, error: int) -> None:
        super().__init__(CPU)
        self._error = error

    def each(self, encoded: Mapping[int, Encoded], view: Callable[[int, torch.Tensor], Any]) -> dict[int, Any]:
        return {
            place: view(place, torch.full((224, 224, 3), 7 + (self._error if place == 99 else 0), dtype=torch.uint8))
            for place in encoded
        }


class Slow(GpuJpegs):
    def each(self, encoded: Mapping[int, Encoded], view: Callable[[int, torch.Tensor], Any]) -> dict[int, Any]:
        time.sleep(0.05)
        return super().each(encoded, view)


class Failing(GpuJpegs):
    def each(self, encoded: Mapping[int, Encoded], view: Callable[[int, torch.Tensor], Any]) -> dict[int, Any]:
        raise RuntimeError("nvJPEG is not here.")


@pytest.mark.parametrize(
    ("gpu", "choice", "said"),
    [
        (Quick(0), "gpu", "JPEG decoder"),
        (Quick(9), "cpu", "JPEG decoder"),
        (Slow(CPU), "cpu", "JPEG decoder"),
        (Failing(CPU), "cpu", "nvJPEG is not here"),
    ],
    ids=["quick", "quick and wrong", "slow", "failing"],
)
def test_auto_takes_what_is_faster_and_right(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpu: GpuJpegs,
    choice: str,
    said: str,
) -> None:
    monkeypatch.setattr(fitted, "TRIED_CHUNKS", 2)
    caplog.set_level("INFO")
    photo = saved(size=(800, 600))
    csv = tiny.write_csv(tmp_path / "data.csv", [(f"{number}.jpg", "a thing") for number in range(20)])
    images = open_images(tiny.write_lmdb(tmp_path / "images.lmdb", {f"{number}.jpg": photo for number in range(20)}))
    dataset: Any = SimpleNamespace(manifest=read_manifest(csv), images=images, train_rows=np.arange(20))
    attempt: Any = SimpleNamespace(device=CPU, watchdog=SimpleNamespace(beat=lambda _doing: None), world=ALONE)
    clip: Any = SimpleNamespace(view=View(224, 224, "bicubic", "shortest"))
    assert fitted.faster_decoder(Config(threads=1), attempt, dataset, clip, gpu) == choice
    assert said in caplog.text
    images.close()


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    csv, lmdb = tiny.write_data(tmp_path, 20)
    places = ["--csv", str(csv), "--lmdb", str(lmdb), "--model", str(tiny.write_config(tmp_path)), "--run", str(tmp_path / "run")]
    rest = ["--scratch", str(tmp_path / "s"), "--metrics-port", "0", "--device", "cpu", "--global-batch-size", "8"]
    return lambda *more: ["train", *places, *rest, "--max-steps", "2", "--precision", "fp32", *more]


def test_without_a_gpu_auto_is_the_cpu_and_the_run_keeps_that(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    finish(words("--jpeg-decoder", "auto"))
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["config"]["jpeg_decoder"] == "cpu"


def test_a_gpu_that_was_asked_for_and_is_not_there_ends_the_job(words: Callable[..., list[str]]) -> None:
    code, ended = run_to_end(words("--jpeg-decoder", "gpu"))
    assert code == 71
    assert "--jpeg-decoder gpu needs a GPU; the device is cpu. Go on with --jpeg-decoder cpu." in "".join(ended.text)
