"""Stores of strangers: nothing is read, sent, written or removed outside the folders named, whatever a mark says."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import secrets
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import storekit
from hypothesis import given
from hypothesis import strategies as st

from ezsd.cache import (
    Store,
    StoreBusy,
    StoreError,
    collect,
    compare,
    info,
    list_stores,
    repair,
    verify,
)
from ezsd.cache.files import FileDigest, file_digest
from ezsd.cache.format.commit_mark import parse_mark, read_mark
from ezsd.cache.format.names import files_below, is_store_file, needed_files
from ezsd.cache.format.regions import region_schema
from ezsd.cache.format.sealed_json import canonical_json, parse_json, seal
from ezsd.cache.journal.commit import commit_shard
from ezsd.cache.storage.remote import RemotePlace
from ezsd.cache.tools.export import export
from ezsd.cache.tools.transfer import pull, push

SECRET = b"mine alone"
BAD_NAMES = [
    "",
    ".",
    "..",
    "../secret",
    "regions/../../secret",
    "regions/./zarr.json",
    "regions//zarr.json",
    "/etc/passwd",
    "//host/zarr.json",
    "C:/zarr.json",
    "regions\\zarr.json",
    "regions/zarr.json\0",
    "regions/zarr.json\n",
    "Regions/zarr.json",
    "regions/BOX/zarr.json",
    "regions/box",
    "regions/box/zarr.json/x",
    "regions/box/c/-1/0",
    "regions/box/c/00/0",
    "regions/box/c/٣/0",
    "regions/other/zarr.json",
    "journal/plan/entry.json",
    "COMMIT.json",
    ".lock",
    "zarr.json ",
    "~/zarr.json",
]


def sealed(store, **changes):
    """The store's commit mark with some values changed, sealed as whoever makes a store seals it."""
    mark = json.loads((store / "COMMIT.json").read_text())
    del mark["sha256"]
    return seal({**mark, **changes})


def listing(store, name, digest=None):
    """The listed files and one more."""
    digest = digest or FileDigest(len(SECRET), hashlib.sha256(SECRET).hexdigest())
    files = json.loads((store / "COMMIT.json").read_text())["files"]
    return {**files, name: {"size": digest.size, "sha256": digest.sha256}}


def recommit(store, *names):
    """Have the mark list some files as they are now."""
    files = json.loads((store / "COMMIT.json").read_text())["files"]
    for name in names:
        found = file_digest(store / name)
        files[name] = {"size": found.size, "sha256": found.sha256}
    (store / "COMMIT.json").write_bytes(sealed(store, files=files))


