import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from job.data.images import open_images
from job.data.manifest import read_manifest
from job.data.pack import pack
from job.data.pack_images import encode_image
from job.errors import ConfigError, DataError, Stopped, StorageError

ROOT = Path(__file__).parent.parent


def picture(number: int, size: tuple[int, int] = (40, 30), *, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 90)).save(out, kind, **options)
    return out.getvalue()


def make_folder(folder: Path, count: int = 12) -> dict[str, bytes]:
    values = {f"{'cats' if number % 2 else 'dogs/small'}/{number:04d}.png": picture(number) for number in range(count)}
    for key, value in values.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(value)
    return values


def contents(path: Path) -> dict[str, bytes]:
    images = open_images(path)
    found = {key: images.get(key) for key in images.sample_keys(len(images))}
    images.close()
    return found


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_folder_is_packed_byte_for_byte_under_its_relative_paths(tmp_path):
    values = make_folder(tmp_path / "in")
    for name in ("readme.txt", ".hidden.png", "cats/._0001.png", ".git/x.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no image")
    result = pack(tmp_path / "in", tmp_path / "new" / "x.lmdb")
    assert contents(tmp_path / "new" / "x.lmdb") == values
    assert (result.images, result.added, result.bad) == (12, 12, ())
    assert result.source_bytes == sum(map(len, values.values()))
    assert result.output_bytes == (tmp_path / "new" / "x.lmdb" / "data.mdb").stat().st_size
    assert sorted(os.listdir(tmp_path / "new")) == ["x.lmdb"]
    assert sorted(os.listdir(tmp_path / "new" / "x.lmdb")) == ["data.mdb", "pack.json"]


