import os
import shutil
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
from unprivileged import error_of

from job.data.images import match_keys, open_images
from job.data.manifest import Column, read_manifest
from job.errors import DataError

OPENMOJI = Path(__file__).parent.parent / "job" / "demo" / "openmoji"


def make_lmdb(path: Path, values: dict[str, bytes], *, subdir: bool = True) -> Path:
    with lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def test_the_demo_images_are_read():
    images = open_images(OPENMOJI / "images.lmdb")
    try:
        assert len(images) == 2465
        assert images.file_bytes == (OPENMOJI / "images.lmdb" / "data.mdb").stat().st_size
        assert images.fingerprint() == {"entries": 2465, "bytes": images.file_bytes}
        manifest = read_manifest(OPENMOJI / "data.csv")
        assert match_keys(manifest.keys, np.arange(len(manifest)), images).count == 0
        assert images.get(manifest.keys[7])[:4] == b"\x89PNG"
    finally:
        images.close()


@pytest.mark.parametrize("subdir", [True, False])
def test_a_folder_and_a_single_file_are_read_alike(tmp_path, subdir):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {"a": b"one", "ü/b": b"two"}, subdir=subdir))
    assert (images.get("a"), images.get("ü/b"), images.get("c")) == (b"one", b"two", None)
    assert "ü/b" in images
    assert "c" not in images
    assert len(images) == 2
    images.close()
    images.close()


def test_keys_that_lmdb_cannot_hold_are_simply_not_there(tmp_path):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {"k" * 511: b"longest"}))
    assert images.get("k" * 511) == b"longest"
    for key in ("", "k" * 512, "é" * 256):
        assert images.get(key) is None
        assert key not in images
    images.close()


def test_values_outlive_the_reader(tmp_path):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {"a": b"x" * 100_000}))
    value = images.get("a")
    images.close()
    assert value == b"x" * 100_000


def test_sampled_keys_are_spread_over_the_whole_lmdb(tmp_path):
    names = [f"{number:04d}" for number in range(1000)]
    images = open_images(make_lmdb(tmp_path / "x.lmdb", dict.fromkeys(names, b"x")))
    assert images.sample_keys(0) == []
    assert images.sample_keys(1) == ["0000"]
    assert images.sample_keys(10) == names[::100]
    assert len(images.sample_keys(300)) == 250
    assert images.sample_keys(5000) == names
    images.close()


def test_an_lmdb_is_shared_by_all_who_open_it(tmp_path):
    path = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    (tmp_path / "link").symlink_to(path)
    first, second, third = open_images(path), open_images(tmp_path / "link"), open_images(path / "data.mdb")
    first.close()
    assert second.get("a") == b"one"
    second.close()
    assert third.get("a") == b"one"
    third.close()
    again = open_images(path)
    assert again.get("a") == b"one"
    again.close()


def test_close_works_after_the_file_is_gone(tmp_path):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {"a": b"one"}))
    shutil.rmtree(tmp_path / "x.lmdb")
    images.close()
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {"a": b"other"}))
    assert images.get("a") == b"other"
    images.close()


def test_many_threads_read_at_once(tmp_path):
    values = {f"{number}": os.urandom(5000) for number in range(200)}
    images = open_images(make_lmdb(tmp_path / "x.lmdb", values))
    together = threading.Barrier(16)

    def read_all(_: int) -> bool:
        together.wait()
        return all(images.get(key) == value for key, value in values.items())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read_all, range(16)))
    images.close()


def test_one_reading_sees_every_lmdb_and_leaves_nothing_behind(tmp_path):
    first = make_lmdb(tmp_path / "x.lmdb", {"both": b"first"})
    second = make_lmdb(tmp_path / "y.lmdb", {"b": b"two", "both": b"second", "empty": b""})
    images = open_images([first, second])
    with images.reading() as read:
        found = [read(key) for key in ("b", "both", "empty", "none", "", "k" * 600)]
        assert found == [b"two", b"first", b"", None, None, None]
        assert all(value.readonly for value in found[:3])
    with pytest.raises(RuntimeError, match="of the caller"), images.reading():
        raise RuntimeError("of the caller")
    assert images.get("b") == b"two"
    images.close()