def everything(folder):
    """All files and links below a folder, with what they hold."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            held = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = held
    return found


class Server(http.server.SimpleHTTPRequestHandler):
    """A web server that says of some files whatever it is told to."""

    endless = ()
    status = 200

    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self.path.endswith(self.endless or ("\0",)):
            super().do_GET()
            return
        self.send_response(self.status)
        self.end_headers()
        try:
            for _ in range(2**14):
                self.wfile.write(bytes(2**20))
        except OSError:
            pass

    def do_HEAD(self):
        if not self.path.endswith(self.endless or ("\0",)):
            super().do_HEAD()
            return
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def web(tmp_path):
    """A web server, on the folder `tmp_path/web`."""
    (tmp_path / "web").mkdir()
    handler = type("Handler", (Server,), {})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=tmp_path / "web")
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


# Names in a mark


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_store_has_is_refused_where_the_mark_is_parsed(finished, name):
    with pytest.raises(
        StoreError, match=r"^here: files: '.*' is not a file of a store; ezsd wrote no such mark"
    ) as found:
        parse_mark(sealed(finished, files=listing(finished, name)), "here")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, r"files: expected an object, found \[\]"),
        ({"files": None}, "files: expected an object, found None"),
        ({"files": {}}, "files: manifest.json is not listed, and every store has it"),
        ({"files": {"zarr.json": 3}}, "files: zarr.json: expected a size from 0 and a sha256, found 3"),
        ({"files": {"zarr.json": {"size": 3}}}, "expected a size from 0 and a sha256, found {'size': 3}"),
        ({"files": {"zarr.json": {"size": "3", "sha256": "0" * 64}}}, "expected a size from 0"),
        ({"files": {"zarr.json": {"size": True, "sha256": "0" * 64}}}, "expected a size from 0"),
        ({"files": {"zarr.json": {"size": -1, "sha256": "0" * 64}}}, "expected a size from 0"),
        ({"files": {"zarr.json": {"size": 1.5, "sha256": "0" * 64}}}, "expected a size from 0"),
        ({"files": {"zarr.json": {"size": 2**80, "sha256": "0" * 64}}}, "expected a size from 0"),
        ({"files": {"zarr.json": {"size": 3, "sha256": "0" * 63 + "\n"}}}, "expected a size from 0 and a sha256"),
        ({"embed_dim": "32"}, "embed_dim: expected a whole number from 1, found '32'"),
        ({"embed_dim": 0}, "embed_dim: expected a whole number from 1, found 0"),
        ({"embedding": "float8"}, "embedding: expected float16 or int8, found 'float8'"),
        ({"embedding": ["int8"]}, "embedding: expected float16 or int8"),
        ({"manifest_digest": 7}, "manifest_digest: expected 64 hexadecimal digits"),
        ({"manifest_digest": "../x"}, "manifest_digest: expected 64 hexadecimal digits"),
    ],
)
def test_a_mark_of_another_shape_is_one_line_for_every_command(copy, tmp_path, changes, message):
    (copy / "COMMIT.json").write_bytes(sealed(copy, **changes))
    url = copy.as_uri()
    for command in (Store, info, verify, repair, collect, lambda store: compare(store, store)):
        with pytest.raises(StoreError, match=message) as found:
            command(copy)
        assert "\n" not in str(found.value)
    for command in (
        lambda: push(copy, (tmp_path / "t").as_uri()),
        lambda: pull(url, tmp_path / "t"),
        lambda: Store(url),
    ):
        with pytest.raises(StoreError, match=message):
            command()
    assert not (tmp_path / "t").exists()


def test_json_nested_without_end_is_damage():
    for depth in (100, 100_000):
        with pytest.raises(StoreError, match=r"^here: (JSON nested|not valid JSON)"):
            parse_json('{"a":' + "[" * depth + "]" * depth + "}", "here")


def test_two_files_of_one_name_are_no_mark(finished):
    text = sealed(finished).decode()
    name = '"zarr.json":{"sha256":'
    with pytest.raises(StoreError, match="do not match the checksum"):
        parse_mark(text.replace(name, f'"zarr.json":{{"sha256":"{"0" * 64}","size":1}},{name}', 1).encode(), "here")


PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "~", "c", "0", "12", "zarr.json", "regions", "box", "checksums", "manifest.json"]),
    st.text(max_size=6),
)


@given(st.one_of(st.lists(PARTS, min_size=1, max_size=6).map("/".join), st.text(max_size=40)))
def test_whatever_name_a_mark_may_list_stays_below_the_store(name):
    assert_contained(name)


@given(st.from_regex(r"(?:checksums/)?(?:images|regions|text)/?(?:box|id|offset|\.\.)?/?(?:zarr\.json|c(?:/\d+)+)"))
def test_names_near_the_known_ones_stay_below_the_store_too(name):
    assert_contained(name)


def assert_contained(name):
    if is_store_file(name, region_schema(storekit.DIM, "int8")):
        store = Path("/a/store")
        parts = name.split("/")
        assert not set(parts) & {"", ".", ".."}
        assert re.fullmatch(r"[a-z0-9_./]+", name)
        assert Path(os.path.normpath(store / name)) == store / name
        assert (store / name).is_relative_to(store)


def test_every_file_that_stores_have_is_a_name_of_the_format(finished, tmp_path):
    int8 = storekit.build(tmp_path / "int8", embedding="int8")
    for store in (finished, int8):
        mark = read_mark(store)
        assert set(needed_files(mark.schema)) < set(mark.files)
        names = list(mark.files)
        # No name is another's folder, and none differs from another by case alone.
        assert not any(other.startswith(f"{name}/") for name in names for other in names)
        assert len({name.casefold() for name in names}) == len(names)


# Outside, by a name


@pytest.mark.parametrize("name", ["../../victim/.bashrc", "{absolute}/victim/authorized_keys"])
@pytest.mark.parametrize("way", ["file", "http", "memory"])
def test_pull_writes_nothing_outside(finished, web, tmp_path, way, name):
    hostile, target = tmp_path / "web/a/b/store", tmp_path / "x/y/target"
    shutil.copytree(finished, hostile)
    (tmp_path / "web/a/victim").mkdir()
    (tmp_path / "web/a/victim/.bashrc").write_bytes(SECRET)
    target.parent.mkdir(parents=True)
    listed = listing(finished, name.format(absolute=tmp_path))
    (hostile / "COMMIT.json").write_bytes(sealed(finished, files=listed))
    url = {"file": hostile.as_uri(), "http": f"{web[0]}/a/b/store", "memory": f"memory://{secrets.token_hex(4)}"}[way]
    if way == "memory":
        fsspec.filesystem("memory").put(str(hostile), url, recursive=True)
    before = everything(tmp_path)
    with pytest.raises(StoreError, match="is not a file of a store"):
        pull(url, target)
    assert everything(tmp_path) == before


def test_nothing_outside_is_sent_mended_exported_or_removed(copy, tmp_path):
    (tmp_path / "secret").write_bytes(SECRET)
    (copy / "COMMIT.json").write_bytes(sealed(copy, files=listing(copy, "../secret")))
    before, url = everything(tmp_path), f"memory://{secrets.token_hex(4)}"
    calls = {
        "push": lambda: push(copy, url),
        "repair": lambda: repair(copy, storekit.Images()),
        "export": lambda: export(copy, tmp_path / "out", format="npz"),
        "gc": lambda: collect(copy, strays=True),
        "verify": lambda: verify(copy, deep=True),
        "info": lambda: info(copy),
        "Store": lambda: Store(copy),
        "build": lambda: storekit.build(copy),
    }
    for call in calls.values():
        with pytest.raises(StoreError, match="'../secret' is not a file of a store"):
            call()
    assert everything(tmp_path) == before
    assert not fsspec.filesystem("memory").exists(url)


def test_a_store_set_aside_is_not_trusted_either(copy, tmp_path):
    (copy / "COMMIT.json").unlink()
    mark = sealed(storekit.build(tmp_path / "other"), files=listing(tmp_path / "other", "../x"))
    (copy / "INCOMPLETE.json").write_bytes(mark)
    for command in (repair, verify, info, collect):
        with pytest.raises(StoreError, match="INCOMPLETE.json: files: '../x' is not a file of a store"):
            command(copy)


# Outside, by a link


@pytest.fixture
def away(tmp_path):
    """A folder of somebody's own."""
    (tmp_path / "away/sub").mkdir(parents=True)
    (tmp_path / "away/notes.txt").write_bytes(SECRET)
    (tmp_path / "away/sub/more.txt").write_bytes(SECRET)
    return tmp_path / "away"


