"""What training reads is what was committed, or nothing; and what the system refuses is not called damage."""

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import storekit
from storekit import flip, recommit

import ezsd.cache.files
from ezsd.cache import Store, StoreError, StoreUnreadable, repair, verify
from ezsd.cache.format.commit_mark import CommitMark, read_mark
from ezsd.cache.format.regions import PER_IMAGE, region_schema
from ezsd.cache.format.schema import array_spec
from ezsd.cache.format.zarr_bytes import (
    array_metadata,
    metadata_bytes,
    shard_bytes_on_disk,
    shard_index,
)
from ezsd.cache.journal.plan import read_plan

ROOT = Path(__file__).resolve().parents[2]
MODES = pytest.mark.parametrize("mode", ["quick", "full"])


def everything(path, mode):
    """All that can be read of a store, as bytes."""
    store = Store(path, verify=mode)
    names, text = store.text
    values, attributes = store.teacher
    found = [names, text.tobytes(), values.tobytes(), json.dumps(attributes), store.sizes.tobytes()]
    found += [store.embed_dim, store.manifest.digest, store.bad_images, store.image_ids.tolist()]
    for product in PER_IMAGE:
        batch = getattr(store, product).batch(store.image_ids.tolist())
        found += [batch.counts.tolist(), *(getattr(batch.rows, field.name).tobytes() for field in PER_IMAGE[product])]
    return found


def everything_or_error(path, mode):
    try:
        return everything(path, mode)
    except StoreError as error:
        return error


def is_small(name):
    return "/c/" not in name or not region_schema(storekit.DIM, "float16").holds_rows(name.partition("/c/")[0])


def test_no_flipped_bit_is_ever_read_as_data(copy):
    chance, expected, caught = random.Random(11), everything(copy, "full"), 0
    names = sorted(read_mark(copy).files)
    for name in [*names, *chance.choices(names, k=200), *["COMMIT.json"] * 20]:
        bit = chance.randrange(8 * (copy / name).stat().st_size)
        flip(copy / name, bit)
        for mode in ("full", "quick") if is_small(name) else ("full",):
            found = everything_or_error(copy, mode)
            # Padding and the index of a shard of rows hold no value.
            assert isinstance(found, StoreError) or (found == expected and not is_small(name)), (name, bit)
            caught += isinstance(found, StoreError)
        flip(copy / name, bit)
    assert caught > 250


@MODES
@pytest.mark.parametrize(
    "array", ["regions/offset", "ground_truth/offset", "images/id", "images/height", "text/embedding"]
)
def test_damage_that_lies_about_whose_rows_are_whose_is_found_when_opened(copy, array, mode):
    file = next((copy / array / "c").rglob("0"), None) or copy / array / "c/0"
    file = file if file.is_file() else copy / array / "c/0/0"
    chance, size = random.Random(3), file.stat().st_size
    for _ in range(10):
        bit = chance.randrange(8 * size)
        flip(file, bit)
        with pytest.raises(StoreError, match=f"{file}: its bytes are not those"):
            Store(copy, verify=mode)
        flip(file, bit)


def change_offsets(store, change):
    file = store / "regions/offset/c/0"
    values = np.frombuffer(file.read_bytes(), "<i8", len(storekit.IDS) + 1).copy()
    change(values)
    file.write_bytes(values.tobytes() + file.read_bytes()[values.nbytes :])
    sums = store / "checksums/regions/offset"
    # The checksum too, and the digests: only what offsets must be is left to find it.
    spec = array_spec("regions/offset", "<i8", values.shape, shard_bytes=1)
    crc = zlib.crc32(file.read_bytes()[: spec.chunk_rows * 8])
    data = (sums / "c/0").read_bytes()
    (sums / "c/0").write_bytes(np.uint32(crc).tobytes() + data[4:])
    recommit(store)


def first(values):
    values[0] = 1


def falls(values):
    values[3] = values[2] - 1


def ends(values):
    values[-1] -= 4


@MODES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first, "regions/offset/c/0: begins with 1, expected 0"),
        (falls, "regions/offset/c/0: falls from [0-9]+ to [0-9]+ at entry 3, and offsets never do"),
        (ends, "regions/box/zarr.json: describes float32 \\([0-9]+, 4\\), the arrays beside it need float32"),
    ],
)
def test_offsets_that_no_rows_can_have_are_refused_whatever_the_digests_say(copy, mode, change, message):
    change_offsets(copy, change)
    with pytest.raises(StoreError, match=f"{message}.*the store is damaged"):
        Store(copy, verify=mode).regions[3]


def test_an_array_of_another_length_than_its_fellows_is_refused(copy):
    file = copy / "regions/embedding/zarr.json"
    rows = json.loads(file.read_text())["shape"][0]
    file.write_text(file.read_text().replace(f'"shape":[{rows}', f'"shape":[{rows - 7}'))
    for mode in ("quick", "full"):
        with pytest.raises(StoreError, match="regions/embedding/zarr.json: its bytes are not those"):
            Store(copy, verify=mode)
    recommit(copy)
    for mode in ("quick", "full"):
        with pytest.raises(
            StoreError, match=f"embedding/zarr.json: describes float16 .{rows - 7}, 32.*need float16 .{rows},"
        ):
            Store(copy, verify=mode).regions[3]


