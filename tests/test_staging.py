"""Remote files are copied to scratch once; a wrong copy is never used."""

from pathlib import Path

import pytest
import tiny

from job.data.images import open_images
from job.data.staging import stage_file, stage_lmdb
from job.errors import DataError
from job.storage import files


def test_a_local_path_is_used_where_it_is(tmp_path: Path) -> None:
    assert stage_file(str(tmp_path / "a.csv"), tmp_path / "scratch", flag="--csv") == tmp_path / "a.csv"
    assert not (tmp_path / "scratch").exists()


def test_a_remote_file_is_copied_once(s3_uri: str, tmp_path: Path) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, b"path|tags\na|b\n")
    local = stage_file(uri, tmp_path, flag="--csv")
    assert local.read_bytes() == b"path|tags\na|b\n"
    before = local.stat().st_mtime_ns
    assert stage_file(uri, tmp_path, flag="--csv") == local
    assert local.stat().st_mtime_ns == before


def test_a_replaced_object_is_a_new_copy(s3_uri: str, tmp_path: Path) -> None:
    uri = files.join(s3_uri, "data.csv")
    files.write_bytes(uri, b"old")
    old = stage_file(uri, tmp_path, flag="--csv")
    files.write_bytes(uri, b"new content")
    assert stage_file(uri, tmp_path, flag="--csv").read_bytes() == b"new content"
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_an_lmdb_is_found_as_a_folder_and_as_a_file(s3_uri: str, tmp_path: Path, layout: str) -> None:
    made = tiny.write_lmdb(tmp_path / "made.lmdb", {"a.jpg": tiny.picture(1)})
    uri = files.join(s3_uri, f"{layout[0]}.lmdb")
    files.upload(made / "data.mdb", files.join(uri, "data.mdb") if layout == "folder" else uri)
    images = open_images(stage_lmdb(uri, tmp_path / "scratch", flag="--lmdb"))
    assert images.get("a.jpg") == tiny.picture(1)
    images.close()


def test_a_missing_object_names_the_flag(s3_uri: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no .*absent\.csv.*--csv"):
        stage_file(files.join(s3_uri, "absent.csv"), tmp_path, flag="--csv")