@pytest.mark.parametrize("name", ["regions", "regions/box/c", "regions/box/c/0/0", "environment.json", "zarr.json"])
def test_a_link_out_of_a_store_is_never_read_through_or_written_through(copy, away, tmp_path, name):
    moved = away / "moved"
    (copy / name).rename(moved)
    (copy / name).symlink_to(moved)
    before, url = everything(tmp_path), f"memory://{secrets.token_hex(4)}"
    said = f"{re.escape(str(copy / name))}: is a link that leads out of the store, to {re.escape(str(moved))}"
    for call in (
        lambda: push(copy, url),
        lambda: repair(copy, storekit.Images()),
        lambda: verify(copy, deep=True),
        lambda: info(copy),
        lambda: Store(copy, verify="full"),
        lambda: collect(copy, strays=True),
        lambda: export(copy, tmp_path / "out", format="npz"),
        lambda: pull(copy.as_uri(), tmp_path / "target"),
    ):
        with pytest.raises(StoreError, match=said):
            call()
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    assert everything(tmp_path) == before
    assert not fsspec.filesystem("memory").exists(url)


def test_links_that_stay_inside_and_a_link_to_the_store_itself_are_no_matter(copy, tmp_path):
    (copy / "regions/box/c/0/0").rename(copy / "regions/box/kept")
    (copy / "regions/box/c/0/0").symlink_to("../../kept")
    (tmp_path / "link").symlink_to(copy)
    assert Store(tmp_path / "link", verify="full").regions[70].box.shape[1] == 4
    assert [found.name for found in verify(tmp_path / "link", deep=True)] == ["regions/box/kept"]