def test_two_shards_of_equal_size_that_were_exchanged_are_found(copy):
    score, confidence = copy / "regions/score/c/0", copy / "regions/confidence/c/0"
    a, b = score.read_bytes(), confidence.read_bytes()
    assert len(a) == len(b)
    score.write_bytes(b)
    confidence.write_bytes(a)
    with pytest.raises(StoreError, match="regions/score/c/0: rows 0 to [0-9]+ of regions/score do not match"):
        Store(copy).regions[3]


def test_a_store_checks_all_that_is_read_unless_told_otherwise(copy):
    flip(copy / "regions/box/c/0/0", 0)
    with pytest.raises(StoreError, match="do not match their checksum"):
        Store(copy).regions[70]
    assert len(Store(copy, verify="quick").regions[70].box)


def test_each_chunk_is_checked_once_in_a_process(finished, monkeypatch):
    checked, plain = [], zlib.crc32
    monkeypatch.setattr("ezsd.cache.storage.arrays.zlib.crc32", lambda *data: checked.append(data) or plain(*data))
    store = Store(finished)
    store.regions.batch(storekit.IDS)
    before = len(checked)
    assert before
    store.regions.batch(storekit.IDS)
    assert len(checked) == before


def test_what_is_wrong_with_a_store_reaches_whoever_reads_it_in_another_process(copy):
    data = pickle.dumps(Store(copy).regions)
    flip(copy / "regions/offset/c/0", 9)
    regions = pickle.loads(data)
    with pytest.raises(StoreError, match="regions/offset/c/0: its bytes are not those"):
        regions[3]


def test_a_store_that_was_unpickled_is_looked_at_before_its_bad_images_are(copy):
    data = pickle.dumps(Store(copy))
    root = copy / "zarr.json"
    root.write_text(root.read_text().replace('"attributes":{}', '"attributes":{"bad_images":{"5":"x"}}'))
    with pytest.raises(StoreError, match="zarr.json"):
        _ = pickle.loads(data).bad_images


# The system's errors


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "Too many open files.; .*ulimit -n"),
        (errno.ENFILE, "Too many open files in system.; .*fs.file-max"),
        (errno.EACCES, "Permission denied.; .*chmod"),
        (errno.EIO, "Input/output error.; .*system's log"),
        (errno.ESTALE, "Stale file handle.; .*again"),
        (errno.ETIMEDOUT, "Connection timed out.; nothing is known to be damaged"),
    ],
)
def test_an_error_of_the_system_is_not_called_damage(copy, monkeypatch, number, words):
    shard = "regions/embedding/c/0/0"
    plain = ezsd.cache.files.open_to_read

    def refuse(file):
        if str(file).endswith(shard):
            raise OSError(number, os.strerror(number), str(file))
        return plain(file)

    store = Store(copy)
    monkeypatch.setattr("ezsd.cache.files.open_to_read", refuse)
    monkeypatch.setattr("ezsd.cache.storage.direct.open_to_read", refuse)
    message = f"{shard}: cannot be read .{words}"
    with pytest.raises(StoreUnreadable, match=message) as caught:
        store.regions[70]
    assert "the store is damaged" not in str(caught.value)
    (found,) = verify(copy, deep=True)
    assert (found.kind, found.name, found.rows, found.images) == ("unreadable", shard, (), ())
    with pytest.raises(StoreUnreadable, match=message):
        repair(copy, storekit.Images())
    assert (copy / "COMMIT.json").exists()
    assert not (copy / "journal").exists()
    assert not (copy / ".lock").exists()


@pytest.mark.parametrize("name", ["entry.json", "data.raw"])
def test_journaled_work_that_cannot_be_read_is_not_thrown_away(memory, monkeypatch, name):
    path = memory / "store"
    with storekit.open_writer(path) as writer:
        storekit.journal_all(writer)
        tasks = writer.commit_tasks()
        place = path / "journal/block-000000" / name
        if name == "entry.json":
            # As a process does that has not read it before.
            read_plan(path)._known.clear()
            plain = ezsd.cache.files.open_to_read
            monkeypatch.setattr(
                ezsd.cache.files, "open_to_read", lambda file: denied(file) if file == place else plain(file)
            )
        else:
            monkeypatch.setattr("ezsd.cache.journal.entries.np.memmap", lambda file, *_: denied(file))
        for task in tasks[:1]:
            with pytest.raises(StoreUnreadable, match=f"{name}: cannot be read .Permission denied"):
                storekit.commit_shard(path, task)
        if name == "entry.json":
            with pytest.raises(StoreUnreadable, match="entry.json: cannot be read"):
                writer.pending()
        monkeypatch.undo()
        assert writer.pending() == []
        assert place.exists()


