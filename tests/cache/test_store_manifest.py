"""Canonical form, digest and comparison of manifests."""

import hashlib
import json

import pytest

from cache import Manifest, StoreError, canonical_json


def test_the_digest_is_that_of_sorted_compact_unescaped_json():
    manifest = Manifest({"b": [1, 2.5, None, True], "a": {"é": "ü", "A": 'q"'}})
    assert manifest.digest == hashlib.sha256('{"a":{"A":"q\\"","é":"ü"},"b":[1,2.5,null,true]}'.encode()).hexdigest()


def test_the_order_of_keys_and_the_kind_of_sequence_do_not_matter():
    assert Manifest({"a": 1, "b": (1, 2)}) == Manifest({"b": [1, 2], "a": 1})
    assert hash(Manifest({"a": 1})) == hash(Manifest({"a": 1}))


def test_json_brings_back_an_equal_manifest():
    manifest = Manifest({"a": {"x": 0.1, "y": [1e-9, -3]}, "b": "ß\n"})
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.fields == manifest.fields


def test_a_later_change_of_the_argument_changes_nothing():
    fields = {"a": [1]}
    manifest = Manifest(fields)
    fields["a"].append(2)
    assert manifest.fields == {"a": [1]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": {"b": float("nan")}}, "manifest.a.b: nan is not a finite number"),
        ({"a": [0, float("inf")]}, r"manifest.a\[1\]: inf is not"),
        ({"a": {3: 1}}, "manifest.a: the key 3 is not text"),
        ({"a": {1, 2}}, "manifest.a: a set is not JSON"),
        ({"a": "\ud800"}, "manifest.a: the text .* cannot be written as UTF-8"),
        ([1], "manifest: expected an object of named values, found list"),
    ],
)
def test_what_is_not_json_is_refused_by_its_dotted_name(fields, message):
    with pytest.raises(StoreError, match=message):
        Manifest(fields)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', b"\xff"])
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(StoreError, match="here"):
        Manifest.from_json(text, "here")


@pytest.mark.parametrize(
    ("store", "wanted", "lines"),
    [
        ({"a": {"b": 0.7}}, {"a": {"b": 0.5}}, ["a.b: store has 0.7, wanted 0.5"]),
        ({"a": 1}, {}, ["a: store has 1, wanted has no such entry"]),
        ({}, {"a": None}, ["a: store has no such entry, wanted null"]),
        ({"a": 1}, {"a": 1.0}, ["a: store has 1, wanted 1.0"]),
        ({"a": True}, {"a": 1}, ["a: store has true, wanted 1"]),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, ["a[1]: store has 2, wanted 5"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a: store has [1,2], wanted [1]"]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, ["a[0].b: store has 1, wanted 2"]),
        ({"a": {"b": 1}}, {"a": 2}, ['a: store has {"b":1}, wanted 2']),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a: store has 1, wanted 2", "b: store has 1, wanted 2"]),
    ],
)
def test_differences_are_named_with_both_values(store, wanted, lines):
    assert Manifest(store).differences(Manifest(wanted)) == lines
    assert Manifest(store).differences(Manifest(store)) == []


def test_long_values_and_many_differences_are_shortened():
    lines = Manifest({"a": list(range(1000)), "b": "x" * 1000}).differences(
        Manifest({"a": list(range(1, 1001)), "b": list(range(1000))})
    )
    assert lines[:2] == ["a[0]: store has 0, wanted 1", "a[1]: store has 1, wanted 2"]
    assert lines[3] == "a: 997 more differences in this list of 1000"
    assert lines[4].startswith('b: store has "xxx')
    assert lines[4].endswith("(1000 items)")
    assert len(lines[4]) < 200


def test_canonical_json_reads_back_as_the_same_value():
    value = {"é": [0.1, 1e300, -0.0, 10**30], "a": '\u2028\t"\\'}
    assert json.loads(canonical_json(value)) == value