def test_links_are_followed_once(tmp_path):
    values = make_folder(tmp_path / "in")
    (tmp_path / "in" / "cats" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(picture(1))
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    pack(tmp_path / "in", tmp_path / "x.lmdb")
    assert contents(tmp_path / "x.lmdb") == values | {"linked/a.png": picture(1)}


def test_a_csv_of_captions_is_written_from_text_files_and_folder_names(tmp_path):
    make_folder(tmp_path / "in", 4)
    (tmp_path / "in" / "top.png").write_bytes(picture(9))
    (tmp_path / "in" / "cats" / "0001.txt").write_text('\ufeffa 5" cat | sleeping\n\n "on" a mat\n', encoding="utf-8")
    pack(tmp_path / "in", tmp_path / "x.lmdb", csv_output=tmp_path / "data.csv")
    manifest = read_manifest(tmp_path / "data.csv")
    assert dict(zip(manifest.keys, manifest.captions, strict=True)) == {
        "cats/0001.png": 'a 5" cat | sleeping, "on" a mat',
        "cats/0003.png": "cats",
        "dogs/small/0000.png": "dogs, small",
        "dogs/small/0002.png": "dogs, small",
        "top.png": "",
    }
    assert (tmp_path / "data.csv").read_text().startswith("path|tags\n")


def test_the_images_that_a_csv_lists_are_packed_under_its_own_keys(tmp_path):
    values = make_folder(tmp_path / "in")
    (tmp_path / "data.csv").write_text("path|tags\ncats/0001.png|cat\ndogs\\small\\0002.png|dog\ncats/0001.png|again\n")
    result = pack(tmp_path / "data.csv", tmp_path / "x.lmdb", folder=tmp_path / "in")
    assert result.images == 2
    assert contents(tmp_path / "x.lmdb") == {
        "cats/0001.png": values["cats/0001.png"],
        "dogs\\small\\0002.png": values["dogs/small/0002.png"],
    }
    with pytest.raises(ConfigError, match="is a CSV already"):
        pack(tmp_path / "data.csv", tmp_path / "y.lmdb", csv_output=tmp_path / "other.csv")


def test_resize_shrinks_to_the_short_side_and_keeps_smaller_images_as_they_are(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "wide.jpg").write_bytes(picture(1, (800, 400), kind="JPEG"))
    (folder / "tall.png").write_bytes(picture(2, (70, 300)))
    (folder / "small.webp").write_bytes(picture(3, (64, 500), kind="WEBP"))
    pack(folder, tmp_path / "x.lmdb", resize=64, threads=2)
    found = contents(tmp_path / "x.lmdb")
    assert {key: (opened(data).format, opened(data).size) for key, data in found.items()} == {
        "wide.jpg": ("JPEG", (128, 64)),
        "tall.png": ("JPEG", (64, 274)),
        "small.webp": ("WEBP", (64, 500)),
    }
    assert found["small.webp"] == (folder / "small.webp").read_bytes()


def test_as_ppm_every_image_is_stored_as_the_pixels_that_it_decodes_to(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "wide.jpg").write_bytes(picture(1, (800, 400), kind="JPEG"))
    (folder / "small.webp").write_bytes(picture(3, (64, 50), kind="WEBP"))
    pack(folder, tmp_path / "x.lmdb", resize=64, form="ppm", threads=2)
    found = contents(tmp_path / "x.lmdb")
    assert {key: (opened(data).format, opened(data).size) for key, data in found.items()} == {
        "wide.jpg": ("PPM", (128, 64)),
        "small.webp": ("PPM", (64, 50)),
    }
    assert np.array_equal(np.asarray(opened(found["small.webp"])), np.asarray(opened((folder / "small.webp").read_bytes())))
    with pytest.raises(ConfigError, match="packed with another format"):
        pack(folder, tmp_path / "x.lmdb", resize=64)


def test_a_pack_made_before_there_were_formats_is_still_finished(tmp_path):
    make_folder(tmp_path / "in", 3)
    pack(tmp_path / "in", tmp_path / "x.lmdb")
    file = tmp_path / "x.lmdb" / "pack.json"
    job = json.loads(file.read_text(encoding="utf-8"))
    del job["format"]
    file.write_text(json.dumps(job), encoding="utf-8")
    assert pack(tmp_path / "in", tmp_path / "x.lmdb").added == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_shrunk_image_looks_like_the_original(tmp_path, kind):
    rows, columns = np.mgrid[0:600, 0:900]
    pixels = np.stack([rows * 255 // 600, columns * 255 // 900, (rows + columns) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x", kind, **({"quality": 95} if kind == "JPEG" else {}))
    small = opened(encode_image(tmp_path / "x", resize=100, quality=95))
    expected = Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(small, dtype=int) - np.asarray(expected, dtype=int))[..., :2]
    assert small.size == (150, 100)
    assert difference.mean() < 3


def test_a_checkerboard_becomes_grey_not_moire(tmp_path):
    pixels = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    small = np.asarray(opened(encode_image(tmp_path / "x.png", resize=100, quality=95)), dtype=int)
    assert abs(small - 127).max() < 20


def _save(image: Image.Image, path: Path, kind: str = "PNG", **options) -> Path:
    image.save(path, kind, **options)
    return path


def test_shrunk_images_are_upright(tmp_path):
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise
    small = opened(encode_image(_save(image, tmp_path / "x.jpg", "JPEG", exif=exif.tobytes()), resize=50, quality=90))
    assert small.size == (50, 100)
    assert small.getpixel((25, 10))[2] > 200
    assert small.getpixel((25, 90))[0] > 200
    assert small.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), 255),
        (Image.new("LA", (64, 64), (0, 0)), 255),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 255)), 0),
        (Image.new("L", (64, 64), 128), 128),
        (Image.new("1", (64, 64), 1), 255),
        (Image.fromarray(np.full((64, 64), 128 << 8, np.uint16)), 128),
        (Image.new("P", (64, 64), 0), 0),
    ],
    ids=["transparent", "grey with alpha", "opaque", "grey", "bits", "16 bits", "palette"],
)
def test_every_mode_is_shrunk_to_rgb_over_white(tmp_path, image, expected):
    small = opened(encode_image(_save(image, tmp_path / "x.png"), resize=32, quality=95))
    assert small.mode == "RGB"
    assert all(abs(value - expected) <= 2 for value in small.getpixel((16, 16)))


def test_bad_images_are_counted_named_and_left_out_up_to_the_limit(tmp_path):
    values = make_folder(tmp_path / "in", 20)
    (tmp_path / "in" / "cats" / "0001.png").write_bytes(values["cats/0001.png"][:50])
    (tmp_path / "in" / "cats" / "0003.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"2 of the images tried .*--max-bad-samples .*'cats/0001.png': .*; 'cats/0003.png': it is empty"
    ):
        pack(tmp_path / "in", tmp_path / "x.lmdb", max_bad_samples=0.05)
    assert not (tmp_path / "x.lmdb").exists()
    result = pack(tmp_path / "in", tmp_path / "x.lmdb", max_bad_samples=0.1, csv_output=tmp_path / "data.csv")
    assert [key for key, _ in result.bad] == ["cats/0001.png", "cats/0003.png"]
    assert all(reason for _, reason in result.bad)
    good = set(values) - {"cats/0001.png", "cats/0003.png"}
    assert set(contents(tmp_path / "x.lmdb")) == set(read_manifest(tmp_path / "data.csv").keys) == good


