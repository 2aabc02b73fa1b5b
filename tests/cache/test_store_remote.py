"""Stores behind URLs, and copies that are whole or refused, against a real S3 and a web server on this machine."""

import functools
import http.server
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import storekit
from fsspec.implementations.memory import MemoryFileSystem

from ezsd.cache import (
    Store,
    StoreError,
    StoreIncomplete,
    StoreKeyError,
    collect,
    compare,
    info,
    list_stores,
    repair,
    verify,
)
from ezsd.cache.storage.remote import RemotePlace
from ezsd.cache.tools.transfer import pull, push
from ezsd.pipeline.console.store_messages import list_lines

ROOT = Path(__file__).resolve().parents[2]
WORK = "import sys; from ezsd.cache.tools import transfer; getattr(transfer, sys.argv[1])(sys.argv[2], sys.argv[3])"


@pytest.fixture(scope="module")
def s3():
    """A server that speaks S3, and where its clients find it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def place(request):
    """A URL with nothing there yet."""
    name = secrets.token_hex(4)
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    return f"memory://{name}"


@pytest.fixture
def asked():
    """Method, path and range of every request to the web server."""
    return []


@pytest.fixture
def web(finished, asked):
    """A store on a web server that knows ranges, copied there by any means."""

    class Ranges(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            asked.append(("HEAD", self.path, None))
            super().do_HEAD()

        def do_GET(self):
            wanted = self.headers["Range"]
            asked.append(("GET", self.path, wanted))
            file = Path(self.translate_path(self.path))
            if wanted is None or not file.is_file():
                return super().do_GET()
            start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
            data = file.read_bytes()[start : stop + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None

    handler = functools.partial(Ranges, directory=finished.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{finished.name}"
        server.shutdown()
        thread.join()


def same_store(found, expected):
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    for product, fields in storekit.FIELDS.items():
        a, b = (getattr(store, product).batch(storekit.IDS) for store in (found, expected))
        assert a.counts.tolist() == b.counts.tolist()
        for field in fields:
            np.testing.assert_array_equal(getattr(a.rows, field), getattr(b.rows, field))
    np.testing.assert_array_equal(found.text[1], expected.text[1])
    assert found.teacher[1] == expected.teacher[1]


# Reading


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_a_pushed_store_is_read_where_it_lies(finished, place):
    assert push(finished, place) > 20
    for kept in ("quick", "full"):
        same_store(Store(place, verify=kept), Store(finished))
    with pytest.raises(StoreKeyError, match=f"^{place}: has no image with id 1"):
        Store(place).regions[1]
    with pytest.raises(StoreError, match=f"{place}: is not a local folder; copy it with `pull"):
        Store(place).path  # noqa: B018


def test_a_store_on_a_web_server_is_read_and_pulled(finished, web, tmp_path):
    same_store(Store(web, verify="full"), Store(finished))
    pull(web, tmp_path / "copy")
    assert storekit.contents(tmp_path / "copy") == storekit.contents(finished)


def test_a_store_on_a_web_server_is_opened_by_one_file(web, asked):
    Store(web)
    assert [(method, path.rpartition("/")[2]) for method, path, _ in asked] == [("GET", "COMMIT.json")]


def test_each_file_on_a_web_server_is_compared_when_it_is_read(copy, finished, web):
    for name in ("images/id/c/0", "zarr.json", "manifest.json", "regions/offset/c/0"):
        storekit.flip(finished / name, 99)
        try:
            store = Store(web)
            with pytest.raises(StoreError, match=f"{name}: its bytes are not those that were committed"):
                _ = store.manifest, store.regions[storekit.IDS[0]], store.bad_images
        finally:
            storekit.flip(finished / name, 99)
    same_store(Store(web), Store(copy))


def test_small_arrays_of_another_layout_are_compared_too(finished, web):
    import zarr

    store = shutil.copytree(finished, finished.parent / "layout")
    try:
        values = zarr.open_array(store / "images/id", mode="r")[:]
        shutil.rmtree(store / "images/id")
        zarr.create_array(store / "images/id", data=values, chunks=(4,), compressors=None, zarr_format=3)
        root = json.loads((store / "zarr.json").read_text())
        nodes = root["consolidated_metadata"]["metadata"]
        nodes["images/id"] = json.loads((store / "images/id/zarr.json").read_text())
        (store / "zarr.json").write_text(json.dumps(root))
        storekit.recommit(store)
        url = f"{web.rpartition('/')[0]}/layout"
        same_store(Store(url), Store(finished))
        storekit.flip(store / "images/id/c/1", 3)
        with pytest.raises(StoreError, match="images/id/c/1: its bytes are not those that were committed"):
            _ = Store(url).image_ids
    finally:
        shutil.rmtree(store)


@pytest.mark.parametrize("read", [lambda rows, at: rows[at], lambda rows, at: rows.column("embedding", [at])])
@pytest.mark.parametrize("way", ["chunks", "zarr"])
def test_rows_that_are_fetched_again_are_compared_again(copy, monkeypatch, way, read):
    monkeypatch.setattr("ezsd.cache.storage.remote_arrays._KEPT_BYTES", 0)
    monkeypatch.setattr("ezsd.cache.storage.arrays._KEPT_BYTES", 0)
    if way == "zarr":
        monkeypatch.setattr("ezsd.cache.storage.remote.direct_spec", lambda *_: None)
    url = f"memory://{secrets.token_hex(4)}"
    push(copy, url)
    regions = Store(url).regions
    for image in storekit.IDS:
        read(regions, image)
    files, root = fsspec.url_to_fs(url)
    storekit.flip(copy / "regions/embedding/c/0/0", 13)
    files.pipe_file(f"{root}/regions/embedding/c/0/0", (copy / "regions/embedding/c/0/0").read_bytes())
    read(regions, storekit.IDS[-1])
    with pytest.raises(StoreError, match="rows 0 to .* of regions/embedding do not match their checksum"):
        read(regions, storekit.IDS[0])


@pytest.mark.parametrize("kept", [0, 2**25])
def test_a_batch_asks_for_each_index_once_and_for_no_chunk_twice(web, asked, kept, monkeypatch):
    monkeypatch.setattr("ezsd.cache.storage.remote_arrays._KEPT_BYTES", kept)
    store = Store(web)
    store.regions.batch(storekit.IDS)
    gets = [(path, wanted) for method, path, wanted in asked if method == "GET"]
    assert len(gets) == len(set(gets))
    assert all(method == "GET" for method, *_ in asked)
    del asked[:]
    store.regions.batch(storekit.IDS[::-1])
    assert asked == []


def test_the_rows_of_a_batch_are_asked_for_together(finished, monkeypatch):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    fetch, together = MemoryFileSystem.cat_file, threading.Barrier(5, timeout=20)

    def fetch_beside_others(files, path, start=None, end=None, **options):
        if "/regions/" in path:
            together.wait()
        return fetch(files, path, start=start, end=end, **options)

    store = Store(url)
    batch = store.ground_truth.batch(storekit.IDS)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch_beside_others)
    # Each of five columns is one shard, or more: whoever asks for one after another waits for ever.
    first = store.regions.batch(storekit.IDS[:1])
    assert first.counts.tolist() == Store(finished).regions.batch(storekit.IDS[:1]).counts.tolist()
    assert batch.counts.tolist() == Store(finished).ground_truth.batch(storekit.IDS).counts.tolist()


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_what_is_no_store_or_damaged_is_one_line(finished, place):
    with pytest.raises(StoreError, match=f"^{place}: is not a store \\(no COMMIT.json there\\)"):
        Store(place)
    push(finished, place)
    files, root = fsspec.url_to_fs(place)
    files.pipe_file(f"{root}/regions/score/c/0", b"short")
    with pytest.raises(StoreError, match="regions/score/c/0: is 5 bytes long, expected"):
        Store(place)
    files.rm_file(f"{root}/regions/score/c/0")
    with pytest.raises(StoreError, match="regions/score/c/0: is not there"):
        Store(place)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://a/b", "fsspec knows no nonsense://"),
        ("x://a/b", "fsspec knows no x://; expected s3://"),
        ("gs://bucket/store", r"a library for gs:// is missing .* install `pip install 'ezsd\[gcs\]'`"),
        ("http://127.0.0.1:9/store", "cannot be reached: ClientConnectorError"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(url, message):
    with pytest.raises(StoreError, match=message):
        Store(url)


# Looking after


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_a_copy_is_looked_after_as_a_store_in_a_folder_is(finished, place, tmp_path):
    push(finished, place)
    assert compare(place, finished).content == ()
    assert verify(place) == verify(place, deep=True) == []
    there, here = info(place), info(finished)
    assert (there.path, there.problems, there.complete) == (place, (), True)
    for field in ("images", "products", "manifest", "files", "bytes_", "environment", "format_version", "embedding"):
        assert getattr(there, field) == getattr(here, field), field
    files, root = fsspec.url_to_fs(place)
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    for name in ("regions/embedding/c/1/0", "regions/zarr.json", "checksums/text/embedding/c/0"):
        storekit.flip(damaged / name, 77)
        files.pipe_file(f"{root}/{name}", (damaged / name).read_bytes())
    files.rm_file(f"{root}/regions/offset/c/0")
    (damaged / "regions/offset/c/0").unlink()
    files.pipe_file(f"{root}/regions/notes.txt", b"mine")
    (damaged / "regions/notes.txt").write_bytes(b"mine")
    for deep in (False, True):
        found, expected = verify(place, deep=deep), verify(damaged, deep=deep)
        assert sorted((one.name, one.reason, one.rows, one.images) for one in found) == sorted(
            (one.name, one.reason, one.rows, one.images) for one in expected
        )
    assert str(verify(place)[0]).startswith(f"{place}/regions/")
    with pytest.raises(StoreError, match=r"regions/offset/c/0: is not there"):
        Store(place)


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_stores_below_a_url_are_listed(finished, place):
    push(finished, f"{place}/whole")
    files, root = fsspec.url_to_fs(place)
    files.pipe_file(f"{root}/begun/TRANSFER.json", b"{}")
    files.pipe_file(f"{root}/pictures/a.txt", b"")
    found = list_stores(place)
    assert list(found) == [f"{place}/begun", f"{place}/whole"]
    assert "not all files were copied here" in str(found[f"{place}/begun"])
    assert found[f"{place}/whole"].complete
    lines = list_lines(place)
    assert lines[1].startswith("whole  complete, 11 images")


def test_a_store_on_a_web_server_is_looked_after_but_for_its_list(finished, web):
    assert verify(web, deep=True) == []
    assert info(web).images == len(storekit.IDS)
    assert compare(web, finished).content == ()
    storekit.flip(finished / "regions/embedding/c/1/0", 77)
    try:
        (damage,) = verify(web, deep=True)
        assert damage.images == verify(finished, deep=True)[0].images != ()
    finally:
        storekit.flip(finished / "regions/embedding/c/1/0", 77)
    with pytest.raises(StoreError, match="a web server lists no folders; give the URL of a store to `info\\(\\)`"):
        list_stores(web)


@pytest.mark.parametrize("look", [verify, info, list_stores, lambda url: compare(url, url)])
def test_what_cannot_be_looked_at_is_one_line(look):
    with pytest.raises(StoreError, match=r"^http://127.0.0.1:9/store: (cannot be reached|a web server lists no)"):
        look("http://127.0.0.1:9/store")


@pytest.mark.parametrize("way", ["quick", "full"])
def test_single_rows_are_read_from_large_shards_by_their_chunks(memory, monkeypatch, way):
    store = storekit.build(memory / "store", shard_bytes=2**20)
    url = f"memory://{secrets.token_hex(4)}"
    push(store, url)
    fetch, asked = MemoryFileSystem.cat_file, []

    def fetch_and_note(files, path, start=None, end=None, **options):
        asked.append((path, start, end))
        return fetch(files, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch_and_note)
    far = Store(url, verify=way)
    del asked[:]
    one = far.regions[storekit.IDS[1]].embedding
    np.testing.assert_array_equal(one, Store(store).regions[storekit.IDS[1]].embedding)
    size = (store / "regions/embedding/c/0/0").stat().st_size
    (index, chunks) = [(start, end) for path, start, end in asked if path.endswith("regions/embedding/c/0/0")]
    assert index[1] == size
    assert chunks[1] - chunks[0] < size // 2
    same_store(far, Store(store))
    embeddings = [at for at in asked if at[0].endswith("regions/embedding/c/0/0")]
    assert len(embeddings) == len(set(embeddings)) == 3
    monkeypatch.undo()


@pytest.mark.parametrize("deep", [False, True])
def test_damage_that_is_found_on_the_way_is_listed(finished, deep):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    files, root = fsspec.url_to_fs(url)
    shard, sums = "regions/embedding/c/0/0", "checksums/regions/embedding/c/0"
    files.pipe_file(f"{root}/{shard}", files.cat_file(f"{root}/{shard}")[:-7])
    data = files.cat_file(f"{root}/{sums}")
    files.pipe_file(f"{root}/{sums}", bytes([data[0] ^ 1]) + data[1:])
    assert sorted(found.name for found in verify(url, deep=deep)) == [sums, shard]


@pytest.fixture
def gone(monkeypatch):
    """A list; while it holds something, no file in memory can be fetched."""
    fetch, gone = MemoryFileSystem.cat_file, []

    def fetch_while_it_is_there(*arguments, **options):
        if gone:
            raise OSError("the peer has gone")
        return fetch(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch_while_it_is_there)
    return gone


def test_what_was_read_ahead_during_an_outage_is_asked_for_again(finished, gone):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    store = Store(url)
    _ = store.image_ids
    gone.append(True)
    with pytest.raises(StoreError, match="the peer has gone"):
        store.regions.batch(storekit.IDS)
    # All that was under way has failed.
    store._place.workers().shutdown()
    store._place._pool = None
    gone.clear()
    same_store(store, Store(finished))


def test_a_folder_with_any_name_is_listed_and_one_that_cannot_be_read_is_one_entry(finished, tmp_path, monkeypatch):
    names = ["a b", "lr%41", "ok"]
    for name in names:
        shutil.copytree(finished, tmp_path / name)
    expected = [(tmp_path / name).as_uri() for name in names]
    found = list_stores(tmp_path.as_uri())
    assert list(found) == expected
    assert all(store.complete for store in found.values())
    look = RemotePlace.names

    def look_at_others(place):
        if place.url == expected[1]:
            raise StoreError("may not be read")
        return look(place)

    monkeypatch.setattr(RemotePlace, "names", look_at_others)
    found = list_stores(tmp_path.as_uri())
    assert list(found) == expected
    assert [str(store) for store in found.values() if isinstance(store, StoreError)] == ["may not be read"]


def test_a_web_server_that_states_no_sizes_is_looked_after(copy):
    class Unstated(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            file = copy / self.path.lstrip("/")
            self.send_response(200 if file.is_file() else 404)
            self.end_headers()
            if file.is_file() and self.command == "GET":
                self.wfile.write(file.read_bytes())

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unstated) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert info(url).problems == ()
            assert verify(url) == []
            name = "regions/embedding/c/0/0"
            size = (copy / name).stat().st_size
            for data, said in [(b"ab", "is 2 bytes"), (bytes(size + 9), f"is {size + 1} bytes")]:
                (copy / name).write_bytes(data)
                assert [(one.name, one.reason.partition(" long")[0]) for one in verify(url)] == [(name, said)]
        finally:
            server.shutdown()
            thread.join()


# Copies


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_there_and_back_changes_no_byte(finished, place, tmp_path):
    push(finished, place)
    assert push(finished, place) == 0
    assert pull(place, tmp_path / "copy") > 20
    assert pull(place, tmp_path / "copy") == 0
    assert storekit.contents(tmp_path / "copy") == storekit.contents(finished)
    assert (tmp_path / "copy/environment.json").read_bytes() == (finished / "environment.json").read_bytes()
    assert verify(tmp_path / "copy") == []


# What S3 answers is held by the tests about it.
@pytest.mark.parametrize("place", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_push_mends_a_copy_with_wrong_bytes_of_the_right_size(finished, place):
    push(finished, place)
    files, root = fsspec.url_to_fs(place)
    name = "regions/embedding/c/0/0"
    files.pipe_file(f"{root}/{name}", bytes((finished / name).stat().st_size))
    assert [found.name for found in verify(place, deep=True)] == [name]
    assert push(finished, place) == 1
    assert verify(place, deep=True) == []
    assert push(finished, place) == 0
    files.invalidate_cache()
    assert not files.exists(f"{root}/TRANSFER.json")


def killed(way, source, target, point):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EZSD_FAILPOINT": point}
    done = subprocess.run([sys.executable, "-c", WORK, way, source, target], env=environment, timeout=120, check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("point", ["pull_start.after_rename", "pull.half_written:3", "pull.after_rename:7"])
def test_a_killed_pull_is_refused_and_gone_on_with(finished, tmp_path, point):
    url, copy = finished.as_uri(), tmp_path / "copy"
    killed("pull", url, str(copy), point)
    with pytest.raises(StoreIncomplete, match="not all files were copied here; run the same `pull"):
        Store(copy)
    done = sum(1 for name in storekit.contents(copy) if name.startswith(("checksums/", "ground_truth/")))
    total = len(storekit.contents(finished)) - 1
    assert pull(url, copy) <= total - (6 if point == "pull.after_rename:7" else 0)
    assert done >= (6 if point == "pull.after_rename:7" else 0)
    assert storekit.contents(copy) == storekit.contents(finished)
    assert verify(copy) == []


def test_a_half_pulled_folder_is_named_as_such_by_every_command(finished, tmp_path):
    copy, said = tmp_path / "copy", "copy: not all files were copied here; run the same `pull(...)` again"
    killed("pull", finished.as_uri(), str(copy), "pull.after_rename:7")
    before = storekit.contents(copy)
    for command in (Store, info, verify, collect, repair):
        with pytest.raises(StoreIncomplete, match=re.escape(said)):
            command(copy)
    assert said in str(list_stores(tmp_path)[copy])
    assert storekit.contents(copy) == before


def test_a_pull_killed_just_before_its_mark_needs_no_file_again(finished, tmp_path):
    url, copy = finished.as_uri(), tmp_path / "copy"
    killed("pull", url, str(copy), "pull_mark.before_rename")
    with pytest.raises(StoreIncomplete):
        Store(copy)
    assert pull(url, copy) == 0
    assert storekit.contents(copy) == storekit.contents(finished)


def test_a_killed_push_is_refused_and_gone_on_with(finished, s3):
    url = f"{s3}/{secrets.token_hex(4)}"
    killed("push", str(finished), url, "push.after_file:5")
    with pytest.raises(StoreIncomplete, match="not all files were copied here; run the same `push"):
        Store(url)
    assert push(finished, url) == len(storekit.contents(finished)) - 1 - 5
    same_store(Store(url), Store(finished))


def test_a_file_with_the_right_size_and_wrong_bytes_is_copied_again(finished, tmp_path):
    url, copy = finished.as_uri(), tmp_path / "copy"
    killed("pull", url, str(copy), "pull_mark.before_rename")
    file = copy / "regions/embedding/c/0/0"
    file.write_bytes(bytes(file.stat().st_size))
    assert pull(url, copy) == 1
    assert storekit.contents(copy) == storekit.contents(finished)


def test_a_network_that_fails_while_rows_are_read_is_one_line(finished, gone):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    store = Store(url)
    first = int(store.image_ids[0])
    gone.append(True)
    with pytest.raises(StoreError, match=rf"{url}: cannot be reached: OSError: the peer has gone"):
        _ = store.regions[first]


def test_damage_is_not_copied(copy, tmp_path):
    file = copy / "regions/embedding/c/0/0"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(StoreError, match="embedding/c/0/0: its bytes are not those that were committed"):
        push(copy, f"memory://{secrets.token_hex(4)}")
    with pytest.raises(StoreError, match="embedding/c/0/0: did not arrive as it was committed"):
        pull(copy.as_uri(), tmp_path / "target")
    with pytest.raises(StoreIncomplete):
        Store(tmp_path / "target")


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_damage_in_the_source_takes_nothing_from_a_copy(copy, finished, tmp_path, kind):
    url = (tmp_path / "there").as_uri() if kind == "file" else f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    files, root = fsspec.url_to_fs(url)
    name = "regions/embedding/c/0/0"
    storekit.flip(copy / name, 80)
    data = bytearray((finished / name).read_bytes())
    data[9000] ^= 1
    files.pipe_file(f"{root}/{name}", bytes(data))
    before = {file: files.cat_file(file) for file in files.find(root)}
    with pytest.raises(StoreError, match=f"{name}: its bytes are not those that were committed"):
        push(copy, url)
    assert {file: files.cat_file(file) for file in files.find(root)} == before
    # The other rows of both are as readable as before.
    assert [found.name for found in verify(url, deep=True)] == [name]


def test_a_store_is_not_pushed_to_itself(copy, tmp_path):
    storekit.flip(copy / "regions/embedding/c/0/0", 80)
    before = storekit.contents(copy)
    (tmp_path / "link").symlink_to(copy)
    for target in (copy, tmp_path / "link", copy / "inside"):
        with pytest.raises(StoreError, match="is the folder of the store to be copied, or lies in it; choose another"):
            push(copy, target.as_uri())
    assert storekit.contents(copy) == before


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_reader_of_a_copy_that_is_mended_keeps_the_old_bytes(copy, finished, scheme):
    name = "regions/embedding/c/0/0"
    storekit.flip(copy / name, 80)
    damaged = (copy / name).read_bytes()
    with (copy / name).open("rb") as reader:
        assert push(finished, f"{scheme}://{copy}") == 1
        assert reader.read() == damaged
    assert storekit.contents(copy) == storekit.contents(finished)
    assert not (copy / ".transfer").exists()


@pytest.mark.parametrize("place", ["memory"], indirect=True)
@pytest.mark.parametrize("name", ["environment.json", "COMMIT.json", "TRANSFER.json"])
def test_a_push_mends_what_no_mark_lists(finished, place, name):
    push(finished, place)
    files, root = fsspec.url_to_fs(place)
    files.pipe_file(f"{root}/{name}", (finished / "COMMIT.json").read_bytes().replace(b'"embed_dim":', b'"embed_din":'))
    assert push(finished, place) == (name != "TRANSFER.json")
    assert verify(place, deep=True) == []
    assert push(finished, place) == 0


def test_a_copy_never_mixes_with_anything_else(finished, tmp_path):
    other = storekit.build(tmp_path / "other", block_images=3, embedding="int8")
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    with pytest.raises(StoreError, match="holds another store; choose another URL"):
        push(other, url)
    with pytest.raises(StoreError, match="holds another store; choose another folder"):
        pull(url, other)
    killed("pull", finished.as_uri(), str(tmp_path / "half"), "pull.after_rename:3")
    with pytest.raises(StoreError, match="holds the unfinished copy of another store"):
        pull(other.as_uri(), tmp_path / "half")
    pull(other.as_uri(), tmp_path / "another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds 'notes.txt' but no store"):
        pull(url, tmp_path / "mine")
    with pytest.raises(StoreError, match="holds 'notes.txt', which is not a file of this store"):
        push(finished, (tmp_path / "mine").as_uri())
    with pytest.raises(StoreError, match="is a file; choose a new folder"):
        pull(url, tmp_path / "mine/notes.txt")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    shutil.rmtree(other)
