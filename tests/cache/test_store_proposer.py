"""The optional product `proposer`: a store that has it, and one that has none."""

import dataclasses
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import storekit
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from storekit import PROPOSER, Images, flip

from ezsd.cache import (
    Manifest,
    Store,
    StoreBusy,
    StoreError,
    StoreIncomplete,
    StoreMismatch,
    compare,
    export,
    info,
    list_stores,
    pull,
    push,
    repair,
    verify,
)
from ezsd.cache.format.commit_mark import parse_mark, read_mark
from ezsd.cache.format.sealed_json import seal
from ezsd.cache.journal.entries import journal_folder

VALUES, ATTRIBUTES = storekit.PER_STORE["proposer"]
FILES = {"proposer/zarr.json", "proposer/values/zarr.json", "proposer/values/c/0"}
NONE = re.escape("has no per-store product 'proposer'; it has teacher, text")


@pytest.fixture(scope="module")
def proposing(tmp_path_factory):
    """One complete store with a proposer, shared: tests must not change it."""
    return storekit.build(tmp_path_factory.mktemp("proposing") / "store", manifest=storekit.manifest(proposer=PROPOSER))


@pytest.fixture
def hurt(proposing, tmp_path):
    """One that a test may damage."""
    return shutil.copytree(proposing, tmp_path / "hurt")


def open_writer(path, **options):
    return storekit.open_writer(path, manifest=storekit.manifest(proposer=PROPOSER), **options)


def test_a_complete_store_gives_back_what_was_written(proposing):
    store = Store(proposing)
    assert list(store.manifest.products) == ["teacher", "text", "proposer", "proposals", "regions", "ground_truth"]
    arrays, attributes = store.read_per_store("proposer")
    assert arrays["values"].tobytes() == VALUES["values"].tobytes()
    assert attributes == ATTRIBUTES
    opened = zarr.open_array(proposing / "proposer/values", mode="r")
    np.testing.assert_array_equal(opened[:], VALUES["values"])
    with open_writer(proposing) as writer:
        assert writer.complete
        assert writer.has_per_store("proposer")
        assert writer.read_per_store("proposer")[1] == ATTRIBUTES


@given(
    values=arrays_of.arrays("<f4", st.integers(0, 9000), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    attributes=st.dictionaries(st.text("äb", max_size=3), st.floats(allow_nan=False, allow_infinity=False)),
)
@settings(max_examples=20, deadline=None)
def test_any_finite_values_and_attributes_come_back_from_the_journal_and_are_written_once(values, attributes):
    with tempfile.TemporaryDirectory() as folder:
        with open_writer(folder) as writer:
            assert not writer.has_per_store("proposer")
            with pytest.raises(StoreIncomplete, match="proposer was not written yet"):
                writer.read_per_store("proposer")
            writer.write_per_store("proposer", {"values": values}, attributes)
        with open_writer(folder) as writer:
            assert writer.has_per_store("proposer")
            before = storekit.contents(folder)
            writer.write_per_store("proposer", {"values": values}, attributes)
            assert storekit.contents(folder) == before
            for other in (({"values": np.append(values, np.float32(1))}, attributes), ({"values": values}, {"c": 1})):
                with pytest.raises(StoreError, match="proposer was written before, with other contents"):
                    writer.write_per_store("proposer", *other)
            found, described = writer.read_per_store("proposer")
            assert (found["values"].tobytes(), described) == (values.tobytes(), attributes)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097])
def test_any_number_of_values_makes_a_whole_store(memory, monkeypatch, size):
    values = np.arange(size, dtype="f4")
    monkeypatch.setitem(storekit.PER_STORE, "proposer", ({"values": values}, {}))
    store = storekit.build(memory / "store", manifest=storekit.manifest(proposer=PROPOSER))
    assert verify(store, deep=True) == []
    np.testing.assert_array_equal(Store(store).read_per_store("proposer")[0]["values"], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1, np.nan], "f4"), r"proposer.values: row 1 is not finite"),
        (np.zeros(3), "proposer.values: expected float32, found float64"),
        (np.zeros((3, 2), "f4"), r"proposer.values: expected shape \(3,\)"),
    ],
)
def test_values_that_are_no_weights_are_refused(tmp_path, values, message):
    with open_writer(tmp_path) as writer, pytest.raises(StoreError, match=message):
        writer.write_per_store("proposer", {"values": values}, {})