def test_images_that_a_csv_lists_and_that_are_missing_are_bad(tmp_path):
    (tmp_path / "data.csv").write_text("path|tags\nnowhere.png|cat\n")
    with pytest.raises(DataError, match=r"'nowhere.png': .*No such file"):
        pack(tmp_path / "data.csv", tmp_path / "x.lmdb", max_bad_samples=1)


def _long_key(folder: Path) -> None:
    deep = folder / ("a" * 200) / ("b" * 200) / ("c" * 120)
    deep.mkdir(parents=True)
    (deep / "x.png").write_bytes(picture(1))


def _not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda folder: None, "No images in"), (_long_key, "'aaaa.*more than 511 bytes"), (_not_utf8, "not UTF-8")],
)
def test_sources_that_cannot_be_packed_are_refused_before_any_work(tmp_path, make, message):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "in", tmp_path / "x.lmdb")
    assert os.listdir(tmp_path) == ["in"]


def test_a_finished_pack_is_repeated_at_no_cost_and_never_overwritten(tmp_path):
    make_folder(tmp_path / "in")
    first = pack(tmp_path / "in", tmp_path / "x.lmdb")
    before = (tmp_path / "x.lmdb" / "data.mdb").stat().st_mtime_ns
    again = pack(tmp_path / "in", tmp_path / "x.lmdb", csv_output=tmp_path / "data.csv")
    assert (again.images, again.added, again.output_bytes) == (first.images, 0, first.output_bytes)
    assert len(read_manifest(tmp_path / "data.csv")) == first.images
    with pytest.raises(ConfigError, match="another resize"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", resize=20)
    (tmp_path / "in" / "new.png").write_bytes(picture(77))
    with pytest.raises(ConfigError, match="another list of images"):
        pack(tmp_path / "in", tmp_path / "x.lmdb")
    assert (tmp_path / "x.lmdb" / "data.mdb").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["file", "folder", "lmdb"])
def test_an_output_of_other_origin_is_refused(tmp_path, kind):
    make_folder(tmp_path / "in")
    output = tmp_path / "x.lmdb"
    if kind == "file":
        output.write_text("precious")
    elif kind == "folder":
        output.mkdir()
    else:
        lmdb.open(str(output), map_size=1 << 20).close()
    with pytest.raises(ConfigError, match="clipjob pack did not make it"):
        pack(tmp_path / "in", output)


