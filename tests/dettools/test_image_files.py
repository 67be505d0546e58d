"""What the command line names as images, and the names of what is written about them."""

from pathlib import Path

import pytest
from dettools.image_files import ImageInputError, find_images, unique_stems


@pytest.fixture
def photos(tmp_path, monkeypatch):
    for name in ("a/dog.jpg", "a/cat.PNG", "b/dog.jpg", "b/deep/dog.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_and_patterns(photos):
    assert find_images(["b/dog.jpg", "a"]) == [Path("b/dog.jpg"), Path("a/cat.PNG"), Path("a/dog.jpg")]
    assert find_images(["b"]) == [Path("b/deep/dog.png"), Path("b/dog.jpg")]
    assert find_images(["*/dog.*"]) == [Path("a/dog.jpg"), Path("b/dog.jpg")]
    assert find_images([f"{photos}/**/*.png"]) == [photos / "b/deep/dog.png"]


def test_each_file_once(photos):
    assert find_images(["a/dog.jpg", "a", str(photos / "a" / "dog.jpg")]) == [Path("a/dog.jpg"), Path("a/cat.PNG")]


def test_a_file_named_by_itself_may_have_any_suffix(photos):
    assert find_images(["b/notes.txt"]) == [Path("b/notes.txt")]


@pytest.mark.parametrize("missing", ["none.jpg", "empty", "*.webp"])
def test_what_names_nothing_is_named(photos, missing):
    (photos / "empty").mkdir()
    with pytest.raises(ImageInputError, match=f"got '{missing[0]}?"):
        find_images(["a/dog.jpg", missing])


def test_the_same_name_in_two_folders_does_not_overwrite(photos):
    stems = unique_stems(find_images(["a", "b"]))
    assert list(stems.values()) == ["cat", "a__dog", "dog_png", "b__dog"]


def test_names_that_differ_by_case_only_are_two_names(photos):
    paths = [Path("a/dog.jpg"), Path("b/DOG.jpg"), Path("a/dog.JPG"), Path("a/dog_jpg.jpg"), Path("a__dog.jpg")]
    stems = unique_stems(paths)
    assert len({stem.casefold() for stem in stems.values()}) == len(paths)


def test_no_images_no_names():
    assert unique_stems([]) == {}