def test_a_build_goes_on_after_the_proposer_and_ends_in_the_same_bytes(proposing, tmp_path):
    with open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
        storekit.write_one(tmp_path, writer.pending()[2])
    assert [product.name for product in info(tmp_path).products][2] == "proposer"
    assert info(tmp_path).format_version == 3
    storekit.build(tmp_path, manifest=storekit.manifest(proposer=PROPOSER))
    assert storekit.contents(tmp_path) == storekit.contents(proposing)


def test_a_build_without_its_proposer_is_neither_shared_nor_finished(tmp_path):
    with open_writer(tmp_path) as writer:
        for product in ("teacher", "text"):
            writer.write_per_store(product, *storekit.PER_STORE[product])
        with pytest.raises(StoreIncomplete, match="proposer was not written yet"):
            writer.share()
        for block in writer.pending():
            storekit.write_one(tmp_path, block)
        for task in writer.commit_tasks():
            storekit.commit_shard(tmp_path, task)
        with pytest.raises(StoreIncomplete, match="proposer was not written yet"):
            writer.finish()
    with pytest.raises(StoreBusy, match="not prepared yet"):
        open_writer(tmp_path, shared=True)
    with pytest.raises(StoreMismatch, match="proposer: store has"):
        storekit.open_writer(tmp_path, shared=True)
    with open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
        writer.share()
    open_writer(tmp_path, shared=True).close()


def test_a_store_without_one_says_so_at_every_door(finished, tmp_path):
    assert "proposer" not in Store(finished).manifest.products
    for path in (finished, tmp_path):
        with storekit.open_writer(path) as writer:
            doors = [writer.has_per_store, writer.read_per_store, lambda name: writer.write_per_store(name, VALUES, {})]
            for door in doors:
                with pytest.raises(StoreError, match=f"^{re.escape(str(path))}: {NONE}$"):
                    door("proposer")
    with pytest.raises(StoreError, match=f"^{re.escape(str(finished))}: {NONE}$"):
        Store(finished).read_per_store("proposer")


def said_versions(store):
    files = [json.loads((store / name).read_text()) for name in ("COMMIT.json", "manifest.json", "zarr.json")]
    return [at["format_version"] for at in (*files[:2], files[2]["attributes"]["ezsd_store"])]


def test_the_format_is_3_with_a_proposer_and_2_without(finished, proposing, tmp_path):
    assert (said_versions(finished), info(finished).format_version) == ([2, 2, 2], 2)
    assert (said_versions(proposing), info(proposing).format_version) == ([3, 3, 3], 3)
    open_writer(tmp_path).close()
    plan = json.loads((journal_folder(tmp_path) / "plan/entry.json").read_text())
    assert plan["attributes"]["format_version"] == plan["attributes"]["manifest"]["format_version"] == 3


@pytest.mark.parametrize(("made", "said"), [("finished", 3), ("proposing", 2)])
def test_a_version_that_its_products_do_not_have_is_refused(request, made, said):
    store = request.getfixturevalue(made)
    mark = json.loads((store / "COMMIT.json").read_text())
    del mark["sha256"]
    with pytest.raises(StoreError, match=f"here: format_version: {said}, and its files are those of {5 - said}; ezsd"):
        parse_mark(seal({**mark, "format_version": said}), "here")
    manifest = {**Store(store).manifest.fields, "format_version": said}
    with pytest.raises(StoreError, match=f"here: says format {said}, and with these products it is {5 - said}; "):
        Manifest.from_fields(manifest, "here")


