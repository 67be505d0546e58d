"""Where archives are found, by name, by path, or all of them."""

import pytest
from detserve.errors import DetserveError
from detserve.model_store import find_archive, stored_archives


def test_every_archive_of_the_store_by_file_name(tmp_path):
    for name in ("b.mar", "a.mar", "b-2.0.mar", "a.yaml"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.mar").mkdir()
    assert [path.name for path in stored_archives(tmp_path)] == ["a.mar", "b-2.0.mar", "b.mar"]
    assert find_archive("a", tmp_path) == stored_archives(tmp_path)[0]


def test_a_store_without_archives_says_so(tmp_path):
    with pytest.raises(DetserveError, match=r"no archive in it.*detserve archive.*--model-store"):
        stored_archives(tmp_path)
    with pytest.raises(DetserveError, match="no such folder"):
        stored_archives(tmp_path / "missing")