def test_a_copy_is_not_written_through_links_in_its_folder(finished, away, tmp_path):
    target = tmp_path / "target"
    for name in ("regions", ".transfer"):
        target.mkdir()
        (target / name).symlink_to(away)
        if name == "regions":
            with pytest.raises(StoreError, match="holds 'regions' but no store"):
                pull(finished.as_uri(), target)
            # As if a copy had been begun here.
            shutil.copy(finished / "COMMIT.json", target / "TRANSFER.json")
            with pytest.raises(StoreError, match="regions: is a link that leads out of the store"):
                pull(finished.as_uri(), target)
            shutil.rmtree(target)
        else:
            with pytest.raises(StoreError, match="holds '.transfer' but no store"):
                pull(finished.as_uri(), target)
    assert sorted(p.name for p in away.rglob("*")) == ["more.txt", "notes.txt", "sub"]


def test_a_push_to_a_folder_is_not_written_through_links_in_it(finished, away, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "regions").symlink_to(away)
    with pytest.raises(StoreError, match="regions"):
        push(finished, target.as_uri())
    assert sorted(p.name for p in away.rglob("*")) == ["more.txt", "notes.txt", "sub"]


def test_a_build_is_not_gone_on_with_through_links(away, tmp_path):
    store = tmp_path / "store"
    with storekit.open_writer(store) as writer:
        storekit.write_per_store(writer)
        for block in writer.pending():
            storekit.write_one(store, block)
        tasks = writer.commit_tasks()
        (store / "regions").symlink_to(away)
        task = next(task for task in tasks if task.file.startswith("regions/"))
        with pytest.raises(StoreError, match="regions: is a link that leads out of the store"):
            commit_shard(store, task)
        (store / "regions").unlink()
        for task in tasks:
            commit_shard(store, task)
        (store / "text").symlink_to(away)
        with pytest.raises(StoreError, match="text: is a link that leads out of the store"):
            writer.finish()
    (store / "text").unlink()
    (store / "journal").rename(away / "journal")
    (store / "journal").symlink_to(away / "journal")
    before = everything(away)
    for command in (info, verify, collect, Store, storekit.open_writer):
        with pytest.raises(StoreError, match="journal: is a link that leads out of the store"):
            command(store)
    assert everything(away) == before


def test_what_is_sent_as_environment_is_the_record_of_a_build(copy, tmp_path):
    (copy / "environment.json").write_bytes(SECRET)
    url = f"memory://{secrets.token_hex(4)}"
    with pytest.raises(StoreError, match="environment.json: not valid JSON"):
        push(copy, url)
    assert not fsspec.filesystem("memory").exists(url)
    with pytest.raises(StoreError, match="environment.json: not valid JSON"):
        pull(copy.as_uri(), tmp_path / "target")