@pytest.mark.parametrize("name", sorted(FILES - {"proposer/values/c/0"}))
def test_a_mark_with_some_files_of_a_proposer_is_refused(proposing, name):
    mark = read_mark(proposing)
    files = {listed: at for listed, at in mark.files.items() if listed != name}
    with pytest.raises(StoreError, match=f"files: {name} is not listed, and every store has it"):
        parse_mark(dataclasses.replace(mark, files=files).to_bytes(), "here")


def test_proposals_need_a_proposer_only_where_there_is_one():
    products = dict(storekit.manifest(proposer=PROPOSER).products)
    del products["proposer"]
    with pytest.raises(StoreError, match="proposals cannot need proposer; products are made as teacher, text, propos"):
        Manifest(products, "")


def test_another_proposer_makes_other_proposals_and_regions_and_nothing_else():
    one, other = storekit.manifest(proposer=PROPOSER), storekit.manifest(proposer={**PROPOSER, "steps": 800})
    assert one.same_products(other) == ("teacher", "text", "ground_truth")
    assert list(map(str, one.differences(other))) == ["proposer.steps: store has 400, wanted 800"]
    assert Manifest.from_json(one.to_json()) == one
    plain = storekit.manifest()
    assert plain.same_products(one) == one.same_products(plain) == ("teacher", "text", "ground_truth")


def test_any_flipped_bit_of_it_is_found_refused_and_mended(hurt):
    chance, before = random.Random(1), storekit.contents(hurt)
    listed = {name for name in read_mark(hurt).files if "proposer" in name}
    assert listed > FILES
    for name in sorted(listed) * 3:
        bit = chance.randrange(8 * (hurt / name).stat().st_size)
        flip(hurt / name, bit)
        (found,) = verify(hurt, deep=True)
        assert found.name == name
        row = bit // 32
        if name == "proposer/values/c/0" and row < len(VALUES["values"]):
            assert any(start <= row < stop for start, stop in found.rows)
        with pytest.raises(StoreError, match=re.escape(name)):
            Store(hurt)
        report = repair(hurt, Images(proposer=PROPOSER))
        assert (report.repaired, report.left) == ((name,), ())
    assert storekit.contents(hurt) == before


def test_without_images_its_metadata_are_mended_and_its_values_are_not(hurt):
    for name in FILES:
        flip(hurt / name, 99)
    report = repair(hurt)
    assert set(report.repaired) == FILES - {"proposer/values/c/0"}
    assert [damage.name for damage in report.left] == ["proposer/values/c/0"]
    with pytest.raises(StoreIncomplete):
        Store(hurt)


def test_all_per_store_products_and_rows_are_mended_at_once_each_with_those_before_it(hurt):
    class Source(Images):
        def per_store(self, product, stored):
            seen.append((product, sorted(stored)))
            return super().per_store(product, stored)

    seen, before = [], storekit.contents(hurt)
    for array in ("teacher/values", "text/embedding", "proposer/values", "proposals/offset", "proposals/box"):
        shutil.rmtree(hurt / array / "c")
    assert repair(hurt, Source(proposer=PROPOSER)).left == ()
    # Once each: the proposer has two shards.
    assert seen == [("teacher", []), ("text", ["teacher"]), ("proposer", ["teacher", "text"])]
    assert storekit.contents(hurt) == before


def test_damage_to_it_is_found_before_the_store_is_finished(tmp_path):
    with open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
    flip(tmp_path / "journal/whole-proposer/data.raw", 7)
    (found,) = verify(tmp_path, deep=True)
    assert found.name == "journal/whole-proposer"


def test_a_folder_of_that_name_in_a_store_without_one_is_foreign(copy):
    (copy / "proposer").mkdir()
    (copy / "proposer/zarr.json").write_text("{}")
    assert [(damage.name, damage.kind) for damage in verify(copy)] == [("proposer/zarr.json", "stray")]
    with pytest.raises(StoreError, match=NONE):
        Store(copy).read_per_store("proposer")


