"""Whose fault it is: wrong bytes are damage, a network that fails is out of reach, the system speaks for itself."""

import contextlib
import errno
import functools
import gzip
import http.server
import io
import os
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
import zarr

from ezsd.cache import Store, StoreError, StoreUnreadable
from ezsd.cache.files import system_error
from ezsd.cache.tools.transfer import pull, push

ROOT = Path(__file__).resolve().parents[2]
SHARD = "regions/embedding/c/0/0"
FIRST = storekit.IDS[0]


def by_zarr(store, **layout):
    """Rewrite the embeddings of regions as another writer may, so that they are read through zarr."""
    array = zarr.open_array(store / "regions/embedding", mode="r")
    values = array[:]
    shutil.rmtree(store / "regions/embedding")
    new = zarr.create_array(
        store / "regions/embedding", shape=values.shape, dtype=values.dtype, chunks=(256, storekit.DIM), **layout
    )
    new[:] = values
    storekit.recommit(store)
    return store


# The system's errors within zarr


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9 GiB"), r"Unable to allocate 9 GiB\); the system has no memory for it"),
        (MemoryError(), r"Cannot allocate memory\); the system has no memory for it"),
        (OSError(errno.EIO, "Input/output error"), r"Input/output error\); the disk or the network has a fault"),
        (TimeoutError("took too long"), r"took too long\); nothing is known to be damaged"),
        (RuntimeError("can't start new thread"), r"can't start new thread\); nothing is known to be damaged"),
        (ImportError("No module named 'codec'"), r"No module named 'codec'\); nothing is known to be damaged"),
    ],
)
@pytest.mark.parametrize("way", ["folder", "file", "memory"])
def test_what_the_system_cannot_do_while_zarr_reads_is_not_called_damage(copy, monkeypatch, error, words, way):
    url = {"folder": copy, "file": copy.as_uri(), "memory": f"memory://{secrets.token_hex(4)}"}[way]
    by_zarr(copy)
    if way == "memory":
        push(copy, url)
    store = Store(url)
    _ = store.image_ids
    monkeypatch.setattr("zarr.Array.__getitem__", raising(error))
    with pytest.raises(StoreUnreadable, match=rf"regions/[a-z_/]+: cannot be read \({words}") as found:
        _ = store.regions[FIRST]
    assert "the store is damaged" not in str(found.value)


def test_memory_that_runs_out_while_a_url_is_asked_is_not_the_networks_fault(finished, monkeypatch):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.find", raising(MemoryError()))
    with pytest.raises(StoreUnreadable, match="cannot be read .Cannot allocate memory"):
        Store(url)


