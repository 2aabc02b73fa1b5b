"""Outlines: drawn as pycocotools draws them, and refused before it could stumble over them."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO

from ezsd.data.masks import (
    REACH,
    decode,
    decompress,
    draw_in_frame,
    encode,
    pack,
    parse_outline,
    read_outlines,
    to_run_lengths,
    unpack,
)
from ezsd.errors import AnnotationError

HEIGHT, WIDTH = 40, 60
TRIANGLE = [5.5, 4.25, 30.5, 6, 12, 33.75]
HOLE = [10, 10, 14, 10, 14, 14, 10, 14]


def blob(seed, height=HEIGHT, width=WIDTH):
    rng = np.random.default_rng(seed)
    return rng.random((height, width)) < rng.random()


def runs(pixels):
    """Uncompressed run lengths, as crowds have them: column by column, the first run outside."""
    flat = np.concatenate([[0], pixels.ravel(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": list(pixels.shape), "counts": counts}


def write(folder, annotations):
    document = {
        "info": {"about": ["lists", {"within": []}]},
        "licenses": [],
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}],
    }
    path = folder / "a.json"
    path.write_text(json.dumps(document))
    return path


def annotation(number, segmentation, category=1):
    return {
        "id": number,
        "image_id": 7,
        "category_id": category,
        "bbox": [5, 4, 26, 30],
        "area": 1,
        "iscrowd": 0,
        "segmentation": segmentation,
    }


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_are_those_of_pycocotools(seed):
    pixels = blob(seed, height=HEIGHT + 40 * seed, width=WIDTH)
    compressed = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"]
    assert encode(pixels) == compressed
    plain = runs(pixels)
    assert decompress(compressed).tolist() == plain["counts"]
    for counts in (plain["counts"], compressed.decode()):
        found = parse_outline({"size": plain["size"], "counts": counts}, *pixels.shape)
        assert found == compressed
    assert np.array_equal(decode(compressed, *pixels.shape), pixels)


def test_outlines_of_a_file_are_drawn_as_pycocotools_draws_them(tmp_path):
    kinds = [[TRIANGLE], [TRIANGLE, HOLE], runs(blob(1)), {**runs(blob(2)), "counts": encode(blob(2)).decode()}]
    path = write(tmp_path, [annotation(10 - i, kind) for i, kind in enumerate(kinds)])
    found = dict(read_outlines(path, dict.fromkeys(range(20), (HEIGHT, WIDTH)), {1, 2}))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(path))
    assert list(found) == [10, 9, 8, 7]
    for number, outline in found.items():
        expected = theirs.annToRLE(theirs.anns[number])["counts"]
        expected = expected.encode() if isinstance(expected, str) else expected
        assert to_run_lengths(outline, HEIGHT, WIDTH) == expected
        # Floats of 32 bits hold these points exactly.
        assert to_run_lengths(unpack(pack(outline)), HEIGHT, WIDTH) == expected


def test_of_what_is_not_asked_for_nothing_is_looked_at(tmp_path):
    """Another class, a number that is not wanted, and the same number in another class."""
    path = write(
        tmp_path,
        [annotation(1, "novel", 2), annotation(2, "crowd"), annotation(3, 5, 2), annotation(3, [TRIANGLE]), "none"],
    )
    found = list(read_outlines(path, dict.fromkeys((1, 3), (HEIGHT, WIDTH)), {1}))
    assert [number for number, _ in found] == [3]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (None, "found nothing"),
        ([], "found nothing"),
        ("polygon", "found 'polygon'"),
        ([[1, 2, 3, 4]], "a ring"),
        ([[1, 2, 3, 4, 5]], "a ring"),
        ([TRIANGLE, [1, 2, 3, 4, 5, "6"]], "a point that is not a pair of numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a point that is not a pair of numbers"),
        ([[1, 2, 3, 4, 5, REACH + 1]], "a point that is not a pair of numbers"),
        ([[1, 2, 3, 4, 5, True]], "a point that is not a pair of numbers"),
        ({"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}, "40 x 60 (height, width)"),
        ({"size": [HEIGHT, WIDTH]}, "counts None"),
        ({"size": [HEIGHT, WIDTH], "counts": [7]}, "runs over 7 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, WIDTH * HEIGHT + 1]}, "counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5]}, "counts"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "runs over 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, "counts 'P'"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x07"}, "counts"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 20 + "0"}, "counts"),
        ({"size": [HEIGHT, WIDTH], "counts": "ä"}, "counts"),
    ],
)
def test_what_is_no_outline_is_refused_with_its_place(tmp_path, segmentation, words):
    path = write(tmp_path, [annotation(4, [TRIANGLE]), annotation(5, segmentation)])
    with pytest.raises(AnnotationError, match=r"annotations\[1\].segmentation: .*model.masks=false") as caught:
        list(read_outlines(path, dict.fromkeys((4, 5), (HEIGHT, WIDTH)), {1}))
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(AnnotationError, match="none.json: the file: expected a readable file"):
        list(read_outlines(tmp_path / "none.json", {}, set()))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(AnnotationError, match="a.json: the file: expected JSON in UTF-8"):
        list(read_outlines(tmp_path / "a.json", {}, set()))


def test_an_outline_fills_its_own_frame():
    square = [np.array([[10.0, 5], [30, 5], [30, 25], [10, 25]])]
    frame, drawn = draw_in_frame(square, HEIGHT, WIDTH, 16)
    assert frame.tolist() == [10, 5, 30, 25]
    assert drawn.all()
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    pixels[5:25, 10:30] = True
    pixels[5:15, 10:20] = False
    frame, drawn = draw_in_frame(encode(pixels), HEIGHT, WIDTH, 16)
    assert frame.tolist() == [10, 5, 30, 25]
    assert not drawn[:8, :8].any()
    assert drawn[8:].all()
    assert drawn[:, 8:].all()


def test_outlines_of_no_area_have_a_frame_with_an_area():
    line = [np.array([[10.0, 5], [30, 5], [20, 5]])]
    for outline in (line, encode(np.zeros((HEIGHT, WIDTH), dtype=np.bool_))):
        frame, drawn = draw_in_frame(outline, HEIGHT, WIDTH, 8)
        assert (frame[2:] > frame[:2]).all()
        assert not drawn.any()
