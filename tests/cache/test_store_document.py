"""A reader written from docs/store-format.md alone: neither Zarr nor this package."""

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import storekit

from ezsd.cache.format.regions import OPTIONAL, PER_IMAGE, PER_STORE, PRODUCTS, format_version
from ezsd.cache.format.schema import CHECKSUM, FORMAT_VERSIONS, IMAGES, OFFSET


@dataclass
class Field:
    """What of a field shapes the bytes of a store of regions; printed as the digests below were taken."""

    name: str
    dtype: str
    trailing: tuple


def rows_of_array(folder):
    """All rows of an array, shard by shard, checking each index on the way."""
    metadata = json.loads((folder / "zarr.json").read_text())
    shape, dtype = metadata["shape"], np.dtype(metadata["data_type"])
    per_shard = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    per_chunk = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=int))
    assert per_chunk == (256 if row_bytes >= 64 else 4096)
    parts = [np.empty((0, *shape[1:]), dtype)]
    for shard, start in enumerate(range(0, shape[0], per_shard)):
        data = (folder / "/".join(["c", str(shard), *["0"] * (len(shape) - 1)])).read_bytes()
        count = min(per_shard, shape[0] - start)
        chunks, present = per_shard // per_chunk, -(-count // per_chunk)
        index = struct.unpack(f"<{2 * chunks}Q", data[-16 * chunks - 4 : -4])
        for chunk in range(chunks):
            wanted = (chunk * per_chunk * row_bytes, per_chunk * row_bytes) if chunk < present else (2**64 - 1,) * 2
            assert index[2 * chunk : 2 * chunk + 2] == wanted
        assert len(data) == present * per_chunk * row_bytes + 16 * chunks + 4
        stored = np.frombuffer(data[: present * per_chunk * row_bytes], dtype.newbyteorder("<")).reshape(-1, *shape[1:])
        padding = stored[count:]
        assert (
            np.isnan(padding).all()
            if dtype.kind == "f"
            else (padding == (-1 if dtype.kind == "i" else 2**32 - 1)).all()
        )
        parts.append(stored[:count])
    return np.concatenate(parts)


@pytest.mark.parametrize("product", storekit.FIELDS)
def test_the_document_is_enough_to_read_every_row(finished, product):
    offset = rows_of_array(finished / product / "offset")
    columns = {field: rows_of_array(finished / product / field) for field in storekit.FIELDS[product]}
    for place, image in enumerate(zip(storekit.IDS, storekit.WIDTHS, storekit.HEIGHTS, strict=True)):
        for field, expected in storekit.image_rows(*image)[product].items():
            np.testing.assert_array_equal(columns[field][offset[place] : offset[place + 1]], expected)


def test_the_document_is_enough_to_check_a_store(finished):
    def canonical(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    text = (finished / "COMMIT.json").read_text()
    mark = json.loads(text)
    assert text == canonical(mark) + "\n"
    assert mark.pop("sha256") == hashlib.sha256(canonical(mark).encode()).hexdigest()
    assert (mark["format_version"], mark["embed_dim"], mark["embedding"]) == (2, storekit.DIM, "float16")
    manifest = json.loads((finished / "manifest.json").read_text())
    assert mark["manifest_digest"] == hashlib.sha256(canonical(manifest).encode()).hexdigest()
    columns = [rows_of_array(finished / "images" / name).tobytes() for name in ("id", "width", "height")]
    assert manifest["images_sha256"] == hashlib.sha256(b"".join(columns)).hexdigest()
    found = {file.relative_to(finished).as_posix() for file in finished.rglob("*") if file.is_file()}
    assert found == set(mark["files"]) | {"COMMIT.json", "environment.json"}
    for name, listed in mark["files"].items():
        data = (finished / name).read_bytes()
        assert listed == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_document_is_enough_to_tell_what_products_have_in_common(finished):
    def fingerprint(name):
        origin = manifest["products"][name]
        ragged, embedded = name in storekit.FIELDS, "embedding" in storekit.FIELDS.get(name, ())
        shaped = {
            "product": name,
            "version": origin["version"],
            "inputs": origin["inputs"],
            "needs": {needed: fingerprint(needed) for needed in origin["needs"]},
            "images_sha256": manifest["images_sha256"] if ragged else None,
            "embedding": manifest["embedding"] if embedded else None,
        }
        text = json.dumps(shaped, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    manifest = json.loads((finished / "manifest.json").read_text())
    said = json.loads((finished / "zarr.json").read_text())["attributes"]["ezsd_store"]["fingerprints"]
    assert said == {name: fingerprint(name) for name in manifest["products"]}


@pytest.mark.parametrize("product", [*storekit.FIELDS, "images", "text", "teacher"])
def test_the_document_is_enough_to_check_every_chunk(finished, product):
    for folder in sorted(path.parent for path in (finished / product).rglob("*/zarr.json")):
        metadata = json.loads((folder / "zarr.json").read_text())
        shape, dtype = metadata["shape"], np.dtype(metadata["data_type"])
        chunk_shape = metadata["codecs"][0]["configuration"]["chunk_shape"]
        chunk = dtype.itemsize * int(np.prod(chunk_shape, dtype=int))
        found = []
        for shard in range(-(-shape[0] // metadata["chunk_grid"]["configuration"]["chunk_shape"][0])):
            data = (folder / "/".join(["c", str(shard), *["0"] * (len(shape) - 1)])).read_bytes()
            found += [zlib.crc32(data[at : at + chunk]) for at in range(0, len(data) - chunk + 1, chunk)]
        sums = rows_of_array(finished / "checksums" / folder.relative_to(finished))
        assert sums.dtype == np.uint32
        assert sums.tolist() == found


def test_the_root_group_carries_the_metadata_below_it(finished):
    root = json.loads((finished / "zarr.json").read_text())
    for name, metadata in root["consolidated_metadata"]["metadata"].items():
        assert metadata == json.loads((finished / name / "zarr.json").read_text())
    said = root["attributes"]["ezsd_store"]
    assert said["rows"]["regions"] == len(rows_of_array(finished / "regions/box"))
    assert said["images"] == len(storekit.IDS)


def test_a_schema_that_changes_takes_a_new_format_version():
    """A store of another schema under this number would be called damaged, and is whole."""

    def shape(field):
        return Field(field.name, field.dtype, field.trailing)

    def schema(products):
        per_image = [(name, tuple(map(shape, fields))) for name, fields in PER_IMAGE.items()]
        per_store = [(name, shape(field)) for name, field in PER_STORE.items() if name in products]
        said = repr((per_image, per_store, tuple(map(shape, IMAGES)), shape(OFFSET), shape(CHECKSUM), products))
        return format_version(products), hashlib.sha256(said.encode()).hexdigest()[:16]

    assert schema(tuple(name for name in PRODUCTS if name not in OPTIONAL)) == (2, "aadb937cd6f1baae")
    assert schema(PRODUCTS) == (3, "be32fd9660f9f496")
    assert (FORMAT_VERSIONS, OPTIONAL, set(PER_STORE)) == ((2, 3, 4), ("proposer",), {"teacher", "text", "proposer"})
