import codecs
import gzip
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unprivileged import error_of

from job.data.manifest import Column, Manifest, read_manifest, split_rows
from job.errors import ConfigError, DataError

OPENMOJI = Path(__file__).parent.parent / "job" / "demo" / "openmoji" / "data.csv"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(manifest: Manifest) -> list[tuple[str, str]]:
    return list(zip(manifest.keys, manifest.captions, strict=True))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_column_gives_back_the_texts_it_was_made_of(texts):
    column = Column.of(texts)
    assert len(column) == len(texts)
    assert list(column) == texts
    assert [column[row] for row in range(len(column))] == texts
    assert column.byte_lengths().tolist() == [len(text.encode()) for text in texts]


def test_a_column_refuses_rows_that_it_does_not_have():
    column = Column.of(["a", "b"])
    for row in (-1, 2):
        with pytest.raises(IndexError, match="column of 2"):
            column[row]


def test_the_demo_data_is_read():
    manifest = read_manifest(OPENMOJI)
    assert (len(manifest), manifest.separator, manifest.image_column, manifest.caption_column) == (2465, "|", "path", "tags")
    assert manifest.keys[0] == "openmoji/1F600.png"
    assert manifest.captions[0].startswith("grinning face, cheerful, ")
    assert manifest.sha256 == hashlib.sha256(OPENMOJI.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        ("path|tags\na.jpg|cat, dog; bird\n", "|", [("a.jpg", "cat, dog; bird")]),
        ("filepath\ttitle\na.jpg\ta, b | c\n", "\t", [("a.jpg", "a, b | c")]),
        ("image,caption\na.jpg,cat\n", ",", [("a.jpg", "cat")]),
        ('image,caption\na.jpg,"cat, dog"\n', ",", [("a.jpg", "cat, dog")]),
        ("Image;Caption\na.jpg;cat, dog\n", ";", [("a.jpg", "cat, dog")]),
        ("id,split,TITLE,FilePath\n1,train,cat,a.jpg\n", ",", [("a.jpg", "cat")]),
        ("\ufeffpath|tags\r\na.jpg|cat\r\nb.jpg|dog", "|", [("a.jpg", "cat"), ("b.jpg", "dog")]),
        (' path | tags \n"a.jpg"|"cat"\n', "|", [("a.jpg", "cat")]),
        ("path|tags\n\na.jpg|cat\n  \n\nb.jpg|dog\n\n", "|", [("a.jpg", "cat"), ("b.jpg", "dog")]),
        ("path|tags\na.jpg|\n", "|", [("a.jpg", "")]),
        ("path|tags\nNA|null\n001|1.0\n", "|", [("NA", "null"), ("001", "1.0")]),
        ("path|tags\nКот.jpg|кошка 猫 🐈\n", "|", [("Кот.jpg", "кошка 猫 🐈")]),
    ],
)
def test_separator_and_columns_are_found(tmp_path, content, separator, expected):
    manifest = read_manifest(written(tmp_path, content))
    assert manifest.separator == separator
    assert pairs(manifest) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('a.jpg|5" screen\nb.jpg|6" screen\n', ['5" screen', '6" screen']),
        ('a.jpg|"big\nb.jpg|small\n', ['"big', "small"]),
        ('a.jpg|"Mona Lisa" poster\nb.jpg|dog\n', ['"Mona Lisa" poster', "dog"]),
        ('a.jpg|"big\nb.jpg|5"\n', ['"big', '5"']),
        ('a.jpg|"big"\nb.jpg|"small"\n', ["big", "small"]),
        ('a.jpg|"5"" screen"\nb.jpg|dog\n', ['5" screen', "dog"]),
        ('a.jpg|"cat|dog"\nb.jpg|5" screen\n', ["cat|dog", '5" screen']),
        ('a.jpg|"cat\nand dog"\nb.jpg|dog\n', ["cat\nand dog", "dog"]),
        ('a.jpg|"cat\r\n\r\nand ""dog"""\r\nb.jpg|dog\r\n', ['cat\r\n\r\nand "dog"', "dog"]),
    ],
)
def test_quotes_enclose_fields_only_where_they_evidently_do(tmp_path, rows, expected):
    assert list(read_manifest(written(tmp_path, "path|tags\n" + rows)).captions) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('path|tags\na.jpg|"x|y"\nb.jpg|"big\nc.jpg|dog\nd.jpg|5"\n', r"line 3: a quote .* 'c.jpg\|dog'"),
        ('path|tags\na.jpg|"x|y"\nb.jpg|"big\nc.jpg|dog\n', r"line 3: .*unexpected end"),
        ('path|tags\na.jpg|"x|y"\nb.jpg|"Mona" Lisa\n', r"line 3: .*expected after"),
        ('tags,path\n"x,y",a.jpg\n"big,b.jpg\ndog",c.jpg\n', r"line 3: a quote .* 'big,b.jpg'"),
        ('path|tags\na.jpg|"x|y"\nb.jpg|"big\n' + "c\n" * 80_000, r"line 3: a field of more than 131072 characters"),
    ],
)
def test_a_quote_left_open_never_swallows_rows(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_manifest(written(tmp_path, content))


text_cells = st.text(st.sampled_from('ab|", \n;é'), max_size=8)


@given(st.lists(st.tuples(st.integers(0, 99).map("k{}.jpg".format), text_cells), min_size=1, max_size=8))
def test_what_pandas_writes_is_read_back_or_refused_but_never_altered(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("pandas") / "data.csv"
    pd.DataFrame(rows, columns=["path", "tags"]).to_csv(path, sep="|", index=False)
    try:
        assert pairs(read_manifest(path)) == rows
    except DataError:
        assert any("\n" in caption and "|" in caption for _, caption in rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("\ufeff\n \n", ["is empty"]),
        ("path|tags\n", ["path, tags", "no rows"]),
        ("foo|bar\na|b\n", ["'foo', 'bar'", "--image-column", "--caption-column", "--csv-separator"]),
        ("path|bar\na|b\n", ["no column of captions", "'path', 'bar'"]),
        ("a.jpg|cat\nb.jpg|dog\n", ["'a.jpg', 'cat'", "path|tags above it"]),
        ("path:tags\na:b\n", ["'path:tags'", "--csv-separator"]),
        ("path|tags|tags\na|b|c\n", ["several columns named 'tags'"]),
        ("path|tags\na|b\nc\n", ["line 3", "1 fields", "first line has 2", "'c'"]),
        ("path|tags\na|b\n\nc|d|e\n", ["line 4", "3 fields"]),
        ("path|tags\na|b|\n", ["line 2", "3 fields"]),
        ("path|tags\na|b\n|d\n", ["line 3", "no image key"]),
        ("path|tags\na|b\nc|d\0e\n", ["line 3", "NUL"]),
        (b"path|tags\na|b\nc|caf\xe9 noir\n", ["line 3", "0xe9", "iconv"]),
        (b"path|tags\na|b\nc|caf\xc3", ["line 3", "0xc3"]),
        (codecs.BOM_UTF16_LE + "path|tags\na|b\n".encode("utf-16-le"), ["UTF-16", "iconv"]),
        ("path|tags\na|b\n".encode("utf-16-be"), ["line 1", "UTF-16"]),
        (gzip.compress(b"path|tags\na|b\n", mtime=0), ["gzip", "gunzip"]),
        (b"PK\x03\x04rest", ["Excel"]),
        (b"PAR1rest", ["Parquet", "to_csv"]),
    ],
)
def test_a_damaged_csv_is_refused_with_what_where_and_what_to_do(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_bytes_across_the_blocks_of_a_large_file_are_placed_in_their_line(tmp_path):
    line = b"a.jpg|" + b"x" * 93 + b"\n"
    good = b"path|tags\n" + line * 100_000
    assert len(read_manifest(written(tmp_path, good + "a.jpg|é\n".encode()))) == 100_001
    with pytest.raises(DataError, match="line 100002: byte 0xff"):
        read_manifest(written(tmp_path, good + b"a.jpg|\xff\n"))


def test_a_character_on_the_border_of_two_blocks_is_no_error(tmp_path):
    head = b"path|tags\na.jpg|"
    content = head + b"x" * 100_000 + b"\n"
    content += b"b.jpg|y\n" * (((8 << 20) - len(content)) // 8)
    content = content[:-1] + b"z" * ((8 << 20) - 1 - len(content)) + "é\n".encode()
    assert content[(8 << 20) - 1 : (8 << 20) + 1] == "é".encode() or len(content) > 8 << 20
    assert read_manifest(written(tmp_path, content)).captions[len(read_manifest(tmp_path / "data.csv")) - 1].endswith("é")


def test_missing_files_folders_and_forbidden_files_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_manifest(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_manifest(tmp_path)
    path = written(tmp_path, "path|tags\na|b\n")
    path.chmod(0)
    call = f"read_manifest(Path({str(path)!r}))"
    error = error_of(call, imports="from pathlib import Path\nfrom job.data.manifest import read_manifest")
    assert error.startswith("AccessError")
    assert "may not be read" in error


def test_separator_and_columns_may_be_given(tmp_path):
    path = written(tmp_path, "path\tother\ttags\tWords\na\tb\tc\td\n")
    manifest = read_manifest(path, separator="tab", image_column="other", caption_column="words", key_prefix="x/")
    assert pairs(manifest) == [("x/b", "d")]
    assert (manifest.separator, manifest.image_column, manifest.caption_column) == ("\t", "other", "Words")
    again = read_manifest(path, separator=manifest.separator, image_column="other", caption_column="Words", key_prefix="x/")
    assert pairs(again) == pairs(manifest)


def test_a_given_column_that_is_missing_is_named_with_those_that_exist(tmp_path):
    path = written(tmp_path, "path|tags\na|b\n")
    with pytest.raises(DataError, match=r"captions named 'title'.*'path', 'tags'"):
        read_manifest(path, caption_column="title")
    with pytest.raises(ConfigError, match="both mean the column"):
        read_manifest(path, image_column="tags", caption_column="tags")


@pytest.mark.parametrize("separator", ["", "||", '"', "\n"])
def test_a_separator_is_one_character(tmp_path, separator):
    with pytest.raises(ConfigError, match="--csv-separator"):
        read_manifest(written(tmp_path, "path|tags\na|b\n"), separator=separator)


def test_the_split_is_by_sha256_of_the_key():
    keys = Column.of([f"{number}.jpg" for number in range(5000)])
    training, held_out = split_rows(keys, 0.1)
    heads = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    assert held_out.tolist() == [row for row, head in enumerate(heads) if head / 2**64 < 0.1]
    assert training.tolist() == sorted(set(range(5000)) - set(held_out.tolist()))
    assert training.dtype == held_out.dtype == np.int64
    assert 400 < len(held_out) < 600


def test_rows_of_one_image_go_to_one_side_whatever_their_order():
    names = [f"{number % 200}.jpg" for number in range(1000)]
    held_out = {names[row] for row in split_rows(Column.of(names), 0.3)[1]}
    assert held_out.isdisjoint(names[row] for row in split_rows(Column.of(names), 0.3)[0])
    assert held_out == {names[::-1][row] for row in split_rows(Column.of(names[::-1]), 0.3)[1]}


def test_a_larger_fraction_only_adds_held_out_rows():
    keys = Column.of([str(number) for number in range(1000)])
    parts = [set(split_rows(keys, fraction)[1].tolist()) for fraction in (0, 0.1, 0.5, 1)]
    assert parts[0] == set()
    assert parts[0] < parts[1] < parts[2] < parts[3] == set(range(1000))


def test_400_thousand_rows_are_read_and_split_fast_and_in_little_memory(tmp_path):
    path = tmp_path / "data.csv"
    with path.open("w") as file:
        file.write("path|tags\n")
        file.writelines(f"images/train/{row:027d}.jpg|{'caption of eighty bytes, ' * 4:.80}\n" for row in range(400_000))
    program = (
        "import sys, time, pathlib; from job.data.manifest import read_manifest, split_rows; begin = time.monotonic();"
        "manifest = read_manifest(pathlib.Path(sys.argv[1])); split_rows(manifest.keys, 0.05);"
        "seconds = time.monotonic() - begin;"
        # not ru_maxrss, which a process takes over from the one that started it
        "status = pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0];"
        "print(len(manifest), seconds, int(status) * 1024)"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True, cwd=OPENMOJI.parents[3]
    )
    rows, seconds, peak_bytes = done.stdout.split()
    assert int(rows) == 400_000
    assert float(seconds) < 12, f"1.4 s on an idle core; the process took {time.monotonic() - begin:.1f} s"
    assert int(peak_bytes) < 250e6  # 140 MB; ten million rows: 1.54 GB
