"""Stores in repositories of the Hugging Face Hub, by its own client, against a server on this machine."""

import secrets
import threading

import fsspec
import hubkit
import huggingface_hub
import pytest
import storekit

from ezsd.cache import Store, StoreError, compare, info, list_stores, pull, push, verify

REPOSITORY = "user/stores"

# The Hub's client says this of itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one empty repository."""
    with hubkit.Hub(REPOSITORY) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
        # The other way of sending has a server of its own kind.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(hub):
    return f"hf://datasets/{REPOSITORY}/{secrets.token_hex(4)}"


def test_a_store_is_pushed_in_one_commit_and_comes_back_byte_for_byte(finished, hub, url, tmp_path):
    assert push(finished, url) == len(storekit.contents(finished)) - 1
    assert len(hub.commits) == 1
    assert push(finished, url) == 0
    assert len(hub.commits) == 1
    assert pull(url, tmp_path / "copy") > 20
    assert storekit.contents(tmp_path / "copy") == storekit.contents(finished)
    assert (tmp_path / "copy/environment.json").read_bytes() == (finished / "environment.json").read_bytes()


def test_a_repository_is_looked_after_and_read_where_it_lies(finished, hub, url):
    hub.files[REPOSITORY][".gitattributes"] = (b"*.bin filter=lfs", False)
    push(finished, url)
    assert verify(url, deep=True) == []
    assert compare(url, finished).content == ()
    assert info(url).images == len(storekit.IDS)
    assert list(list_stores(f"hf://datasets/{REPOSITORY}")) == [url]
    batch = Store(url).regions.batch(storekit.IDS)
    assert batch.counts.tolist() == Store(finished).regions.batch(storekit.IDS).counts.tolist()


def test_a_store_at_the_root_of_a_repository_lies_beside_its_card(finished, hub):
    hub.files[REPOSITORY] = {".gitattributes": (b"*.bin filter=lfs", False), "README.md": (b"# Mine", False)}
    push(finished, f"hf://datasets/{REPOSITORY}")
    assert verify(f"hf://datasets/{REPOSITORY}", deep=True) == []


def test_a_push_that_was_stopped_sends_no_blob_again_and_leaves_no_half_store(finished, hub, url):
    hub.fail = lambda method, path: "/commit/" in path
    with pytest.raises(StoreError, match=f"^{url}: cannot be reached: HfHubHTTPError: .*403"):
        push(finished, url)
    sent = len(hub.put)
    assert sent > 10
    with pytest.raises(StoreError, match="is not a store"):
        Store(url)
    hub.fail = lambda method, path: False
    push(finished, url)
    assert len(hub.put) == sent
    Store(url)


def test_what_is_wrong_in_a_repository_is_mended_by_a_push(finished, hub, url):
    push(finished, url)
    prefix = url.rpartition("/")[2]
    for name in ("regions/embedding/c/0/0", "regions/zarr.json"):
        data, is_blob = hub.files[REPOSITORY][f"{prefix}/{name}"]
        hub.files[REPOSITORY][f"{prefix}/{name}"] = (bytes(len(data)), is_blob)
    assert {found.name for found in verify(url, deep=True)} == {"regions/embedding/c/0/0", "regions/zarr.json"}
    assert push(finished, url) == 2
    assert verify(url, deep=True) == []


def test_what_did_not_arrive_as_it_was_sent_is_said_and_sent_again(finished, hub, url):
    hub.keep = lambda data: data.replace(b"zarr_format", b"zarr-format")
    with pytest.raises(StoreError, match=r"zarr.json: did not arrive as it was sent; push again$"):
        push(finished, url)
    hub.keep = lambda data: data
    assert push(finished, url) > 10
    assert verify(url, deep=True) == []


def test_what_cannot_be_pushed_is_one_line_and_changes_nothing(finished, copy, hub, url, tmp_path):
    with pytest.raises(StoreError, match="there is no such repository, or you may not see it; create it on the Hub"):
        push(finished, "hf://datasets/user/nowhere/store")
    hub.files["user/nowhere"] = {}
    fsspec.filesystem("hf").invalidate_cache()
    push(finished, "hf://datasets/user/nowhere/store")
    del hub.commits[:], hub.put[:]
    file = copy / "regions/embedding/c/0/0"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(StoreError, match="embedding/c/0/0: its bytes are not those that were committed"):
        push(copy, url)
    assert hub.commits == hub.put == []
    hub.files[REPOSITORY][f"{url.rpartition('/')[2]}/notes.txt"] = (b"mine", False)
    with pytest.raises(StoreError, match="holds 'notes.txt', which is not a file of this store"):
        push(finished, url)
    push(finished, f"{url}b")
    with pytest.raises(StoreError, match="holds another store; choose another URL"):
        push(storekit.build(tmp_path / "other", block_images=3, embedding="int8"), f"{url}b")