def test_a_link_in_place_of_the_lock_makes_no_file(copy, tmp_path):
    (copy / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(StoreError, match=r"\.lock: is a link, expected a file of ezsd's own; remove it"):
        repair(copy)
    assert not (tmp_path / "made").exists()


# Sizes


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *((name, 206) for name in ("COMMIT.json", "environment.json", "zarr.json", "regions/box/c/0/0")),
        ("regions/box/c/0/0", 200),
        *(pytest.param(name, 200, marks=pytest.mark.slow) for name in ("COMMIT.json", "environment.json", "zarr.json")),
    ],
)
def test_a_server_that_never_stops_is_left(finished, web, tmp_path, monkeypatch, name, status):
    web[1].status = status
    monkeypatch.setattr("ezsd.cache.storage.remote.MOST_UNSTATED", 2**20)
    shutil.copytree(finished, tmp_path / "web/store")
    web[1].endless = (f"store/{name}",)
    with pytest.raises(StoreError, match=rf"store/{name}: is longer than the [\d,]+ bytes it may have"):
        pull(f"{web[0]}/store", tmp_path / "target")
    written = sum(p.lstat().st_size for p in (tmp_path / "target").rglob("*") if p.is_file())
    assert written < 2 * sum(p.stat().st_size for p in finished.rglob("*") if p.is_file())


def test_a_store_that_cannot_fit_is_not_begun(copy, tmp_path):
    files = json.loads((copy / "COMMIT.json").read_text())["files"]
    files["regions/embedding/c/0/0"]["size"] = 2**60
    (copy / "COMMIT.json").write_bytes(sealed(copy, files=files))
    with pytest.raises(StoreError, match=r"1,152,921,504,[0-9,]+ bytes are still to be written here, but only"):
        pull(copy.as_uri(), tmp_path / "target")
    assert files_below(tmp_path / "target") == ["TRANSFER.json"]


# Metadata that describe nothing


def change(metadata, path, value):
    *above, last = path
    for key in above:
        metadata = metadata[key]
    metadata[last] = value


INNER = ("codecs", 0, "configuration", "chunk_shape")
OUTER = ("chunk_grid", "configuration", "chunk_shape")


@pytest.mark.parametrize("array", ["regions/score", "images/id", "text/embedding", "checksums/regions/score"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (OUTER, [2**40]),
        (OUTER, [2**70]),
        (OUTER, [0]),
        (OUTER, ["256"]),
        (INNER, [0]),
        (INNER, [-256]),
        (INNER, [2**40]),
        (("shape",), [-5]),
        (("shape",), [2**60]),
        (("shape",), [2**40]),
        (("shape",), []),
        (("shape",), "4096"),
        (("shape",), [True]),
        (("data_type",), "object"),
        (("data_type",), "float9"),
        (("codecs",), [{"name": "nonsense", "configuration": {}}]),
        (("codecs",), {}),
        (("chunk_grid",), None),
    ],
)
def test_metadata_that_describe_no_array_are_one_line(copy, array, path, value):
    file = copy / array / "zarr.json"
    metadata = json.loads(file.read_text())
    if path in (INNER, OUTER) or (path == ("shape",) and len(value) == 1):
        trailing = metadata["shape"][1:]
        value = [*value, *trailing]
    change(metadata, path, value)
    file.write_text(canonical_json(metadata) + "\n")
    recommit(copy, f"{array}/zarr.json")
    with pytest.raises(StoreError) as found:
        read_all(copy)
    assert "\n" not in str(found.value)
    for shard in (copy / array / "c").rglob("*"):
        if shard.is_file():
            storekit.flip(shard, 9)
    # Neither must fall over them while it tells, or mends, what is lost.
    with contextlib.suppress(StoreError):
        assert verify(copy, deep=True)
    with contextlib.suppress(StoreError):
        assert repair(copy, storekit.Images()).left


def read_all(path):
    store = Store(path, verify="full")
    _ = store.regions.batch(storekit.IDS), store.text, store.sizes


