"""Canonical form, digest and comparison of manifests."""

import hashlib
import json

import pytest
import storekit

from ezsd.cache import Manifest, Origin, StoreError, canonical_json, differences


def test_the_digest_is_that_of_sorted_compact_unescaped_json():
    fields = storekit.manifest(text={"é": ["ü", None, 2.5]}).fields
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert storekit.manifest(text={"é": ["ü", None, 2.5]}).digest == hashlib.sha256(text.encode()).hexdigest()


def test_the_order_of_keys_and_the_kind_of_sequence_do_not_matter():
    assert Origin(1, {"a": 1, "b": (1, 2)}) == Origin(1, {"b": [1, 2], "a": 1})
    assert hash(storekit.manifest()) == hash(storekit.manifest())


def test_json_brings_back_an_equal_manifest():
    manifest = storekit.manifest(text={"x": 0.1, "y": [1e-9, -3], "b": "ß\n"}, embedding="int8")
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.fields == manifest.fields
    assert again.fingerprints == manifest.fingerprints


def test_a_later_change_of_the_argument_changes_nothing():
    inputs = {"a": [1]}
    origin = Origin(1, inputs)
    inputs["a"].append(2)
    assert origin.inputs == {"a": [1]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": {"b": float("nan")}}, "inputs.a.b: nan is not a finite number"),
        ({"a": [0, float("inf")]}, r"inputs.a\[1\]: inf is not"),
        ({"a": {3: 1}}, "inputs.a: the key 3 is not text"),
        ({"a": {1, 2}}, "inputs.a: a set is not JSON"),
        ({"a": "\ud800"}, "inputs.a: the text .* cannot be written as UTF-8"),
        ([1], "inputs: expected an object of named values, found list"),
    ],
)
def test_what_is_not_json_is_refused_by_its_dotted_name(inputs, message):
    with pytest.raises(StoreError, match=message):
        Origin(1, inputs)


@pytest.mark.parametrize("version", [0, "1", True, 1.0])
def test_a_version_is_a_whole_number(version):
    with pytest.raises(StoreError, match="version: expected a whole number from 1"):
        Origin(version, {})


def test_products_are_all_there_and_need_only_earlier_ones():
    products = dict(storekit.manifest().products)
    with pytest.raises(StoreError, match="teacher cannot need text; products are made as teacher, text, proposals"):
        Manifest({**products, "teacher": Origin(1, {}, ("text",))}, "")
    with pytest.raises(StoreError, match="regions cannot need colours"):
        Manifest({**products, "regions": Origin(1, {}, ("colours",))}, "")
    products.pop("text")
    with pytest.raises(StoreError, match="manifest: expected the products teacher, text, "):
        Manifest(products, "")
    with pytest.raises(StoreError, match="embedding 'float8' is not one of float16, int8"):
        storekit.manifest(embedding="float8")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', b"\xff", "{}", '{"format_version": 2}'])
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(StoreError, match="here"):
        Manifest.from_json(text, "here")


def changed(before, after):
    return {name for name in before.products if before.fingerprints[name] != after.fingerprints[name]}


@pytest.mark.parametrize("base", [{}, {"proposer": storekit.PROPOSER}])
@pytest.mark.parametrize(
    ("change", "products"),
    [
        ({"teacher": {"seed": 4}}, {"teacher", "text", "proposals", "regions", "ground_truth"}),
        ({"text": {"names": ["ring"]}}, {"text", "proposals", "regions"}),
        ({"proposals": {"nms_iou": 0.5}}, {"proposals", "regions"}),
        ({"regions": {"keep": 10}}, {"regions"}),
        ({"ground_truth": {"boxes_sha256": "ef"}}, {"ground_truth"}),
        ({"embedding": "int8"}, {"regions", "ground_truth"}),
        ({"images": ([1], [2], [3])}, {"proposals", "regions", "ground_truth"}),
    ],
)
def test_a_change_shows_in_the_products_it_shapes_and_in_no_earlier_one(base, change, products):
    assert changed(storekit.manifest(**base), storekit.manifest(**base, **change)) == products


def test_another_algorithm_is_another_product():
    before = storekit.manifest()
    proposals = before.products["proposals"]
    newer = Origin(2, proposals.inputs, proposals.needs)
    after = Manifest({**before.products, "proposals": newer}, before.images_sha256)
    assert changed(before, after) == {"proposals", "regions"}
    assert list(map(str, before.differences(after))) == ["proposals.algorithm_version: store has 1, wanted 2"]


def test_a_fingerprint_can_be_asked_for_as_if_embeddings_were_kept_otherwise():
    half, small = storekit.manifest(), storekit.manifest(embedding="int8")
    assert small.fingerprint("regions", embedding="float16") == half.fingerprints["regions"]
    assert small.fingerprint("proposals", embedding="float16") == half.fingerprints["proposals"]


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
    assert list(map(str, differences(store, wanted))) == lines
    assert differences(store, store) == []


def test_manifests_are_compared_by_product_and_input():
    wanted = storekit.manifest(proposals={"nms_iou": 0.5}, embedding="int8")
    assert list(map(str, storekit.manifest().differences(wanted))) == [
        'embedding: store has "float16", wanted "int8"',
        "proposals.nms_iou: store has 0.7, wanted 0.5",
    ]


def test_long_values_and_many_differences_are_shortened():
    wanted = {"a": list(range(1, 1001)), "b": list(range(1000))}
    lines = list(map(str, differences({"a": list(range(1000)), "b": "x" * 1000}, wanted)))
    assert lines[:2] == ["a[0]: store has 0, wanted 1", "a[1]: store has 1, wanted 2"]
    assert lines[3] == "a: 997 more differences in this list of 1000"
    assert lines[4].startswith('b: store has "xxx')
    assert lines[4].endswith("(1000 items)")
    assert len(lines[4]) < 200


def test_canonical_json_reads_back_as_the_same_value():
    value = {"é": [0.1, 1e300, -0.0, 10**30], "a": '\u2028\t"\\'}
    assert json.loads(canonical_json(value)) == value
