"""Stores of other schemas: settings that differ, hostile schemas, every type, and wrong use of the interface."""

import json

import numpy as np
import pytest
import storekit

from ezsd.cache import (
    Field,
    Manifest,
    Origin,
    PerImage,
    PerStore,
    RaggedRows,
    Schema,
    Store,
    StoreError,
    StoreMismatch,
    StoreWriter,
    commit_shard,
    images_digest,
    verify,
    write_block,
)
from ezsd.cache.format.names import is_store_file
from ezsd.cache.format.schema import TYPES_BY_NAME
from ezsd.cache.storage.direct import direct_spec

A, B = PerImage("a", [Field("x", "int16")]), PerImage("b", [Field("x", "int16")])
IMAGES = {"image_ids": [1], "widths": [8], "heights": [8]}
DIGEST = images_digest(*IMAGES.values())


def manifest_of(*products, **inputs):
    return Manifest({one.name: Origin(1, inputs) for one in products}, DIGEST, schema=Schema(products))


def build(path, manifest, rows):
    """A store of one image; `rows` of each product by field, whole arrays of those of the whole store."""
    with StoreWriter.open(path, manifest, **IMAGES, block_images=1) as writer:
        for name in manifest.schema.per_store:
            writer.write_per_store(name, rows[name], {})
        counts = {name: len(next(iter(rows[name].values()))) for name in manifest.schema.per_image}
        block = {name: RaggedRows(np.array([count], "i4"), rows[name]) for name, count in counts.items()}
        write_block(path, writer.blocks[0], block)
        for task in writer.commit_tasks():
            commit_shard(path, task)
        writer.finish()
    return path


ONE = {"x": np.array([3, 4], "i2")}


def test_products_in_another_order_are_another_store(tmp_path):
    path = build(tmp_path / "s", manifest_of(A, B), {"a": ONE, "b": ONE})
    with pytest.raises(StoreMismatch, match=r"schema.products\[0\]: store has \"a\", wanted \"b\""):
        StoreWriter.open(path, manifest_of(B, A), **IMAGES, block_images=1)
    with pytest.raises(StoreMismatch, match="schema.products"):
        Store(path).require(manifest_of(B, A))


@pytest.mark.parametrize("name", ["needs", "algorithm_version"])
def test_an_input_with_the_name_of_another_value_is_refused(name):
    with pytest.raises(StoreError, match=f"manifest: a: an input is named '{name}'"):
        manifest_of(A, **{name: 1})


def test_what_names_cannot_tell_apart_the_digest_does():
    # In a store of regions such an input may have been recorded.
    stored, wanted = storekit.manifest(text={"needs": 1}), storekit.manifest(text={"needs": 2})
    assert [one.name for one in stored.differences(wanted)] == ["manifest_digest"]
    assert stored.differences(stored) == []


@pytest.mark.parametrize("written", ["i4,(", "i4,i4", "object", ["i4"], {"names": []}])
def test_a_type_in_a_file_is_looked_up_and_never_read_by_numpy(tmp_path, written):
    path = build(tmp_path / "s", manifest_of(A), {"a": ONE})
    metadata = json.loads((path / "a/x/zarr.json").read_text()) | {"data_type": written}
    assert direct_spec(metadata, "x") is None
    (path / "a/x/zarr.json").write_text(json.dumps(metadata))
    assert [damage.name for damage in verify(path, deep=True)] == ["a/x/zarr.json"]


def test_a_type_that_numpy_cannot_parse_is_one_line():
    with pytest.raises(StoreError, match="field 'x': numpy knows no type"):
        Field("x", "i4,(")


@pytest.mark.parametrize(
    ("products", "said"),
    [
        ([PerImage("a", [Field("x", "int16", (1,) * 9)])], "a row has 9 axes, expected at most 8"),
        ([PerImage("a", [Field("x", "int16", (2**30,) * 100_000)])], "a row has 100000 axes"),
        ([PerImage(f"a{number}", A.fields) for number in range(65)], "has 65 products, expected at most 64"),
    ],
)
def test_a_schema_has_a_limited_size(products, said):
    with pytest.raises(StoreError, match=said):
        Schema(products)


def test_what_a_stranger_wrote_is_cut_in_messages():
    long = "x" * 10_000
    array = Schema([A]).to_json()[0]["arrays"][0]
    for change in ({"name": long}, {"per": long}, {"rows": long}, {"arrays": [array | {"values": long}]}):
        with pytest.raises(StoreError) as error:
            Schema.from_json([Schema([A]).to_json()[0] | change], "mark")
        assert len(str(error.value)) < 500
    with pytest.raises(StoreError) as error:
        Schema.from_json([Schema([A]).to_json()[0] | {"arrays": [array | {"name": long}] * 2}], "mark")
    assert len(str(error.value)) < 500


