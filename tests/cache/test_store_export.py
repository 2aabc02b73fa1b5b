"""What is exported reads back as what the store holds, by the tools of each format."""

import io
import json
import tarfile

import numpy as np
import pytest
import storekit

from ezsd.cache import Store, StoreError
from ezsd.cache.tools.export import FORMATS, export

SIZES = dict(zip(storekit.IDS, zip(storekit.WIDTHS, storekit.HEIGHTS, strict=True), strict=True))


@pytest.fixture(params=[4, 1024])
def per_file(request, monkeypatch):
    """Images per exported file: several files, or one."""
    monkeypatch.setattr("ezsd.cache.tools.export.IMAGES_PER_FILE", request.param)
    return request.param


def files(folder, pattern, per_file):
    found = sorted(folder.glob(pattern))
    assert len(found) == -(-len(storekit.IDS) // per_file)
    return found


def expected(image_id):
    return storekit.image_rows(image_id, *SIZES[image_id])


def test_npz_reads_back(finished, tmp_path, per_file):
    out = export(finished, tmp_path / "out", format="npz")
    for product, fields in storekit.FIELDS.items():
        seen = []
        for file in files(out, f"{product}-*.npz", per_file):
            with np.load(file) as arrays:
                for place, image_id in enumerate(arrays["image_id"].tolist()):
                    seen.append(image_id)
                    rows = slice(*arrays["offset"][place : place + 2])
                    for field in fields:
                        np.testing.assert_array_equal(arrays[field][rows], expected(image_id)[product][field])
        assert seen == storekit.IDS
    with np.load(out / "images.npz") as images, np.load(out / "text.npz") as text:
        assert (images["id"].tolist(), images["width"].tolist()) == (storekit.IDS, storekit.WIDTHS)
        assert json.loads(str(text["attributes"]))["names"] == storekit.NAMES
        np.testing.assert_array_equal(text["embedding"], storekit.PER_STORE["text"][0]["embedding"])
    with np.load(out / "teacher.npz") as teacher:
        np.testing.assert_array_equal(teacher["values"], storekit.PER_STORE["teacher"][0]["values"])
    assert json.loads((out / "manifest.json").read_text()) == Store(finished).manifest.fields


def test_parquet_reads_back(finished, tmp_path, per_file):
    pq = pytest.importorskip("pyarrow.parquet")
    out = export(finished, tmp_path / "out", format="parquet")
    assert pq.read_table(out / "images.parquet")["id"].to_pylist() == storekit.IDS
    for product, fields in storekit.FIELDS.items():
        tables = [pq.read_table(file) for file in files(out, f"{product}-*.parquet", per_file)]
        owner = np.concatenate([table["image_id"].to_numpy() for table in tables])
        for field in fields:
            column = [row for table in tables for row in table[field].to_pylist()]
            for image_id in storekit.IDS:
                found = [row for row, image in zip(column, owner, strict=True) if image == image_id]
                values = expected(image_id)[product][field]
                np.testing.assert_array_equal(np.array(found, values.dtype).reshape(values.shape), values)


def test_webdataset_reads_back(finished, tmp_path, per_file):
    out = export(finished, tmp_path / "out", format="webdataset")
    seen = []
    for file in files(out, "images-*.tar", per_file):
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, rest = member.name.partition(".")
                data = tar.extractfile(member).read()
                if rest == "json":
                    about = json.loads(data)
                    assert (about["width"], about["height"]) == SIZES[about["id"]]
                    assert int(key) == about["id"]
                    seen.append(about["id"])
                    continue
                product, field, kind = rest.split(".")
                assert (int(key), kind) == (seen[-1], "npy")
                np.testing.assert_array_equal(np.load(io.BytesIO(data)), expected(seen[-1])[product][field])
            assert (
                len(tar.getmembers()) == sum(map(len, storekit.FIELDS.values())) * (n := len(tar.getnames()) // 12) + n
            )
    assert seen == storekit.IDS


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_store_leaves_nothing_behind(copy, tmp_path, format):
    file = copy / "ground_truth/embedding/c/0/0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="rows 0 to [0-9]+ of ground_truth/embedding do not match their checksum"):
        export(copy, tmp_path / "out", format=format)
    assert {entry.name for entry in tmp_path.iterdir()} == {"copy"}


def test_an_unknown_format_and_a_full_folder_are_refused(finished, tmp_path):
    with pytest.raises(StoreError, match="`format=csv`: expected npz, parquet, webdataset"):
        export(finished, tmp_path / "out", format="csv")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is not empty; choose a new folder"):
        export(finished, tmp_path, format="npz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