def test_an_existing_csv_is_not_overwritten(tmp_path):
    make_folder(tmp_path / "in")
    (tmp_path / "data.csv").write_text("precious")
    with pytest.raises(ConfigError, match=r"data.csv exists"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", csv_output=tmp_path / "data.csv")
    assert (tmp_path / "data.csv").read_text() == "precious"


def stop_at_once() -> bool:
    return True


def test_a_stopped_pack_goes_on_with_files_that_came_and_without_those_that_went(tmp_path, monkeypatch):
    monkeypatch.setattr("job.data.pack_lmdb.COMMIT_BYTES", 1)
    values = make_folder(tmp_path / "in")
    with pytest.raises(Stopped, match="1 of 12 images"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", stopping=stop_at_once)
    with pytest.raises(DataError, match="partly packed"):
        open_images(tmp_path / "x.lmdb")
    with pytest.raises(ConfigError, match="unfinished pack with another resize"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", resize=20)
    first = min(values)
    (tmp_path / "in" / first).unlink()
    del values[first]
    values["a/new.png"] = picture(50)
    (tmp_path / "in" / "a").mkdir()
    (tmp_path / "in" / "a" / "new.png").write_bytes(values["a/new.png"])
    with pytest.raises(Stopped, match="1 of 12 images"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", stopping=stop_at_once)
    result = pack(tmp_path / "in", tmp_path / "x.lmdb")
    assert (result.images, result.added) == (12, 11)
    assert contents(tmp_path / "x.lmdb") == values


def test_two_packs_do_not_write_the_same_output(tmp_path):
    make_folder(tmp_path / "in")
    partial = tmp_path / "x.lmdb.partial"
    partial.mkdir()
    with (partial / "pack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="Another clipjob pack"):
            pack(tmp_path / "in", tmp_path / "x.lmdb")
    pack(tmp_path / "in", tmp_path / "x.lmdb")


PROGRAM = """
import sys, time, pathlib, job.data.pack as packing, job.data.pack_lmdb as writing
writing.COMMIT_BYTES = 1
encode = packing.encode_image
def slow(*arguments, **named):
    time.sleep(0.005)
    return encode(*arguments, **named)
packing.encode_image = slow
packing.pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), threads=2)
"""


def test_a_killed_pack_goes_on_where_it_stopped(tmp_path):
    values = make_folder(tmp_path / "in", 300)
    for key in values:
        values[key] += os.urandom(5000)  # bytes after a PNG's end are no error
        (tmp_path / "in" / key).write_bytes(values[key])
    output, partial = tmp_path / "x.lmdb", tmp_path / "x.lmdb.partial"
    kills = 0
    for grown in (200_000, 800_000):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tmp_path / "in", output], cwd=ROOT, stderr=subprocess.PIPE
        ) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if (partial / "data.mdb").exists() and (partial / "data.mdb").stat().st_size > grown:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert not output.exists()
    result = pack(tmp_path / "in", output)
    assert (result.images, result.bad) == (300, ())
    assert 0 < result.added < 300
    assert contents(output) == values
    assert not partial.exists()


DISK_FULL = """
import resource, signal, sys, pathlib
from job.data.pack import pack
from job.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
except StorageError as error:
    print(error.exit_code, error)
"""


def test_a_full_disk_is_a_storage_error_that_the_next_attempt_survives(tmp_path):
    values = make_folder(tmp_path / "in", 4)
    for number in range(20):
        values[f"{number}.png"] = picture(number) + os.urandom(20_000)
        (tmp_path / "in" / f"{number}.png").write_bytes(values[f"{number}.png"])
    command = [sys.executable, "-c", DISK_FULL, tmp_path / "in", tmp_path / "x.lmdb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("69 Packing into ")
    assert "run the same command again" in done.stdout
    assert pack(tmp_path / "in", tmp_path / "x.lmdb").images == 24
    assert contents(tmp_path / "x.lmdb") == values


def test_an_output_that_cannot_be_written_is_a_storage_error(tmp_path):
    make_folder(tmp_path / "in")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=os.strerror(errno.ENOTDIR)):
        pack(tmp_path / "in", tmp_path / "file" / "x.lmdb")


def test_the_map_grows_with_the_images_and_stays_close_to_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("job.data.pack_lmdb.SPARE_MAP_BYTES", 100_000)
    monkeypatch.setattr("job.data.pack_lmdb.COMMIT_BYTES", 200_000)
    folder = tmp_path / "in"
    folder.mkdir()
    total = 0
    for number in range(60):
        data = picture(number) + os.urandom(50_000)  # bytes after a PNG's end are no error
        (folder / f"{number}.png").write_bytes(data)
        total += len(data)
    result = pack(folder, tmp_path / "x.lmdb")
    file = tmp_path / "x.lmdb" / "data.mdb"
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False) as environment:
        info = environment.info()
    assert result.images == 60
    assert total < result.output_bytes < total * 1.2
    assert file.stat().st_blocks * 512 <= file.stat().st_size + 4096
    assert info["map_size"] <= 12_000_000  # LMDB itself opens at least 10 MB


def test_many_threads_pack_the_same_lmdb_as_one(tmp_path):
    make_folder(tmp_path / "in", 200)
    pack(tmp_path / "in", tmp_path / "one.lmdb", threads=1, resize=16)
    pack(tmp_path / "in", tmp_path / "many.lmdb", threads=8, resize=16)
    assert contents(tmp_path / "one.lmdb") == contents(tmp_path / "many.lmdb")


def test_packing_needs_no_torch(tmp_path):
    make_folder(tmp_path / "in", 3)
    program = (
        "import sys; sys.modules['torch'] = None; import pathlib; from job.data.pack import pack;"
        "print(pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).images)"
    )
    command = [sys.executable, "-c", program, tmp_path / "in", tmp_path / "x.lmdb"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "3\n"
    assert json.loads((tmp_path / "x.lmdb" / "pack.json").read_text())["resize"] == 0