def test_the_files_of_a_store_are_those_of_its_schema():
    schema = Schema([PerImage("a", [Field("x", "int16", (2, 3))]), PerStore("b", [Field("y", "int8")])])
    for name in (
        *("zarr.json", "manifest.json", "checksums/zarr.json", "a/zarr.json", "a/x/zarr.json", "images/id/zarr.json"),
        *("checksums/a/zarr.json", "checksums/a/x/zarr.json", "a/x/c/0/0/0", "a/x/c/123456789/0/0", "b/y/c/7"),
        *("a/offset/c/0", "checksums/a/x/c/0"),
    ):
        assert is_store_file(name, schema), name
    for name in (
        *("", "/zarr.json", "a", "a/x", "a/x/c", "a/x/c/", "a/x/c/0", "a/x/c/0/0", "a/x/c/0/0/0/0", "a/x/c/0/0/1"),
        *("a/x/c/00/0/0", "a/x/c/1234567890/0/0", "a/x/c/-1/0/0", "a/x/c/0/0/0\n", "a/x/c/\u0661/0/0", "a/z/c/0"),
        *("checksums/a/x/c/0/0/0", "checksums/manifest.json", "checksums/checksums/zarr.json", "../a/x/zarr.json"),
        *("COMMIT.json", "b/y/c/7/c/0", "a/y/zarr.json", "checksums/checksums/a/zarr.json", "a/x/c/0/0/0/"),
    ):
        assert not is_store_file(name, schema), name


@pytest.mark.parametrize("name", ["image_id", "attributes", "file", "allow_pickle"])
@pytest.mark.parametrize("kind", [PerImage, PerStore])
def test_a_field_whose_name_exports_use_is_refused(kind, name):
    with pytest.raises(StoreError, match=f"field '{name}': expected a name"):
        Schema([A, kind("b", [Field(name, "int64")])])


def test_every_type_is_written_and_read_with_all_values_that_it_may_have(tmp_path):
    fields = [Field(f"number_{name}", name, (2,)) for name in TYPES_BY_NAME]
    fields += [Field(f"unit_{name}", name, (2,), values="unit") for name in ("float16", "float32", "float64")]
    fields += [Field("kept", "float16", (2,), values="unit", kept="int8"), Field("box", "float32", (4,), values="box")]
    of_store = [field for field in fields if field.name not in ("kept", "box")]
    rows = {
        field.name: np.array([[1, 0]] if field.trailing == (2,) else [[1, 2, 3, 4]], field.dtype) for field in fields
    }
    manifest = manifest_of(PerImage("image", fields), PerStore("whole", of_store))
    whole = {field.name: rows[field.name] for field in of_store}
    store = Store(build(tmp_path / "s", manifest, {"image": rows, "whole": whole}))
    arrays, _ = store.read_per_store("whole")
    for found, given in ((store.product("image")[1], rows), (arrays, whole)):
        assert {name: (found[name].dtype, found[name].tolist()) for name in found} == {
            name: (values.dtype, values.tolist()) for name, values in given.items()
        }


def test_a_schema_and_a_type_of_embeddings_do_not_go_together():
    with pytest.raises(StoreError, match="manifest: embedding 'int8' is of stores of regions"):
        Manifest({"a": Origin(1, {})}, DIGEST, embedding="int8", schema=Schema([A]))


def test_a_manifest_of_regions_without_a_type_of_embeddings_is_damaged():
    with pytest.raises(StoreError, match="here: is not a manifest"):
        Manifest.from_fields(storekit.manifest().fields | {"embedding": None}, "here")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Field("v", "int8", 4), r"field 'v': trailing: expected a shape such as \(4,\), found 4"),
        (lambda: Schema([Field("v", "int8")]), "schema: expected products with fields, found Field"),
        (lambda: Schema(A), "schema: expected a list of products, found PerImage"),
        (lambda: Schema([PerImage("a", Field("v", "int8"))]), "schema: expected products with fields, found PerImage"),
    ],
)
def test_what_is_no_schema_is_one_line(make, said):
    with pytest.raises(StoreError, match=said):
        make()


def test_fields_come_in_their_order_whichever_was_read_first(tmp_path):
    manifest = manifest_of(PerImage("a", [Field("x", "int16"), Field("y", "int16")]))
    product = Store(build(tmp_path / "s", manifest, {"a": {"x": ONE["x"], "y": ONE["x"]}})).product("a")
    product.column("y", [1])
    assert [list(product[1]) for _ in range(2)] == [["x", "y"]] * 2