# Files that the mark does not list


@pytest.mark.parametrize("way", ["mapped", "zarr", "url"])
@pytest.mark.parametrize("array", ["images/id", "regions/score", "checksums/regions/score"])
def test_no_shard_is_read_that_the_mark_does_not_list(copy, tmp_path, array, way):
    outside = tmp_path / "outside"
    (copy / array / "c/0").rename(outside)
    (copy / array / "c/0").symlink_to(outside)
    files = json.loads((copy / "COMMIT.json").read_text())["files"]
    del files[f"{array}/c/0"]
    if way == "zarr":
        metadata = json.loads((copy / array / "zarr.json").read_text())
        change(metadata, ("attributes",), {"of": "another writer"})
        change(metadata, ("chunk_key_encoding", "configuration"), {"separator": "."})
        (copy / array / "zarr.json").write_text(canonical_json(metadata) + "\n")
        (copy / array / "c.0").symlink_to(outside)
        found = file_digest(copy / array / "zarr.json")
        files[f"{array}/zarr.json"] = {"size": found.size, "sha256": found.sha256}
    (copy / "COMMIT.json").write_bytes(sealed(copy, files=files))
    with pytest.raises(StoreError, match=rf"{array}/c.0: belongs to an array, and the commit mark does not list it"):
        read_all(copy.as_uri() if way == "url" else copy)


@pytest.mark.parametrize(
    ("array", "changes", "words"),
    [
        ("images/id", {"data_type": "float64", "fill_value": "NaN"}, "need int64"),
        ("checksums/regions/score", {"data_type": "int32", "fill_value": -1}, "need uint32"),
        ("text/embedding", {"data_type": "int32", "fill_value": -1}, "need float32"),
        ("teacher/values", {"data_type": "int32", "fill_value": -1}, "need float32"),
    ],
)
def test_arrays_of_another_type_than_the_format_has_are_refused(copy, array, changes, words):
    file = copy / array / "zarr.json"
    file.write_text(canonical_json({**json.loads(file.read_text()), **changes}) + "\n")
    recommit(copy, f"{array}/zarr.json")
    with pytest.raises(StoreError, match=rf"{array}/zarr.json: describes .* {words}"):
        _ = read_all(copy), Store(copy).teacher


@pytest.mark.parametrize("attributes", [None, [], {}, {"names": "abc"}, {"names": ["circle"]}, {"names": [1, 2, 3]}])
def test_text_rows_without_their_names_are_refused(copy, attributes):
    file = copy / "text/zarr.json"
    file.write_text(canonical_json({**json.loads(file.read_text()), "attributes": attributes}) + "\n")
    recommit(copy, "text/zarr.json")
    with pytest.raises(StoreError, match=r"text/zarr.json( has no attributes|: has no attributes| does not name)"):
        _ = Store(copy).text


def test_a_root_without_images_is_one_line_for_whoever_asks_for_bad_images(copy):
    (copy / "zarr.json").write_text("{}\n")
    recommit(copy, "zarr.json")
    with pytest.raises(StoreError, match=r"zarr.json: does not say what the root of a store says \(KeyError"):
        _ = Store(copy).bad_images


@pytest.mark.parametrize("name", ["\\ud800", "\\uDFFF"])
def test_half_a_character_in_a_mark_is_one_line(name):
    with pytest.raises(StoreError, match=r"^here: not valid JSON \("):
        parse_mark(f'{{"format_version":2,"x":"{name}","sha256":""}}'.encode(), "here")


def test_a_pipe_in_a_store_is_never_waited_for(copy):
    (copy / "COMMIT.json").unlink()
    os.mkfifo(copy / "COMMIT.json")
    for command in (Store, info, verify, repair, collect):
        with pytest.raises(StoreError, match=r"COMMIT.json: cannot be read \(is not a regular file\)"):
            command(copy)


