"""Numbers and their nouns in what is said to users."""

import pytest

from ezsd.errors import inflected, quantity


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((0, "image"), "0 images"),
        ((1, "image"), "1 image"),
        ((2, "image"), "2 images"),
        ((1, "box", "boxes"), "1 box"),
        ((12345, "box", "boxes"), "12,345 boxes"),
        ((1, "file is", "files are"), "1 file is"),
        ((3, "file is", "files are"), "3 files are"),
    ],
)
def test_a_number_has_the_noun_that_goes_with_it(words, said):
    assert quantity(*words) == said


def test_so_has_a_verb():
    assert [inflected(count, "was", "were") for count in (0, 1, 2)] == ["were", "was", "were"]
