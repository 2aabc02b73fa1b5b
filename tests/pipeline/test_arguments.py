"""Class names of a command line: one grammar for every option that takes them."""

from pathlib import Path

import pytest

from ezsd.errors import VocabularyError
from ezsd.pipeline.console.arguments import class_names, find_sources, picture_places
from ezsd.pipeline.data.split import chosen_split
from ezsd.pipeline.errors import ArgumentError


def test_names_come_as_they_stand_from_lists_and_from_files(tmp_path):
    (tmp_path / "names.txt").write_bytes('\ufeff# mine\r\n\r\n圆形\r\n  tench, Tinca tinca \r\n"q"\r\n'.encode())
    found = class_names(
        "--classes", literal=["a, b", "#1"], lists=["cat,dog", '"x, y"'], files=[tmp_path / "names.txt"]
    )
    assert found == ("a, b", "#1", "cat", "dog", "x, y", "圆形", "tench, Tinca tinca", '"q"')
    assert class_names("--classes") is None


def test_a_file_is_no_name_of_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("cat")
    Path("dog").mkdir()
    for text in ("names.txt", "cat,names.txt"):
        with pytest.raises(ArgumentError, match=r"names.txt'? ?:? is a file; give it to --classes-file"):
            class_names("--classes", lists=[text])
    # The way out for whoever means it, and a folder of that name harms nobody.
    assert class_names("--classes", literal=["names.txt"], lists=["dog"]) == ("names.txt", "dog")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no class name"),
        (b"# only\n\n", "holds no class name"),
        ("cat\nKäse".encode("latin-1"), "is not UTF-8 text"),
        (b"cat\n1\tdog\n", "line 2: .*a control character"),
        (b"cat\ndog\ncat\n", "'cat' occurs twice"),
    ],
)
def test_a_file_of_names_that_is_not_in_order_is_named(tmp_path, content, words):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises((ArgumentError, VocabularyError), match=words) as caught:
        class_names("--novel", files=[tmp_path / "names.txt"])
    assert "--novel" in str(caught.value)


def test_a_missing_file_of_names_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="--base-file .*none.txt: cannot be read: No such file"):
        class_names("--base", files=[tmp_path / "none.txt"])


def test_a_name_given_twice_in_two_ways_is_refused():
    with pytest.raises(VocabularyError, match="--classes: class 'cat' occurs twice"):
        class_names("--classes", literal=["cat"], lists=["dog,cat"])
    with pytest.raises(VocabularyError, match="--class: the name is empty"):
        class_names("--classes", literal=[" "])
    with pytest.raises(VocabularyError, match="a line break .*one name a line goes to --classes-file"):
        class_names("--classes", lists=["cat\ndog"])


def test_a_split_is_chosen_in_any_unicode_form_and_spelt_as_the_file_does(tmp_path):
    names = ["cafe\u0301", "tea"]
    options = {"frequency": {}, "where": tmp_path, "base": None, "split_file": None}
    split = chosen_split(names, **options, novel=("caf\u00e9",))
    assert (split.base, split.novel) == (("tea",), ("cafe\u0301",))
    (tmp_path / "split.toml").write_text('base = ["tea"]\nnovel = ["caf\u00e9"]\n', encoding="utf-8")
    options["split_file"] = tmp_path / "split.toml"
    assert chosen_split(names, **options, novel=None) == split


def test_a_url_is_taken_as_it_is_and_a_pattern_is_expanded(shapes_root):
    val = shapes_root / "val"
    assert find_sources([f"{val}/00000[12].png"]) == [val / "000001.png", val / "000002.png"]
    with pytest.raises(ArgumentError, match=r"no\*.png: no file matches this pattern"):
        find_sources([f"{val}/no*.png"])
    for url in ("https://example.com/a.jpg", "file:///a.jpg"):
        assert find_sources([url]) == [url]


def test_a_file_with_the_letters_of_a_pattern_is_a_file(shapes_root, tmp_path):
    image = tmp_path / "a[1].png"
    image.write_bytes((shapes_root / "val/000001.png").read_bytes())
    assert find_sources([str(image)]) == [image]


def test_what_ends_in_a_slash_is_a_folder(tmp_path):
    image = tmp_path / "a.png"
    assert picture_places([image], f"{tmp_path}/out/", alone=True) == [tmp_path / "out/a.png"]
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ArgumentError, match="is a file; a slash means a folder"):
        picture_places([image], f"{tmp_path}/file.png/", alone=True)