def test_a_file_that_describes_a_store_is_read_as_far_as_one_can_be_long(copy, monkeypatch):
    monkeypatch.setattr("ezsd.cache.files.MOST_UNSTATED", 100)
    with pytest.raises(StoreError, match=r"COMMIT.json: is longer than the 100 bytes it may have; it is not read"):
        Store(copy)


@pytest.mark.parametrize("url", ["s3://", "file://", "file:///", "memory://", "https://"])
def test_a_url_that_names_no_place_is_not_the_working_folder(copy, tmp_path, monkeypatch, url):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StoreError, match=f"^{url}: names no place of a store"):
        push(copy, url)
    assert not list((tmp_path / "here").iterdir())


def test_verify_tells_of_a_damaged_store_whose_offsets_are_made_up(copy):
    for array, value in (("regions/offset", 0), ("regions/score", 0)):
        del value
        storekit.flip(next(f for f in (copy / array / "c").rglob("*") if f.is_file()), 9)
    recommit(copy, "regions/offset/c/0")
    assert any(damage.array == "regions/score" for damage in verify(copy, deep=True))


def test_a_file_that_a_web_server_lacks_is_named_as_that(finished, web, tmp_path):
    url, _ = web
    shutil.copytree(finished, tmp_path / "web/store")
    (tmp_path / "web/store/text/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"/store/text/zarr.json: is not there; the store is damaged"):
        _ = Store(f"{url}/store").text


@pytest.mark.parametrize(
    "value", [None, [], {}, {"images": "many"}, {"images": 3, "rows": []}, {"images": 3, "rows": {}}]
)
def test_a_root_that_says_nothing_of_the_store_is_one_line(copy, tmp_path, value):
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["ezsd_store"] = value
    (copy / "zarr.json").write_text(canonical_json(root) + "\n")
    recommit(copy, "zarr.json")
    with pytest.raises(StoreError, match="zarr.json: does not say what the root of a store says"):
        info(copy)
    assert isinstance(list_stores(tmp_path)[copy], StoreError)


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": []},
        {"arrays": {"id": 3}},
        {"arrays": {"id": {"dtype": "|O", "shape": [1], "offset": 0, "crc32": 0}}},
        {"arrays": {"id": {"dtype": "<i8", "shape": [2**40], "offset": 0, "crc32": 0}}},
        {"arrays": {"id": {"dtype": "<i8", "shape": [-1], "offset": 0, "crc32": 0}}},
        {"attributes": None},
        {"attributes": {"format_version": 2}},
        {"bytes": "many"},
    ],
)
def test_a_journal_entry_of_another_shape_is_one_line(tmp_path, changes):
    store = tmp_path / "store"
    storekit.open_writer(store).close()
    file = store / "journal/plan/entry.json"
    record = json.loads(file.read_text())
    del record["sha256"]
    file.write_bytes(seal({**record, **changes}))
    for command in (info, verify, Store, storekit.open_writer, collect):
        with pytest.raises(StoreError) as found:
            command(store)
        assert "\n" not in str(found.value)


# gc