def test_a_store_with_one_and_a_store_without_are_compared(finished, proposing):
    found = compare(finished, proposing)
    assert list(map(str, found.settings)) == [
        'proposals.needs: store has ["teacher","text"], wanted ["proposer","teacher","text"]',
        'proposer: store has no such entry, wanted {"algorithm_version":1,"needs":[],"seed":3,"steps":400}',
    ]
    assert found.same_fingerprint == ("teacher", "text", "ground_truth")
    assert "proposer/zarr.json: differs (only in the second)" in found.content
    assert compare(proposing, proposing).content == ()


def test_one_is_not_built_over_the_other(finished, proposing):
    for path, wanted in ((finished, storekit.manifest(proposer=PROPOSER)), (proposing, storekit.manifest())):
        with pytest.raises(StoreMismatch, match="equal there: teacher, text, ground_truth$"):
            storekit.open_writer(path, manifest=wanted)
        with pytest.raises(StoreMismatch, match="proposer: store has"):
            Store(path).require(wanted)


@pytest.mark.parametrize("format", ["npz", "parquet", "webdataset"])
def test_it_is_exported_where_there_is_one(finished, proposing, tmp_path, format):
    assert not (export(finished, tmp_path / "without", format=format) / "proposer.npz").exists()
    with np.load(export(proposing, tmp_path / "with", format=format) / "proposer.npz") as found:
        assert found["values"].tobytes() == VALUES["values"].tobytes()
        assert json.loads(found["attributes"].item()) == ATTRIBUTES


def test_it_is_copied_and_listed(proposing, tmp_path):
    there = tmp_path / "there"
    push(proposing, there.as_uri())
    pull(there.as_uri(), tmp_path / "here")
    assert storekit.contents(tmp_path / "here") == storekit.contents(proposing)
    found, _ = Store(there.as_uri()).read_per_store("proposer")
    assert found["values"].tobytes() == VALUES["values"].tobytes()
    assert list_stores(tmp_path)[tmp_path / "here"].complete


def test_int8_and_a_proposer_go_together(memory):
    manifest = storekit.manifest(proposer=PROPOSER, embedding="int8")
    store = storekit.build(Path(memory) / "store", manifest=manifest)
    assert read_mark(store).products == tuple(manifest.products)
    assert verify(store, deep=True) == []


def test_an_unfinished_product_comes_back_with_its_shapes_and_goes_when_it_is_finished(tmp_path):
    arrays = {
        "one": np.float32(0.1) * np.ones((), "f4"),
        "none": np.zeros((0, 3), "f4"),
        "big endian": np.arange(6, dtype=">i8").reshape(2, 3),
    }
    with open_writer(tmp_path / "store") as writer:
        unfinished = writer.unfinished("proposer")
        assert unfinished.read() is None
        for step in (3, 12):
            unfinished.write(step, arrays, {"step": step})
        found, attributes = unfinished.read()
        assert attributes == {"step": 12}
        for name, values in arrays.items():
            assert found[name].shape == values.shape
            assert np.array_equal(found[name], values)
        journal = journal_folder(tmp_path / "store")
        assert [folder.name for folder in journal.glob("unfinished-*")] == ["unfinished-proposer-00000012"]
        writer.write_per_store("proposer", VALUES, ATTRIBUTES)
        assert writer.unfinished("proposer").read() is None
        with pytest.raises(StoreError, match="'absent'"):
            writer.unfinished("absent")


def test_a_kill_between_two_states_leaves_the_newer_one(tmp_path, monkeypatch):
    with open_writer(tmp_path / "store") as writer:
        unfinished = writer.unfinished("proposer")
        unfinished.write(3, {}, {"step": 3})
        with monkeypatch.context() as patch:
            patch.setattr("ezsd.cache.journal.unfinished.discard", lambda folder: None)
            unfinished.write(12, {}, {"step": 12})
        assert unfinished.read()[1] == {"step": 12}
        (journal_folder(tmp_path / "store") / "unfinished-proposer-00000012/entry.json").unlink()
        assert unfinished.read()[1] == {"step": 3}