def test_an_interrupt_while_zarr_reads_stays_one(copy, monkeypatch):
    store = Store(by_zarr(copy))
    monkeypatch.setattr("zarr.Array.__getitem__", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        _ = store.regions[FIRST]


@pytest.mark.parametrize(
    ("error", "system"),
    [
        (gzip.BadGzipFile("Not a gzipped file"), False),
        (OSError("Invalid data stream"), False),
        (ValueError("x"), False),
        (FileNotFoundError("x"), True),
        (ConnectionResetError(), True),
        (OSError(errno.EIO, "x"), True),
    ],
)
def test_a_codecs_own_error_is_told_from_the_systems(error, system):
    assert (system_error(error) is error) == system
    wrapped = RuntimeError("decoding failed")
    wrapped.__cause__ = error
    assert (system_error(wrapped) is error) == system


def test_a_link_that_the_system_does_not_let_be_followed_is_not_called_one_that_leads_out(copy, monkeypatch):
    (copy / "regions/box/c/0/0").rename(copy / "regions/box/kept")
    (copy / "regions/box/c/0/0").symlink_to("../../kept")
    monkeypatch.setattr(Path, "resolve", denied("x"))
    with pytest.raises(StoreUnreadable, match=r"regions/box/c/0/0: cannot be read \(Permission denied\)"):
        Store(copy)


# Bytes that cannot be decoded


@pytest.mark.parametrize("way", ["folder", "file", "memory"])
@pytest.mark.parametrize("codec", ["GzipCodec", "ZstdCodec"])
def test_a_chunk_that_cannot_be_decoded_is_damage_wherever_it_lies(copy, way, codec):
    url = {"folder": copy, "file": copy.as_uri(), "memory": f"memory://{secrets.token_hex(4)}"}[way]
    by_zarr(copy, compressors=getattr(zarr.codecs, codec)())
    (copy / SHARD).write_bytes(b"no such stream")
    storekit.recommit(copy)
    if way == "memory":
        push(copy, url)
    with pytest.raises(
        StoreError, match="regions/embedding: zarr cannot read this array .*the store is damaged"
    ) as found:
        _ = Store(url, verify="quick").regions[FIRST]
    assert not isinstance(found.value, StoreUnreadable)
    assert ("push the store again" in str(found.value)) == (way != "folder")


def test_metadata_at_a_url_that_describe_no_array_are_damage(copy):
    url = f"memory://{secrets.token_hex(4)}"
    (copy / "zarr.json").write_text((copy / "zarr.json").read_text().replace('"sharding_indexed"', '"nonsense"'))
    storekit.recommit(copy)
    push(copy, url)
    with pytest.raises(StoreError, match="images/id: zarr cannot read this array .*nonsense.*the store is damaged"):
        _ = Store(url).image_ids


def test_a_root_that_is_lost_while_a_url_is_read_is_damage_of_the_copy(finished):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    store = Store(url)
    files, root = fsspec.url_to_fs(url)
    files.rm_file(f"{root}/zarr.json")
    with pytest.raises(StoreError, match="zarr.json: is not there; the store is damaged: push the store again"):
        _ = store.image_ids


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server that knows ranges, and sends of some files what it is told to."""

    more = 0
    sent = 0
    encoding = ""
    gone = ()

    def log_message(self, *_):
        pass

    def send_head(self):
        wanted = self.headers.get("Range", "")
        found = super().send_head()
        if not wanted or found is None or not hasattr(found, "name"):
            return found
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with found:
            data = found.read()[first : last + 1]
        return io.BytesIO(data + bytes(self.more))

    def send_response(self, code, message=None):
        super().send_response(206 if "Range" in self.headers and code == 200 else code, message)

    def send_header(self, keyword, value):
        # What is sent ends where the connection does.
        if keyword != "Content-Length" or "Range" not in self.headers:
            super().send_header(keyword, value)

    def end_headers(self):
        if self.encoding:
            super().send_header("Content-Encoding", self.encoding)
        super().end_headers()

    def do_GET(self):
        if self.path.endswith(self.gone or ("\0",)):
            self.send_error(404)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        # Whoever asked may have left.
        with source, contextlib.suppress(OSError):
            while piece := source.read(2**16):
                outputfile.write(piece)
                type(self).sent += len(piece)


@pytest.fixture
def web(copy):
    """A store on such a server."""
    handler = type("Handler", (Ranges,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=copy.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{copy.name}", handler
        server.shutdown()
        thread.join()


def test_an_answer_that_cannot_be_decoded_is_the_copys_fault_in_one_line(web):
    web[1].encoding = "gzip"
    with pytest.raises(StoreError, match="what is sent cannot be decoded .*the store is damaged: push the") as found:
        Store(web[0])
    assert "\n" not in str(found.value)


def test_a_file_that_a_web_server_lacks_is_named_by_pull_too(web, tmp_path):
    web[1].gone = (SHARD,)
    with pytest.raises(StoreError, match=f"{SHARD}: is not there; the store is damaged"):
        pull(web[0], tmp_path / "target")


# What a server sends


@pytest.mark.parametrize("verify", ["quick", "full"])
def test_rows_are_read_by_ranges_and_no_more_is_taken_than_was_asked_for(web, copy, verify, monkeypatch):
    expected = Store(copy).regions.batch(storekit.IDS)
    monkeypatch.setattr("ezsd.cache.storage.arrays._KEPT_BYTES", 0)
    store = Store(web[0], verify=verify)
    assert store.image_ids.tolist() == storekit.IDS
    rows = store.regions.batch(storekit.IDS).rows
    np.testing.assert_array_equal(rows.embedding, expected.rows.embedding)
    # As if it had no end: more than fits into memory would be taken for nothing.
    web[1].more = 2**26
    with pytest.raises(StoreError, match=r"more is sent than the [\d,]+ bytes asked for"):
        store.proposals.batch(storekit.IDS)
    assert web[1].sent < 2**25


def test_a_file_system_that_sends_more_than_asked_for_is_refused(finished, monkeypatch):
    url = f"memory://{secrets.token_hex(4)}"
    push(finished, url)
    store, plain = Store(url), fsspec.filesystem("memory").cat_file
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda _, *a, **k: plain(*a, **k) + b"!")
    with pytest.raises(StoreError, match=r"regions/\w+/c/0(/0)?: more is sent than the [\d,]+ bytes asked for"):
        _ = store.regions[FIRST]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_store_on_a_web_server_is_read_in_a_forked_process_too(web):
    script = (
        "import os, sys, signal\nfrom ezsd.cache import Store\nstore = Store(sys.argv[1])\nstore.regions[70]\n"
        "child = os.fork()\n"
        "if not child:\n    signal.alarm(30)\n    os._exit(len(store.regions[3].box))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(store.regions[3].box))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, web[0]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    child, parent = done.stdout.split()
    assert child == parent


# The local disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def denied(path):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    return refuse


def pulled(finished, url, target):
    assert pull(url, target) >= 0
    assert storekit.contents(target) == storekit.contents(finished)


def test_a_full_disk_while_a_store_is_pulled_is_named_and_the_same_command_goes_on(finished, tmp_path, monkeypatch):
    url, target = f"memory://{secrets.token_hex(4)}", tmp_path / "deep/target"
    push(finished, url)
    for broken in ("ezsd.cache.tools.transfer.write_new", "ezsd.cache.tools.transfer.make_folders"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            said = rf"^{target}: the disk is full \(No space left on device\): [\d,]+ bytes were to be written here"
            with pytest.raises(StoreError, match=said):
                pull(url, target)
    pulled(finished, url, target)


def test_a_folder_that_a_pull_may_not_write_is_named_and_another_one_taken(finished, tmp_path, monkeypatch):
    url, target = f"memory://{secrets.token_hex(4)}", tmp_path / "target"
    push(finished, url)
    with monkeypatch.context() as patch:
        patch.setattr("ezsd.cache.tools.transfer.rename", denied(target / "zarr.json"))
        said = rf"^{target}/zarr.json: cannot be read or written \(Permission denied\); what has come stays: mend that"
        with pytest.raises(StoreError, match=said) as found:
            pull(url, target)
        assert url not in str(found.value)
    pulled(finished, url, target)
    pulled(finished, url, tmp_path / "another")


def test_a_file_here_that_cannot_be_read_is_not_the_urls_fault(copy, monkeypatch):
    url = f"memory://{secrets.token_hex(4)}"

    def refuse(file):
        return denied(file)() if str(file).endswith(SHARD) else os.open(file, os.O_RDONLY)

    monkeypatch.setattr("ezsd.cache.tools.transfer.open_to_read", refuse)
    with pytest.raises(StoreUnreadable, match=rf"^{copy}/{SHARD}: cannot be read \(Permission denied\)") as found:
        push(copy, url)
    assert url not in str(found.value)


@pytest.mark.parametrize(("failure", "said"), [(full, "the disk is full .No space left"), (None, "cannot be read or")])
def test_a_folder_that_cannot_be_pushed_into_is_named_by_its_path(finished, tmp_path, monkeypatch, failure, said):
    target = tmp_path / "target"
    failure = failure or denied(target / "zarr.json")
    monkeypatch.setattr("ezsd.cache.tools.transfer.write_new", lambda *_, **__: failure())
    with pytest.raises(StoreError, match=f"^{target}[a-z./]*: {said}") as found:
        push(finished, target.as_uri())
    assert "reached" not in str(found.value)
