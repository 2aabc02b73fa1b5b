"""Captions that can be told apart, in any script, and colours that say what was trained with boxes."""

import logging
import shutil
from importlib.resources import as_file, files

import numpy as np
import pytest
import torch
from PIL import Image

from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference import fonts
from ezsd.pipeline.inference.detect import detect_images
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes


@pytest.fixture
def dejavu_alone(monkeypatch):
    """A machine without fonts, but for the one that comes with matplotlib."""
    monkeypatch.delenv(fonts.VARIABLE, raising=False)
    monkeypatch.setattr(fonts, "findSystemFonts", list)
    monkeypatch.setattr(fonts, "_warned", [])
    fonts._font_with.cache_clear()
    yield
    fonts._font_with.cache_clear()


def drawn(caption):
    grey = torch.full((3, 96, 256), 128, dtype=torch.uint8)
    return np.asarray(draw_boxes(grey, torch.tensor([[10.0, 40, 200, 90]]), [caption])).tobytes()


NAMES = (
    "jalapeño",
    "jalapeno",
    "é",
    "ü",
    "ß",
    "ł",
    "круг",
    "квас",
    "ш",
    "д",
    "α",
    "λ",
    "圆形",
    "方形",
    "日",
    "本",
    "원",
)


def test_names_that_differ_are_drawn_otherwise(dejavu_alone, caplog):
    pictures = {name: drawn(name) for name in NAMES}
    assert len(set(pictures.values())) == len(NAMES)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "'圆形'" in warnings[0]
    assert "EZSD_FONT" in warnings[0]


def test_latin_greek_and_cyrillic_need_no_font_of_the_machine(dejavu_alone, caplog):
    for name in NAMES[:12]:
        text, _ = fonts.font_for(name, 12.0)
        assert text == name
    assert fonts.font_for("圆 a", 12.0)[0] == "<U+5706> a"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_both_unicode_forms_of_a_name_are_drawn_alike(dejavu_alone):
    assert drawn("Br\u00f6tchen") == drawn("Bro\u0308tchen")


def test_the_font_of_the_environment_comes_first(dejavu_alone, monkeypatch, tmp_path):
    with as_file(files("matplotlib") / "mpl-data/fonts/ttf/DejaVuSerif.ttf") as serif:
        shutil.copy(serif, tmp_path / "own.ttf")
    sans = drawn("circle")
    monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "own.ttf"))
    assert drawn("circle") != sans
    (tmp_path / "none.ttf").write_text("no font")
    for name in ("none.ttf", "gone.ttf"):
        monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / name))
        with pytest.raises(ArgumentError, match=rf"EZSD_FONT=.*{name}: is not a font file"):
            drawn("circle")


def test_detect_draws_names_without_boxes_in_another_colour(shapes_run, shapes_root, tmp_path, dejavu_alone):
    image = shapes_root / "val/000001.png"
    for name, colour, other in (
        ("circle", BASE_COLOUR, NOVEL_COLOUR),
        ("red ring", NOVEL_COLOUR, BASE_COLOUR),
    ):
        place = tmp_path / f"{name}.png"
        options = {"threshold": 0.0, "device": "cpu", "drawn": [place], "overrides": ["eval.score_threshold=0"]}
        (seen,) = detect_images([image], shapes_run, [name], **options)
        assert seen.objects
        with Image.open(place) as picture:
            colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.convert("RGB").getcolors(10**6)}
        assert colour in colours
        assert other not in colours
