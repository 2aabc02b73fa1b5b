"""An S3 server that stalls, resets and truncates: no byte is wrong, each end is one line, the same call goes on."""

import contextlib
import secrets
import time

import fsspec
import pytest

from ezsd.cache import Store, StoreError
from ezsd.cache.tools.transfer import pull, push
from tests.cache import storekit
from tests.commandkit import ezsd
from tests.faults.flaky_proxy import FlakyProxy

PATIENT = {"config_kwargs": {"connect_timeout": 120, "read_timeout": 120}}
"""A busy machine is slow without any fault."""
IMPATIENT = {"config_kwargs": {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 1}}}
"""S3's clients wait for 15 s five times otherwise."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return storekit.build(tmp_path_factory.mktemp("finished") / "store")


@pytest.fixture(scope="module")
def proxy():
    """A proxy that S3's clients of this process ask, in front of a server with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    made = FlakyProxy(server.get_host_and_port()[1])
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": made.url}).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", PATIENT)
        fsspec.filesystem("s3").mkdir("flaky")
        yield made
    made.close()
    server.stop()


@contextlib.contextmanager
def flaky(proxy, kind, every=1):
    """Inside, the server is as `FlakyProxy.doing` says, and its clients of this process do not wait for long."""
    with pytest.MonkeyPatch.context() as patch, proxy.doing(kind, every):
        patch.setitem(fsspec.config.conf, "s3", IMPATIENT)
        patch.setattr("s3fs.core.S3FileSystem.retries", 2)
        yield


@pytest.fixture(scope="module")
def pushed(proxy, finished):
    """A whole copy on the server."""
    url = f"s3://flaky/{secrets.token_hex(4)}"
    push(finished, url)
    return url


def attempt(call):
    """Result of a call and None, or None and what it was refused with."""
    try:
        return call(), None
    except StoreError as error:
        return None, str(error)


def until_done(call, url):
    """Call again and again until it goes well; each end before that is one line about the URL."""
    for _ in range(60):
        found, said = attempt(call)
        if said is None:
            return found
        assert said.startswith(url)
        assert "\n" not in said
    raise AssertionError(said)


def test_a_store_goes_to_a_flaky_server_and_back_without_a_wrong_byte(proxy, finished, tmp_path):
    url = f"s3://flaky/{secrets.token_hex(4)}"
    with flaky(proxy, "any", every=40):
        until_done(lambda: push(finished, url), url)
        until_done(lambda: pull(url, tmp_path / "copy"), url)
        assert proxy.faults > 3
    assert storekit.contents(tmp_path / "copy") == storekit.contents(finished)


@pytest.mark.parametrize("kind", ["slow", "reset", "truncate"])
def test_rows_read_from_a_flaky_server_are_right_or_refused(proxy, pushed, finished, kind):
    expected = storekit.read_embedding(Store(finished), storekit.IDS[0])
    with flaky(proxy, kind, every=25):
        found = until_done(lambda: storekit.read_embedding(Store(pushed), storekit.IDS[0]), pushed)
        assert proxy.faults
    assert found == expected


@pytest.mark.parametrize("kind", ["stall", "reset", "truncate"])
def test_a_server_that_stays_so_is_one_line_in_bounded_time_and_the_same_call_goes_on(proxy, pushed, tmp_path, kind):
    began = time.monotonic()
    with flaky(proxy, kind), pytest.raises(StoreError, match=f"^{pushed}: cannot be reached: "):
        pull(pushed, tmp_path / "copy")
    # Retries are counted, each waits for a while.
    assert time.monotonic() - began < 200
    assert not (tmp_path / "copy").exists()
    assert Store(pushed).regions


def test_a_pull_without_its_server_is_one_line_of_the_command_and_goes_on(proxy, pushed, finished, tmp_path):
    words = ("cache", "pull", pushed, tmp_path / "copy")
    said = ezsd(*words, AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert said.stderr.startswith(f"ezsd: {pushed}: cannot be reached: ")
    with pytest.raises(StoreError):
        Store(tmp_path / "copy")
    assert ezsd(*words).returncode == 0
    assert storekit.contents(tmp_path / "copy") == storekit.contents(finished)
