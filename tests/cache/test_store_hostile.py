"""Any value in any JSON file of a store, sealed as whoever makes a store seals it: a sound result, or one line."""

import hashlib
import json
import random
import shutil
from itertools import islice

import pytest
import storekit

from ezsd.cache import (
    Store,
    StoreError,
    StoreWriter,
    collect,
    commit_shard,
    compare,
    info,
    journaled_bad_images,
    repair,
    verify,
    write_block,
)
from ezsd.cache.files import file_digest
from ezsd.cache.format.packed import packed, unpacked
from ezsd.cache.format.sealed_json import canonical_json, seal
from ezsd.cache.journal.plan import read_block, read_plan
from ezsd.cache.tools.export import export

VALUES = (None, -1, 2**70, "x", [], {}, True, 1.5)
BAD = storekit.IDS[1]
REASON = "truncated JPEG"
SEALED = ("COMMIT.json", "environment.json", "journal/")
SAMPLES = 30
"""Of a store's thousands of places and values, in one test."""


def write_blocks(path, writer):
    for block in writer.pending():
        inside = BAD in storekit.IDS[block.start : block.stop]
        rows = storekit.block_rows(block, most=6, empty={BAD})
        write_block(path, block, rows, bad_images={BAD: REASON} if inside else {})


def finish(path):
    """Go on with an unfinished store to its end."""
    with storekit.open_writer(path, block_images=6) as writer:
        writer.bad_images()
        storekit.write_per_store(writer)
        writer.retry_images([BAD])
        write_blocks(path, writer)
        for task in writer.commit_tasks():
            commit_shard(path, task)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def journaled(tmp_path_factory):
    """A store with everything in its journal, the records of its shards too, and an image that could not be read."""
    path = tmp_path_factory.mktemp("journaled") / "store"
    with storekit.open_writer(path, block_images=6) as writer:
        writer.write_environment({"host": "here"})
        storekit.write_per_store(writer)
        write_blocks(path, writer)
        for task in writer.commit_tasks()[:4]:
            commit_shard(path, task)
    return path


@pytest.fixture(scope="module")
def whole(journaled, tmp_path_factory):
    """The same store, finished."""
    return finish(shutil.copytree(journaled, tmp_path_factory.mktemp("whole") / "store"))