def test_damage_names_the_file_that_has_it(tmp_path):
    whole = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    broken = make_lmdb(tmp_path / "y.lmdb", {str(number): b"two" for number in range(1000)})
    pages = bytearray((broken / "data.mdb").read_bytes())
    for page in range(2 * 4096, len(pages), 4096):
        if pages[page + 10] == 2:  # flags of a leaf
            pages[page + 10] = 0
    (broken / "data.mdb").write_bytes(pages)
    images = open_images([whole, broken])
    with images.reading() as read:
        assert read("a") == b"one"
        with pytest.raises(DataError, match=r"y\.lmdb is damaged .*pack it again"):
            read("7")
    images.close()


def test_a_read_only_folder_stays_as_it_is(tmp_path):
    path = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    (path / "lock.mdb").unlink()
    (path / "data.mdb").chmod(0o444)
    path.chmod(0o555)
    images = open_images(path)
    assert images.get("a") == b"one"
    images.close()
    assert os.listdir(path) == ["data.mdb"]
    path.chmod(0o755)


def test_a_forbidden_lmdb_says_so(tmp_path):
    path = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    (path / "data.mdb").chmod(0)
    call = f"open_images(Path({str(path)!r}))"
    error = error_of(call, imports="from pathlib import Path\nfrom job.data.images import open_images")
    assert error.startswith("AccessError")
    assert "may not be read" in error


def _nothing(path: Path) -> None:
    pass


def _unfinished(path: Path) -> None:
    path.with_name(path.name + ".partial").mkdir()


def _folder_of_something_else(path: Path) -> None:
    path.mkdir()
    (path / "readme.txt").write_text("hello")


def _text(path: Path) -> None:
    path.write_text("path|tags\n" * 1000)


def _short(path: Path) -> None:
    path.write_bytes(b"")


def _empty(path: Path) -> None:
    make_lmdb(path, {})


def _cut(path: Path) -> None:
    make_lmdb(path, {f"{number}": bytes(5000) for number in range(100)})
    os.truncate(path / "data.mdb", 300_000)


def _cut_to_the_header(path: Path) -> None:
    make_lmdb(path, {"a": b"one"})
    os.truncate(path / "data.mdb", 8192)


def _other_version(path: Path) -> None:
    make_lmdb(path, {"a": b"one"})
    file = path / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in (0, 4096):
        data[page + 20] = 99
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "There is no LMDB .*--lmdb"),
        (_unfinished, "partly packed .*clipjob pack again"),
        (_folder_of_something_else, "no data.mdb.*readme.txt"),
        (_text, "is no LMDB.*clipjob pack"),
        (_short, "0 bytes and is no LMDB"),
        (_empty, "is empty"),
        (_cut, "cut short: data.mdb has 300000 bytes"),
        (_cut_to_the_header, "cut short"),
        (_other_version, "incompatible version|v99"),
    ],
)
def test_what_is_no_whole_lmdb_is_refused_when_it_is_opened(tmp_path, make, message):
    path = tmp_path / "x.lmdb"
    make(path)
    for _ in range(2):  # the second time shows that the first left nothing open
        with pytest.raises(DataError, match=message):
            open_images(path)


NAMES = ("animals/Café 1.jpg", "animals/two.jpg", "plants/three.jpg")


