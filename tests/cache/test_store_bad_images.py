"""Images that could not be read: listed with their reason, without rows, and tried again when asked for."""

import pytest
import storekit

from ezsd.cache import Store, StoreError, info, journaled_bad_images, repair, verify, write_block

BAD = storekit.IDS[2]
REASON = "a.jpg: cannot be read: image file is truncated"


def write_with_bad(path, block):
    """Like `storekit.write_one`, but one image of the data could not be read."""
    rows = storekit.block_rows(block, empty={BAD})
    inside = BAD in storekit.IDS[block.start : block.stop]
    write_block(path, block, rows, bad_images={BAD: REASON} if inside else {})


def journal(path):
    with storekit.open_writer(path) as writer:
        storekit.write_per_store(writer)
        for block in writer.pending():
            write_with_bad(path, block)


def finish(path):
    with storekit.open_writer(path) as writer:
        for task in writer.commit_tasks():
            storekit.commit_shard(path, task)
        writer.finish()


def test_bad_images_are_listed_by_the_journal_and_by_the_store(tmp_path):
    journal(tmp_path / "store")
    assert journaled_bad_images(tmp_path / "store") == info(tmp_path / "store").bad_images == {BAD: REASON}
    finish(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert store.bad_images == info(tmp_path / "store").bad_images == {BAD: REASON}
    assert len(store.regions[BAD].box) == len(store.ground_truth[BAD].box) == 0
    assert not verify(tmp_path / "store", deep=True)


def test_a_store_without_bad_images_says_nothing_of_them(tmp_path):
    storekit.build(tmp_path / "store")
    assert Store(tmp_path / "store").bad_images == {}
    assert b"bad_images" not in (tmp_path / "store/zarr.json").read_bytes()


def test_the_list_survives_the_loss_of_either_file_that_holds_it(tmp_path):
    journal(tmp_path / "store")
    finish(tmp_path / "store")
    for name in ("zarr.json", "images/zarr.json"):
        file = tmp_path / "store" / name
        before = file.read_bytes()
        file.write_bytes(b"{}")
        repair(tmp_path / "store")
        assert file.read_bytes() == before


def test_blocks_with_bad_images_are_written_again_on_request(tmp_path):
    journal(tmp_path / "store")
    with storekit.open_writer(tmp_path / "store") as writer:
        assert writer.pending() == []
        writer.retry_images([storekit.IDS[0]])
        assert writer.pending() == []
        writer.retry_images([BAD])
        (block,) = writer.pending()
        assert BAD in storekit.IDS[block.start : block.stop]
        storekit.write_one(tmp_path / "store", block)
        assert writer.bad_images() == {}


def test_blocks_are_not_written_again_once_a_commit_has_dropped_others(tmp_path):
    store = tmp_path / "store"
    journal(store)
    bad_block = store / "journal/block-000001/data.raw"
    with storekit.open_writer(store) as writer:
        for task in writer.commit_tasks():
            storekit.commit_shard(store, task)
            if not (store / "journal/block-000000/data.raw").exists():
                break
        assert bad_block.exists()
        writer.retry_images([BAD])
        assert bad_block.exists()
    finish(store)
    assert Store(store).bad_images == {BAD: REASON}


@pytest.mark.parametrize(("image", "found"), [(BAD, "has 1 row of"), (storekit.IDS[0], "is not one of its images")])
def test_rows_of_bad_images_are_refused(tmp_path, image, found):
    with storekit.open_writer(tmp_path / "store") as writer:
        block = writer.blocks[1]
        with pytest.raises(StoreError, match=found):
            write_block(tmp_path / "store", block, storekit.block_rows(block, most=3), bad_images={image: REASON})
