"""docs/store-library.md, to the letter: its Python is a module, whose functions build, kill, read and copy stores."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ezsd.cache import (
    Field,
    Manifest,
    PerImage,
    PerStore,
    RaggedRows,
    Schema,
    Store,
    StoreBusy,
    StoreError,
    StoreMismatch,
    export,
    info,
    list_stores,
    read_plan,
    repair,
    verify,
    write_block,
)
from ezsd.cache.format.commit_mark import parse_mark
from ezsd.cache.format.sealed_json import parse_json, seal
from ezsd.pipeline.console.store_messages import info_json, info_lines, list_lines
from tests.commandkit import ezsd

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/store-library.md").read_text(encoding="utf-8")
NAME = "cached_features"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The page's code, in a module that other processes import too."""
    folder = tmp_path_factory.mktemp("doc")
    (folder / f"{NAME}.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)))
    sys.path.insert(0, str(folder))
    yield importlib.import_module(NAME)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def features(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features"
    module.build(path)
    return path


def files(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "build.log"
    }


def test_what_is_read_is_what_was_computed(module, features):
    one, embedding, counts, layers, name = module.read(features)
    assert one.dtype == np.float16
    assert one.tobytes() == module.encode(100)["tokens"]["token"].tobytes()
    objects = [module.encode(image)["objects"] for image in (105, 100)]
    assert counts.tolist() == [len(rows["area"]) for rows in objects]
    expected = np.concatenate([rows["embedding"] for rows in objects])
    assert embedding.dtype == np.float16
    # Each value within half a step of 127 below the row's largest.
    np.testing.assert_allclose(embedding, expected, atol=float(np.abs(expected).max()) / 254 + 1e-3)
    assert (layers.tolist(), name) == (list(range(12)), "my encoder")
    for image in module.IDS.tolist():
        rows = Store(features).product("objects")[image]
        assert rows["box"].tobytes() == module.encode(image)["objects"]["box"].tobytes()
        assert rows["area"].dtype == np.uint32


def test_any_number_of_processes_gives_the_same_bytes(module, features, tmp_path):
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        module.build(tmp_path / "other", pool.map)
    assert files(tmp_path / "other") == files(features)


@pytest.mark.parametrize("point", ["block.half_written:3", "shard.before_rename:2", "commit.before_rename"])
def test_a_killed_build_goes_on_to_the_same_bytes(module, features, tmp_path, point):
    code = f"import {NAME}; {NAME}.build({str(tmp_path / 'killed')!r})"
    env = os.environ | {"EZSD_FAILPOINT": point, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not info(tmp_path / "killed").complete
    module.build(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(features)


def test_a_copy_is_whole_and_equal(module, features, tmp_path):
    images, comparison = module.look_after(features, (tmp_path / "pushed").as_uri(), tmp_path / "pulled")
    assert (images, comparison.content, comparison.settings) == (20, (), ())
    assert comparison.same_fingerprint == ("model", "tokens", "objects")
    far = Store((tmp_path / "pushed").as_uri()).product("objects").batch([105, 100])
    here = Store(features).product("objects").batch([105, 100])
    assert {name: rows.tobytes() for name, rows in far.rows.items()} == {
        name: rows.tobytes() for name, rows in here.rows.items()
    }


def test_zarr_reads_it(module, features):
    import zarr

    group = zarr.open_group(features, mode="r")
    assert group["tokens/token"].shape == (20, 4, 8)
    assert group["objects/embedding"].attrs["unit_vector"] == "embedding[row] * embedding_scale[row]"
    assert group.attrs["ezsd_store"]["format_version"] == 4


def test_the_commands_describe_it(features, tmp_path):
    rows = sum(len(Store(features).product("objects")[image]["area"]) for image in range(100, 120))
    assert f"20 images, 20 tokens, {rows} objects, " in list_lines(features.parent)[0]
    assert '"format_version": 4' in info_json(features)
    assert f"objects  {rows:>4}  {rows / 20:>9.1f}  " in "\n".join(info_lines(features))
    assert list(list_stores(features.parent)) == [features]
    with np.load(export(features, tmp_path / "npz", format="npz") / "tokens-00000.npz") as found:
        assert found["token"].shape == (20, 4, 8)


def test_damage_is_located_and_what_can_be_is_mended(module, tmp_path):
    path = tmp_path / "store"
    module.build(path)
    before = files(path)
    token = path / "tokens/token/c/0/0/0"
    token.write_bytes(b"\xff" + token.read_bytes()[1:])
    (path / "objects/zarr.json").write_bytes(b"{}")
    (path / "checksums/objects/box/c/0").unlink()
    found = {damage.name: damage for damage in verify(path, deep=True)}
    assert found["tokens/token/c/0/0/0"].images == tuple(range(100, 120))
    with pytest.raises(StoreError, match=r"`verify\(deep=True\)` lists all damage, `repair\(\)` mends it"):
        Store(path)
    assert [damage.name for damage in repair(path).left] == ["tokens/token/c/0/0/0"]
    token.write_bytes(before["tokens/token/c/0/0/0"])
    repair(path)
    (path / "COMMIT.json").unlink()
    assert repair(path).remade == Store(path).digest
    assert files(path) == before


class Again:
    """Rows and arrays of the page's store, computed again."""

    def __init__(self, module):
        self.module, self.asked = module, []
        self.manifest = module.manifest(b"the model's file")
        self.images = module.IDS, module.WIDTH, module.HEIGHT

    def per_store(self, product, stored):
        self.asked.append((product, sorted(stored)))
        return {"mean": np.zeros((1, 3), "f4"), "layers": np.arange(12, dtype="i4")}

    def rows(self, blocks, stored):
        arrays, attributes = stored["model"]
        assert (arrays["layers"].tolist(), attributes["name"]) == (list(range(12)), "my encoder")
        return map(self.module.rows_of, blocks)


def test_a_source_mends_every_array_of_a_product_of_the_whole_store(module, tmp_path):
    module.build(tmp_path / "store")
    before = files(tmp_path / "store")
    for name in ("model/mean/c/0/0", "model/layers/c/0", "objects/embedding/c/0/0"):
        (tmp_path / "store" / name).unlink()
    source = Again(module)
    assert repair(tmp_path / "store", source).left == ()
    assert files(tmp_path / "store") == before
    assert source.asked == [("model", [])]
    # Rows are computed with all arrays of it, or not at all.
    (tmp_path / "store/model/layers/c/0").unlink()
    (tmp_path / "store/objects/area/c/0").unlink()
    assert repair(tmp_path / "store", source).left == ()
    assert source.asked[1:] == [("model", [])]
    assert files(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((1, 3), "f4"), "model: expected arrays by field name, found ndarray"),
        ({"mean": np.zeros((1, 3), "f4")}, r"model: arrays: expected \['layers', 'mean'\], found \['mean'\]"),
        ({"mean": np.zeros((1, 3), "f4"), "layers": np.arange(12.0)}, "model.layers: expected int32, found float64"),
    ],
)
def test_a_source_without_all_arrays_is_one_line_and_changes_nothing(module, features, tmp_path, given, said):
    store = shutil.copytree(features, tmp_path / "store")
    (store / "model/mean/c/0/0").unlink()
    before, source = files(store), Again(module)
    source.per_store = lambda product, stored: given
    with pytest.raises(StoreError, match=f"^{store}: what `source` gives cannot be stored: {said}[^\n]*$"):
        repair(store, source)
    assert files(store) == before


def test_other_settings_and_a_second_builder_are_refused(module, features, tmp_path):
    with pytest.raises(StoreMismatch, match="model.weights_sha256: store has .*, wanted "):
        module.open_store(features, b"another file")
    with module.open_store(tmp_path / "new"), pytest.raises(StoreBusy, match="another process is building"):
        module.open_store(tmp_path / "new")


def test_rows_that_the_schema_does_not_allow_are_refused(module, tmp_path):
    module.open_store(tmp_path / "s").close()
    block = read_plan(tmp_path / "s").blocks[0]

    def changed(product, field, change):
        rows = module.rows_of(block)
        fields = {**rows[product].fields, field: change(rows[product].fields[field])}
        return rows | {product: RaggedRows(rows[product].counts, fields)}

    for rows, said in (
        (changed("tokens", "token", lambda x: x.astype("f4")), "tokens.token: expected float16, found float32"),
        (changed("tokens", "token", lambda x: x[:, :2]), r"tokens.token: expected shape \(4, 4, 8\)"),
        (changed("objects", "box", lambda x: x * 100), "reaches beyond its image"),
        (changed("objects", "embedding", lambda x: x * 2), "is not of unit length"),
        (changed("tokens", "token", lambda x: x * np.float16("nan")), "is not finite"),
        ({"tokens": module.rows_of(block)["tokens"]}, r"products: expected \['objects', 'tokens'\]"),
    ):
        with pytest.raises(StoreError, match=said):
            write_block(tmp_path / "s", block, rows)
    short = module.rows_of(block)
    counts = short["tokens"].counts.copy()
    counts[1] = 0
    short["tokens"] = RaggedRows(counts, {"token": short["tokens"].fields["token"][1:]})
    with pytest.raises(StoreError, match="tokens: expected 1 row of each image, found 0 of 101"):
        write_block(tmp_path / "s", block, short)
    objects = short["objects"]
    keep = ~np.isin(np.repeat(np.arange(4), objects.counts), [1])
    counts = objects.counts.copy()
    counts[1] = 0
    short["objects"] = RaggedRows(counts, {name: rows[keep] for name, rows in objects.fields.items()})
    # An image that could not be read has none.
    write_block(tmp_path / "s", block, short, bad_images={101: "truncated"})


BOX = Field("box", "float32", (4,), values="box")


@pytest.mark.parametrize(
    ("products", "said"),
    [
        ([], "expected a product with rows of images, found none"),
        ([PerStore("a", [Field("b", "float32")])], "expected a product with rows of images"),
        ([PerImage("images", [BOX])], "product 'images': expected a name of at most 64 lower-case letters"),
        ([PerImage("../x", [BOX])], "product '../x': expected a name"),
        ([PerImage("nul", [BOX])], "product 'nul': expected a name"),
        ([PerImage("a", [BOX]), PerImage("a", [BOX])], "two products have the same name"),
        ([PerImage("a", [])], "has 0 arrays, expected 1 to 64"),
        ([PerImage("a", [BOX], rows=0)], "rows must be a whole number from 1"),
        ([PerImage("a", [Field("offset", "int64")])], "field 'offset': expected a name"),
        ([PerImage("a", [Field("b", "complex64")])], "complex64 is not stored; expected float16"),
        ([PerImage("a", [Field("b", "bool")])], "bool is not stored"),
        ([PerImage("a", [Field("b", "float32", (0,))])], "the shape of a row must be whole numbers from 1"),
        ([PerImage("a", [Field("b", "float32", (2**21,))])], "at most 1,048,576 values"),
        ([PerImage("a", [Field("box", "float16", (4,), values="box")])], "a box is float32 of shape"),
        ([PerImage("a", [Field("b", "float32", (4, 4), values="unit")])], "a unit vector is floating-point with one"),
        ([PerImage("a", [Field("b", "float32", (4,), values="unit", kept="int8")])], "only unit vectors of float16"),
        ([PerImage("a", [Field("b", "float32", (4,), values="quaternion")])], "not known to this version"),
    ],
)
def test_a_schema_that_no_store_can_have_is_one_line(products, said):
    with pytest.raises(StoreError, match=said):
        Schema(products)


def test_a_type_that_numpy_does_not_know_is_one_line():
    with pytest.raises(StoreError, match="field 'b': numpy knows no type 'float12'"):
        Field("b", "float12")


def test_a_region_store_has_no_other_schema_and_others_no_width(module):
    with pytest.raises(StoreError, match="embed_dim: expected None, the schema has all shapes, found 8"):
        module.manifest(b"").layout(8)
    with pytest.raises(StoreError, match="manifest: expected the products model, tokens, objects; found"):
        Manifest({}, "", schema=module.SCHEMA)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s[1].update(per="video"), "per 'video' is not known to this version"),
        (lambda s: s[1]["arrays"][0].update(values="quaternion"), "'quaternion', kept 'as given': not known to this"),
        (lambda s: s[1].update(codec="zstd"), "says more than this version knows; use the version that wrote it"),
        (lambda s: s[1].pop("arrays"), "does not describe products .* or a later version wrote it"),
        (
            lambda s: s[1]["arrays"][0].update(data_type={"names": ["a"], "formats": []}),
            "data_type {.* is not known to",
        ),
        (lambda s: s[1]["arrays"][0].update(data_type="i4,("), r"data_type 'i4,\(' is not known to this version"),
        (lambda s: s.clear(), "expected a list of products, found"),
        (lambda s: s[1].update(name="../../x"), "expected a name of at most 64"),
        (lambda s: s[1]["arrays"][0].update(shape=[2**40]), "the shape of a row must be"),
        (lambda s: s[1]["arrays"][0].update(name="other"), "tokens/other/zarr.json is not listed|is not a file of a"),
    ],
)
def test_a_schema_that_this_version_does_not_know_is_refused_in_one_line(module, features, change, said):
    record = parse_json((features / "COMMIT.json").read_bytes(), "mark")
    del record["sha256"]
    change(record["schema"])
    with pytest.raises(StoreError, match=f"(?s)^COMMIT.json: .*{said}") as error:
        parse_mark(seal(record), "COMMIT.json")
    assert "\n" not in str(error.value)


