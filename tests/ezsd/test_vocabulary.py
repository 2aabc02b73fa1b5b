"""Names decide: splits, prompts and look-ups refuse what is doubled, unknown or empty."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezsd.errors import VocabularyError
from ezsd.vocabulary import COCO_SPLIT, Split, clean_names, parse_classes, prompts, resolve, spelt_as


def test_coco_split_has_48_base_and_17_novel_names():
    assert (len(COCO_SPLIT.base), len(COCO_SPLIT.novel), len(set(COCO_SPLIT.names))) == (48, 17, 65)
    assert COCO_SPLIT.names[:2] == ("person", "bicycle")
    assert COCO_SPLIT.names[48:50] == ("airplane", "bus")


def test_class_indices_are_base_then_novel():
    split = Split(base=("cat", "dog"), novel=("cow",))
    assert [split.index(name) for name in ("cat", "dog", "cow")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("base", "novel", "message"),
    [
        ((), ("cow",), "at least one base"),
        (("cat", "cat"), (), "'cat' occurs twice"),
        (("cat",), ("cow", "cow"), "'cow' occurs twice"),
        (("cat", "cow"), ("cow",), "'cow' is base and novel"),
        (("cat", " "), (), "position 1 is empty"),
        ("cat", (), "base must be a tuple"),
        (("cat",), ["cow"], "novel must be a tuple"),
        (("cat", 3), (), "base must be a tuple"),
    ],
)
def test_a_wrong_split_is_refused(base, novel, message):
    with pytest.raises(VocabularyError, match=message):
        Split(base=base, novel=novel)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(VocabularyError, match="unknown class 'zebar'; did you mean 'zebra'"):
        COCO_SPLIT.index("zebar")
    with pytest.raises(VocabularyError, match="did you mean 'tv'"):
        COCO_SPLIT.index("TV")


def test_a_name_like_no_other_shows_the_table():
    with pytest.raises(VocabularyError, match="known are 'cat', 'dog'"):
        resolve(["xylophone"], ["cat", "dog"])


def test_resolve_keeps_the_wanted_order_and_refuses_doubles():
    assert resolve(["cow", "cat"], ["cat", "dog", "cow"]) == (2, 0)
    with pytest.raises(VocabularyError, match="'cat' occurs twice"):
        resolve(["cat", "cat"], ["cat"])
    with pytest.raises(VocabularyError, match="'cat' occurs twice"):
        resolve(["cat"], ["cat", "cat"])


def test_prompts_fill_the_template_literally():
    assert prompts(["cat"]) == ("a photo of a cat",)
    assert prompts(["{odd}"], "{a} {} {b}") == ("{a} {odd} {b}",)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_prompts_need_one_place_for_the_name(template):
    with pytest.raises(VocabularyError, match="once, where the name goes"):
        prompts(["cat"], template)


@given(st.lists(st.text("abc -", min_size=1).map(str.strip).filter(bool), min_size=1, unique=True))
def test_parse_classes_reads_what_was_joined(names):
    assert parse_classes(" , ".join(names)) == tuple(names)


@pytest.mark.parametrize("text", ["", " ", "cat,", "cat,,dog"])
def test_parse_classes_refuses_empty_names(text):
    with pytest.raises(VocabularyError, match="empty name"):
        parse_classes(text)


def test_parse_classes_refuses_doubles():
    with pytest.raises(VocabularyError, match="'cat' occurs twice"):
        parse_classes("cat, dog, cat")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"tench, Tinca tinca",square', ("tench, Tinca tinca", "square")),
        ('cat , "a ""b"" c"', ("cat", 'a "b" c')),
        ('5" pipe,a\\', ('5" pipe', "a\\")),
        ('"a;b"', ("a;b",)),
        ("a;b,c", ("a;b", "c")),
        ("cafe\u0301", ("caf\u00e9",)),
        ("圆形,نمونه\u200cها", ("圆形", "نمونه\u200cها")),
    ],
)
def test_quotes_make_a_comma_part_of_a_name(text, names):
    assert parse_classes(text) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"tench, Tinca tinca', "double quotes must enclose a whole name"),
        ('"tench" tinca,cat', "double quotes must enclose a whole name"),
        ("cat;dog", "one name with a semicolon; put commas"),
        ("cat\ndog", "a line break"),
        ("cat\u2028dog", "a line break"),
        ("cat,\tdog", "a control character"),
        ("cat\udcffdog", "a byte that is not UTF-8"),
        ('cat,"",dog', "an empty name"),
        ("caf\u00e9,cafe\u0301", "occurs twice"),
    ],
)
def test_what_no_list_of_names_is_is_refused(text, words):
    with pytest.raises(VocabularyError, match=words) as caught:
        parse_classes(text)
    assert "\n" not in str(caught.value)


def test_names_compare_in_one_unicode_form():
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert resolve([composed], ["tea", apart]) == (1,)
    assert spelt_as([composed, "tea\u0301"], [apart]) == (apart, "te\u00e1")
    for base, novel in (((composed,), (apart,)), ((composed, apart), ())):
        with pytest.raises(VocabularyError, match="at once|occurs twice"):
            Split(base=base, novel=novel)


def test_names_are_said_without_underscores_and_remarks():
    names = ["aerosol_can", "bat_(animal)", "speaker_(stero_equipment)", "bow_(weapon)", "fish", "fish_(food)", "(odd)"]
    said = ("aerosol can", "bat", "speaker", "bow (weapon)", "fish", "fish (food)", "(odd)")
    assert clean_names(names) == said


def test_the_names_of_lvis_are_said_in_1203_ways():
    folder = os.environ.get("EZSD_CONSE")
    if not folder:
        pytest.skip("EZSD_CONSE names no folder beside which LVIS's names lie")
    known = json.loads((Path(folder).parent / "data/conse/lvis_v1_train_cat_info.json").read_text())
    said = clean_names([category["name"] for category in known])
    assert len(set(said)) == 1203
    assert not any("_" in words for words in said)


def test_two_names_said_alike_are_refused():
    with pytest.raises(VocabularyError, match="'bat' and 'bat_\\(animal\\)' are both said 'bat'"):
        clean_names(["bat", "bat_(animal)"])
