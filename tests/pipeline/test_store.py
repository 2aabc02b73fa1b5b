"""What `ezsd cache` says about stores."""

from ezsd.pipeline.console.store_messages import collect_lines
from tests.cache import storekit


def test_gc_says_what_goes_what_would_go_and_what_stays(tmp_path):
    store = storekit.build(tmp_path / "store")
    (store / "journal").mkdir()
    (store / "journal/part").write_bytes(b"123")
    (store / "notes.txt").write_bytes(b"mine")
    kept = ["kept: notes.txt (4 bytes), not made by ezsd"]
    cure = ["kept what ezsd did not make (1); --strays removes it too"]
    assert collect_lines(store, dry_run=True) == [
        "would be removed: journal/part (3 bytes)",
        *kept,
        f"{store}: 1 file, 3 bytes would be removed",
        *cure,
    ]
    assert collect_lines(store) == [
        "removed: journal/part (3 bytes)",
        *kept,
        f"{store}: 1 file, 3 bytes removed",
        *cure,
    ]
    assert collect_lines(store, strays=True) == [
        "removed: notes.txt (4 bytes)",
        f"{store}: 1 file, 4 bytes removed",
    ]
    assert collect_lines(store) == [f"{store}: 0 files, 0 bytes removed"]