@pytest.mark.parametrize(
    ("in_lmdb", "in_csv", "sentence"),
    [
        (str, lambda key: unicodedata.normalize("NFD", key), "normalize the CSV to NFC"),
        (lambda key: unicodedata.normalize("NFD", key), str, "normalize the CSV to NFD"),
        (lambda key: "images/" + key, str, "add --key-prefix 'images/'"),
        (lambda key: "./" + key, str, "add --key-prefix './'"),
        (str, lambda key: "./" + key, "begin with './'"),
        (str, lambda key: "/data/set/" + key, "begin with '/data/set/', the LMDB's do not; remove it"),
        (lambda key: "a/" + key, lambda key: "b/c/" + key, "begin with 'b/c/', the LMDB's with 'a/'; replace it"),
        (str, lambda key: key.replace("/", "\\"), "backslashes where the LMDB's have slashes"),
        (lambda key: key.replace("/", "\\"), str, "slashes where the LMDB's have backslashes"),
        (str, lambda key: "D:\\set\\" + key.replace("/", "\\"), "begin with 'D:/set/', the LMDB's do not"),
        (str, lambda key: key.removesuffix(".jpg"), "end in '.jpg', the CSV's do not"),
        (lambda key: key.removesuffix(".jpg"), str, "no file extension"),
        (lambda key: key.replace(".jpg", ".webp"), str, "end in '.webp' where the CSV's end in '.jpg'"),
        (str.lower, str.upper, "in lower case"),
        (str, lambda key: key.replace(".jpg", ".JPG"), "extensions of the LMDB's keys are in lower case"),
        (str, lambda key: f" {key} ", "spaces around them"),
        (str, lambda key: key.replace("é", "%C3%A9").replace("two", "t%77o").replace("three", "th%72ee"), "percent-encoded"),
        (str, lambda key: key + "x" * 600, "more than 511 bytes"),
        (str, lambda key: key[::-1], "Check that the CSV and the LMDB belong together"),
    ],
)
def test_missing_keys_are_counted_named_and_explained(tmp_path, in_lmdb, in_csv, sentence):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {in_lmdb(key): b"x" for key in NAMES}))
    missing = match_keys(Column.of([in_csv(key) for key in NAMES] * 10), np.arange(30), images)
    images.close()
    absent = [in_csv(key) for key in NAMES if in_csv(key) not in {in_lmdb(name) for name in NAMES}]
    assert (missing.checked, missing.count, missing.examples) == (30, 10 * len(absent), tuple((absent * 5)[:5]))
    assert set(missing.present) == {in_lmdb(key) for key in NAMES}
    assert sentence in str(missing)


def test_a_limited_look_at_the_keys_is_evenly_spread(tmp_path):
    images = open_images(make_lmdb(tmp_path / "x.lmdb", {str(number): b"x" for number in range(500)}))
    keys = Column.of([str(number) for number in range(1000)])
    missing = match_keys(keys, np.arange(1000), images, limit=100)
    assert (missing.checked, missing.count) == (100, 50)
    assert match_keys(keys, np.arange(400), images) == match_keys(keys, np.arange(400), images, limit=400)
    assert match_keys(keys, np.arange(400), images).count == 0
    assert match_keys(keys, np.arange(400, 600), images).count == 100
    images.close()


def test_several_lmdbs_are_read_as_one(tmp_path):
    first = make_lmdb(tmp_path / "x.lmdb", {"a": b"one", "both": b"first"})
    second = make_lmdb(tmp_path / "y.mdb", {"b": b"two", "both": b"second", "c": b""}, subdir=False)
    images = open_images([first, second])
    assert (images.get("a"), images.get("b"), images.get("both"), images.get("c"), images.get("d")) == (
        b"one",
        b"two",
        b"first",
        b"",
        None,
    )
    assert [key in images for key in ("a", "b", "both", "d", "", "k" * 600)] == [True, True, True, False, False, False]
    assert len(images) == 5
    assert images.sample_keys(100) == ["a", "both", "b", "both", "c"]
    assert images.sample_keys(3) == ["a", "b", "c"]
    alone = [open_images(path) for path in (first, second)]
    assert images.fingerprint() == {name: sum(one.fingerprint()[name] for one in alone) for name in ("entries", "bytes")}
    assert images.file_bytes == sum(one.file_bytes for one in alone)
    assert images.path == first
    for one in [images, images, *alone]:
        one.close()


def test_a_single_path_and_a_list_of_one_are_the_same(tmp_path):
    path = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    plain, listed = open_images(path), open_images([path])
    assert plain.fingerprint() == listed.fingerprint()
    assert listed.get("a") == b"one"
    plain.close()
    listed.close()


def test_a_bad_shard_is_named_and_leaves_the_others_closed(tmp_path):
    good = make_lmdb(tmp_path / "x.lmdb", {"a": b"one"})
    for _ in range(2):
        with pytest.raises(DataError, match=r"There is no LMDB .*absent.lmdb"):
            open_images([good, tmp_path / "absent.lmdb"])
    shutil.rmtree(good)
    images = open_images(make_lmdb(good, {"a": b"other"}))
    assert images.get("a") == b"other"
    images.close()