def test_gc_removes_what_ezsd_made_and_keeps_all_else(copy, away):
    before = storekit.contents(copy)
    for name in ("journal/block-000000/data.raw", ".transfer/regions.box", "runs/r1/model.pt", "regions/notes.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"123")
    (copy / "TRANSFER.json").write_bytes(b"1")
    (copy / "empty/folder").mkdir(parents=True)
    (copy / "broken").symlink_to("nowhere")
    (copy / "photos").symlink_to(away)
    (copy / "journal/link").symlink_to(away)
    own = {"journal/block-000000/data.raw": 3, "journal/link": len(str(away)), ".transfer/regions.box": 3}
    own |= {"TRANSFER.json": 1}
    strays = {"broken": 7, "empty/folder/": 0, "photos": len(str(away)), "regions/notes.txt": 3, "runs/r1/model.pt": 3}
    whole = everything(copy.parent)
    found = collect(copy, dry_run=True)
    assert (found.removed, found.kept) == (own, strays)
    found = collect(copy, strays=True, dry_run=True)
    assert (found.removed, found.kept) == (own | strays, {})
    assert everything(copy.parent) == whole
    found = collect(copy)
    assert (found.removed, found.kept) == (own, strays)
    left = {name for name in everything(copy.parent) if "journal" not in name and "TRANSFER" not in name}
    assert set(everything(copy.parent)) == {name for name in left if ".transfer" not in name}
    found = collect(copy, strays=True)
    assert (found.removed, found.kept) == (strays, {})
    assert everything(copy).keys() == everything(storekit.build(copy)).keys()
    assert storekit.contents(copy) == before
    assert sorted(p.name for p in away.rglob("*")) == ["more.txt", "notes.txt", "sub"]


def test_a_journal_that_is_a_link_is_a_stray_of_a_finished_store(copy, away):
    (copy / "journal").symlink_to(away)
    assert collect(copy).kept == {"journal": len(str(away))}
    assert collect(copy, strays=True).removed == {"journal": len(str(away))}
    assert sorted(p.name for p in away.rglob("*")) == ["more.txt", "notes.txt", "sub"]


def test_broken_links_harm_nobody(copy, tmp_path):
    (copy / "broken").symlink_to(tmp_path / "nowhere")
    (copy / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert info(copy).problems == ()
    assert Store(copy).embed_dim == storekit.DIM
    assert list(list_stores(tmp_path)) == [copy]
    assert [str(found).partition(": ")[2] for found in verify(copy)] == [
        "is a link that does not belong to the store"
    ] * 2
    assert sorted(collect(copy).kept) == ["broken", "loop"]
    assert sorted(collect(copy, strays=True).removed) == ["broken", "loop"]
    assert verify(copy) == []
    assert not (copy / ".lock").exists()


# URLs


@pytest.mark.parametrize("name", ["my stores", "Größe 100%", "a%20b", "x::y", "#1?", "圆"])
def test_a_folder_is_the_same_by_its_path_and_by_its_url(finished, tmp_path, name):
    there = tmp_path / name / "store"
    assert push(finished, there.as_uri()) > 20
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert Store(there).regions[70].box.tolist() == Store(there.as_uri()).regions[70].box.tolist()
    pull(there.as_uri().replace("file:///", "file://localhost/"), tmp_path / "back")
    assert storekit.contents(tmp_path / "back") == storekit.contents(finished)


def test_a_url_as_it_was_typed_still_means_its_folder(finished, tmp_path):
    push(finished, f"file://{tmp_path}/my stores/100% ü")
    assert Store(tmp_path / "my stores/100% ü").embed_dim == storekit.DIM


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://host/store", "names the host 'host', and file:// reaches this machine alone; write file:///FOLDER"),
        ("file://store", "names the host 'store'"),
        ("file:///a%00b", "names no folder"),
    ],
)
def test_a_file_url_of_another_machine_is_one_line(finished, tmp_path, url, message):
    for call in (lambda: Store(url), lambda: push(finished, url), lambda: pull(url, tmp_path / "target")):
        with pytest.raises(StoreError, match=f"^{url}: {message}"):
            call()
    assert not (tmp_path / "target").exists()


# Two at once


def test_a_second_pull_into_a_folder_is_refused(finished, tmp_path, monkeypatch):
    target, refused = tmp_path / "target", []
    pieces = RemotePlace.pieces

    def second(place, name):
        if not refused:
            with pytest.raises(StoreBusy) as found:
                pull(finished.as_uri(), target)
            refused.append(str(found.value))
        return pieces(place, name)

    monkeypatch.setattr(RemotePlace, "pieces", second)
    pull(finished.as_uri(), target)
    assert refused == [
        f"{target}: another process is copying a store to here; wait for it to end, or choose another folder"
    ]
    assert storekit.contents(target) == storekit.contents(finished)
    assert pull(finished.as_uri(), target) == 0
    assert not (target / ".lock").exists()