def places(value, at=()):
    """The way to everything in a JSON value; of a list, to its first entries."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*at, key))


def replaced(value, at, new):
    """The value with what lies at a place replaced."""
    if not at:
        return new
    copied = value.copy()
    copied[at[0]] = replaced(value[at[0]], at[1:], new)
    return copied


def put(store, name, at, new):
    """Replace a value in a file, and have every seal and digest fit."""
    record = replaced(json.loads((store / name).read_text()), at, new)
    if isinstance(record, dict) and name.startswith(SEALED):
        record.pop("sha256", None)
        (store / name).write_bytes(seal(record))
        return
    (store / name).write_text(canonical_json(record) + "\n")
    if name.startswith(SEALED):
        return
    mark = json.loads((store / "COMMIT.json").read_text())
    del mark["sha256"]
    found = file_digest(store / name)
    mark["files"][name] = {"size": found.size, "sha256": found.sha256}
    if name == "manifest.json":
        mark["manifest_digest"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()
    (store / "COMMIT.json").write_bytes(seal(mark))


def one_line_or_nothing(call):
    said = ""
    try:
        call()
    except StoreError as error:
        said = str(error)
    assert "\n" not in said


def read_everything(store):
    _ = store.manifest, store.text, store.teacher, store.sizes, store.bad_images, store.environment
    for product in storekit.FIELDS:
        getattr(store, product).batch(store.image_ids.tolist())


def go_on(store):
    with StoreWriter.reopen(store) as writer:
        writer.share()
    finish(store)
    read_everything(Store(store))


def of_unfinished(store, folder):
    """What people do with an unfinished store, the last of it last."""
    yield lambda: [str(one) for one in verify(store, deep=True)]
    yield lambda: info(store)
    yield lambda: journaled_bad_images(store)
    yield lambda: Store(store)
    yield lambda: repair(store)
    yield lambda: collect(store)
    yield lambda: go_on(store)


def of_finished(store, folder):
    """What people do with a finished store, the last of it last."""
    yield lambda: [str(one) for one in verify(store, deep=True)]
    yield lambda: info(store)
    yield lambda: read_everything(Store(store))
    yield lambda: read_everything(Store(store.as_uri(), verify="quick"))
    yield lambda: compare(store, store)
    yield lambda: export(store, folder / "out", format="npz")
    yield lambda: collect(store, strays=True)
    yield lambda: storekit.flip(next((store / "regions/embedding/c").rglob("0")) / "0", 9)
    yield lambda: [str(one) for one in verify(store, deep=True)]
    yield lambda: repair(store, storekit.Images(most=6))


def sampled(store, seed):
    """Files, places in them, and what to put there: every file as often as any other."""
    chance = random.Random(seed)
    names = sorted(file.relative_to(store).as_posix() for file in store.rglob("*.json") if file.is_file())
    ways = {name: list(places(json.loads((store / name).read_text()))) for name in names}
    while True:
        for name in chance.sample(names, len(names)):
            yield name, chance.choice(ways[name]), chance.choice(VALUES)


@pytest.mark.parametrize(("fixture", "uses"), [("journaled", of_unfinished), ("whole", of_finished)])
def test_whatever_a_file_says_is_a_sound_result_or_one_line(request, memory, fixture, uses):
    store = request.getfixturevalue(fixture)
    for number, (name, at, new) in enumerate(islice(sampled(store, 7), SAMPLES)):
        changed = shutil.copytree(store, memory / f"{number}/store")
        put(changed, name, at, new)
        for use in uses(changed, memory / f"{number}"):
            try:
                one_line_or_nothing(use)
            except Exception as error:
                raise AssertionError(f"{name}, {at}: {new!r}") from error
        shutil.rmtree(memory / f"{number}")


# What such values once did


BLOCK = "journal/block-000000/entry.json"


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((("attributes", "bad_images"), value) for value in VALUES if value != {}),
        (("attributes", "bad_images"), {"x": REASON}),
        (("attributes", "bad_images"), {" 3": REASON}),
        (("attributes", "bad_images", str(BAD)), None),
        (("attributes", "counts", "regions"), [2**70] * 6),
        (("attributes", "counts", "regions"), [2**62, 2**62, 2**62, 2**62, 0, 0]),
        (("attributes", "counts", "regions"), [1] * 5),
        (("attributes", "counts", "regions"), [True] * 6),
        (("attributes", "counts", "regions"), packed([5000] * 6)),
        (("attributes", "counts", "regions"), packed([1] * 5)),
        (("attributes", "counts", "regions"), packed([1] * 6)[1:]),
        (("attributes", "counts", "regions"), "é" * 32),
        (("attributes", "counts", "regions"), None),
        (("arrays", "regions/score", "shape"), [1]),
        (("arrays", "regions/score", "dtype"), "<i4"),
    ],
)
def test_a_block_whose_entry_says_what_no_block_does_is_made_anew(journaled, whole, memory, at, value):
    store = shutil.copytree(journaled, memory / "store")
    put(store, BLOCK, at, value)
    with pytest.raises(StoreError, match="block-000000: does not hold the rows of a block; remove this folder"):
        read_block(read_plan(store), 0)
    assert info(store).bad_images == journaled_bad_images(store) == {}
    with storekit.open_writer(store, block_images=6) as writer:
        assert [block.index for block in writer.pending()] == [0]
    assert storekit.contents(finish(store)) == storekit.contents(whole)


@pytest.mark.parametrize("value", [None, "x", packed([1, 2]), [1, 2], "", [2**40], [-1], {}])
def test_a_shard_whose_record_says_what_no_shard_has_is_written_anew(journaled, whole, memory, value):
    store = shutil.copytree(journaled, memory / "store")
    record = min((store / "journal/shards").iterdir())
    left = len(tasks_left(store))
    assert len(unpacked(json.loads(record.read_text())["chunk_crc32"])) == 1
    put(store, record.relative_to(store).as_posix(), ("chunk_crc32",), value)
    assert len(tasks_left(store)) == left + 1
    assert storekit.contents(finish(store)) == storekit.contents(whole)


@pytest.mark.parametrize("value", [2**32, -1, None, True])
def test_a_block_with_a_checksum_that_is_none_is_made_anew(journaled, whole, memory, value):
    store = shutil.copytree(journaled, memory / "store")
    put(store, BLOCK, ("arrays", "regions/score", "crc32"), value)
    with pytest.raises(StoreError, match="entry.json: does not describe a journal entry"):
        read_block(read_plan(store), 0)
    assert storekit.contents(finish(store)) == storekit.contents(whole)


def tasks_left(store):
    with storekit.open_writer(store, block_images=6) as writer:
        return writer.commit_tasks()


@pytest.mark.parametrize("product", ["teacher", "text"])
@pytest.mark.parametrize(
    ("at", "value", "found"),
    [
        (("attributes",), {}, "belongs to another build"),
        (("arrays",), {}, "{}: arrays: expected .*, found .."),
        (("attributes", "user"), None, "{}: the attributes must be a JSON object, found NoneType"),
        (("attributes", "user"), [], "{}: the attributes must be a JSON object, found list"),
        (("attributes", "user"), "x", "{}: the attributes must be a JSON object, found str"),
    ],
)
def test_a_teacher_or_text_of_another_shape_is_one_line_and_made_anew_once_removed(
    journaled, whole, memory, product, at, value, found
):
    store = shutil.copytree(journaled, memory / "store")
    put(store, f"journal/whole-{product}/entry.json", at, value)
    message = rf"whole-{product}: {found.format(product)}; remove this folder and run the build again$"
    with pytest.raises(StoreError, match=message), storekit.open_writer(store, block_images=6) as writer:
        writer.read_per_store(product)
    with pytest.raises(StoreError, match=message):
        finish(store)
    shutil.rmtree(store / f"journal/whole-{product}")
    assert storekit.contents(finish(store)) == storekit.contents(whole)


@pytest.mark.parametrize("value", [None, -1, 2**70, "x", [], True, 1.5, {"x": REASON}, {str(BAD): None}])
def test_bad_images_of_another_shape_are_one_line_for_whoever_asks(whole, memory, value):
    store = shutil.copytree(whole, memory / "store")
    put(store, "zarr.json", ("consolidated_metadata", "metadata", "images", "attributes", "bad_images"), value)
    for ask in (info, lambda path: Store(path).bad_images):
        with pytest.raises(StoreError, match=r"zarr.json: does not say what the root of a store says \(ValueError"):
            ask(store)


@pytest.mark.parametrize("product", ["teacher", "text"])
@pytest.mark.parametrize("value", [{}, {"attributes": None}, {"attributes": "x"}])
def test_rows_are_not_computed_again_with_a_teacher_or_text_without_attributes(whole, memory, product, value):
    store, shard = shutil.copytree(whole, memory / "store"), "regions/embedding/c/0/0"
    metadata = json.loads((store / product / "zarr.json").read_text())
    del metadata["attributes"]
    put(store, f"{product}/zarr.json", (), {**metadata, **value} if value else value)
    storekit.flip(store / shard, 9)
    report = repair(store, storekit.Images(most=6))
    assert (report.repaired, [damage.name for damage in report.left]) == ((), [shard])