def test_a_mark_of_another_schema_than_the_manifests_is_refused(module, tmp_path):
    path = tmp_path / "store"
    module.build(path)
    record = parse_json((path / "COMMIT.json").read_bytes(), "mark")
    del record["sha256"]
    record["schema"][1]["rows"] = None
    (path / "COMMIT.json").write_bytes(seal(record))
    with pytest.raises(StoreError, match=r"manifest.json: has another schema than the commit mark"):
        Store(path).manifest  # noqa: B018


def test_what_needs_regions_says_what_the_store_has(features):
    store = Store(features)
    for name in ("proposals", "regions", "ground_truth", "text", "teacher", "embed_dim"):
        with pytest.raises(StoreError, match="holds model, tokens, objects, expected a store of regions"):
            getattr(store, name)
    with pytest.raises(StoreError, match="has no per-store product 'text'; it has model"):
        store.read_per_store("text")
    with pytest.raises(StoreError, match="has no per-image product 'object'; it has tokens, objects"):
        store.product("object")
    assert "<th>objects</th>" in store._repr_html_()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "--run", "run", "--cache"), "holds model, tokens, objects, expected a store of regions"),
        (("cache", "look"), "holds model, tokens, objects, expected a store of regions"),
        (("cache", "commit"), "holds model, tokens, objects, expected a store of regions"),
        (("audit", "--data-root", "."), "holds model, tokens, objects, expected a store of regions"),
        (("cache", "repair", "--data-root", "."), "environment.json does not say how it was built"),
    ],
)
def test_a_command_that_needs_regions_refuses_in_one_line(features, tmp_path, command, said):
    done = ezsd(*command, features, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{features}: {said}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_feature_map_is_a_chunk_of_few_rows(tmp_path):
    from ezsd.cache.format.schema import array_spec

    # 256 x 64 x 64 float16 is 2 MiB a row: 256 rows would be half a gigabyte.
    spec = array_spec("m", "<f2", (5, 256, 64, 64), shard_bytes=2**28)
    assert (spec.chunk_rows, spec.shard_rows) == (8, 8)
    assert [array_spec("m", "<f4", (9, width), shard_bytes=1).chunk_rows for width in (1, 16, 2**14, 2**15)] == [
        *(4096, 256, 256, 128)
    ]


def test_nine_arrays_of_a_product_are_read(tmp_path):
    fields = [Field(f"f{number}", "int16") for number in range(9)]
    schema = Schema([PerImage("many", fields)])
    from ezsd.cache import Origin, StoreWriter, commit_shard, images_digest

    manifest = Manifest({"many": Origin(1, {})}, images_digest([1], [8], [8]), schema=schema)
    with StoreWriter.open(tmp_path / "s", manifest, image_ids=[1], widths=[8], heights=[8], block_images=1) as writer:
        rows = {field.name: np.array([number, -number], "i2") for number, field in enumerate(fields)}
        write_block(tmp_path / "s", writer.blocks[0], {"many": RaggedRows(np.array([2], "i4"), rows)})
        for task in writer.commit_tasks():
            commit_shard(tmp_path / "s", task)
        writer.finish()
    product = Store(tmp_path / "s").product("many")
    for _ in range(2):
        assert {name: values.tolist() for name, values in product[1].items()} == {
            name: values.tolist() for name, values in rows.items()
        }