def denied(file):
    raise PermissionError(errno.EACCES, "Permission denied", str(file))


# Descriptors

LARGE = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
from ezsd.cache import Store
for mode in ("quick", "full"):
    store = Store(sys.argv[1], verify=mode)
    kept = [store._here.column("images/id"), store.regions[0].embedding]
    for image in store.image_ids.tolist():
        rows = store.regions[image]
        assert rows.embedding.shape == (4096, 4) and not rows.score.any()
    assert kept[0].tolist() == list(range(1000)) and not kept[1].any()
    print(len(list(Path("/proc/self/fd").iterdir())), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
IMAGES, EACH = 1000, 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory, finished):
    """A store of 1,000 shards in each array of regions, one image each: sparse files, all zeros."""
    path = shutil.copytree(finished, tmp_path_factory.mktemp("large") / "store")
    ids = np.arange(IMAGES, dtype="<i8")

    def array(name, dtype, shape, rows=None, *, shard_bytes=1):
        shutil.rmtree(path / name)
        spec = array_spec(name, dtype, shape, shard_bytes=shard_bytes)
        for index in range(spec.shards):
            file, (start, stop) = path / spec.shard_file(index), spec.shard_range(index)
            file.parent.mkdir(parents=True, exist_ok=True)
            tail = shard_index(spec, stop - start)
            with file.open("wb") as opened:
                if rows is not None:
                    opened.write(rows.tobytes())
                opened.seek(shard_bytes_on_disk(spec, index) - len(tail))
                opened.write(tail)
        (path / name).mkdir(exist_ok=True)
        (path / name / "zarr.json").write_bytes(metadata_bytes(array_metadata(spec)))
        return spec

    def described(name, dtype, shape, rows=None):
        spec = array(name, dtype, shape, rows, shard_bytes=1 if rows is None else 2**20)
        crc = zlib.crc32(bytes(spec.chunk_rows * spec.row_bytes))
        chunks = -(-shape[0] // spec.chunk_rows)
        array(f"checksums/{name}", "<u4", (chunks,), np.full(chunks, crc, "<u4"), shard_bytes=2**20)

    described("images/id", "<i8", (IMAGES,), ids)
    for name in ("images/width", "images/height"):
        described(name, "<i4", (IMAGES,), np.ones(IMAGES, "<i4"))
    described("regions/offset", "<i8", (IMAGES + 1,), np.arange(IMAGES + 1, dtype="<i8") * EACH)
    for field in PER_IMAGE["regions"]:
        described(f"regions/{field.name}", field.dtype, (IMAGES * EACH, *field.row_shape(4)))
    mark = read_mark(path)
    recommit(path)
    (path / "COMMIT.json").write_bytes(
        CommitMark(mark.manifest_digest, 4, mark.embedding, read_mark(path).files).to_bytes()
    )
    return path


@pytest.mark.parametrize(
    ("soft", "hard"), [(64, 64), (64, 1024), *(pytest.param(n, n, marks=pytest.mark.slow) for n in (1024, 8192))]
)
def test_a_thousand_shards_an_array_are_read_with_few_descriptors(large, soft, hard):
    assert len(list((large / "regions/score/c").iterdir())) == IMAGES
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LARGE, str(large), str(soft), str(hard)]
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        kept, limit = map(int, line.split())
        assert kept <= min(limit // 4, 256) + 8


EXHAUSTED = """
import os, sys
from ezsd.cache import Store, StoreUnreadable
store = Store(sys.argv[1])
try:
    while os.open("/dev/null", os.O_RDONLY) < 38:
        pass
    taken = os.open("/dev/null", os.O_RDONLY)
    print(len(store.regions[3].box))
except StoreUnreadable as error:
    assert "damaged" not in str(error)
    print(error)
"""


def with_descriptors(soft, hard, store):
    limits = f"ulimit -Sn {soft} && ulimit -Hn {hard}"
    done = subprocess.run(
        ["bash", "-c", f'{limits} && exec "$@"', "bash", sys.executable, "-c", EXHAUSTED, str(store)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_process_without_descriptors_takes_what_it_is_allowed_and_says_so_else(finished):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 80
    rows = str(len(Store(finished).regions[3].box))
    assert with_descriptors(40, 80, finished) == rows
    said = with_descriptors(40, 40, finished)
    assert re.search(r"cannot be read \(Too many open files\); this process has too many files open: raise", said), said
    # As it says: `ulimit -n`, and the same command.
    assert "raise its limit (`ulimit -n`) and run the same command again" in said
    assert with_descriptors(80, 80, finished) == rows


def test_rows_stay_when_the_array_that_gave_them_is_gone_and_cannot_be_written_to(finished):
    column = Store(finished).image_ids
    assert column.tolist() == storekit.IDS
    with pytest.raises(ValueError, match="WRITEABLE"):
        column.flags.writeable = True
