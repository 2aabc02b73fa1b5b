"""The builder of a store: plan, journal, commit. Killed anywhere, it goes on where it was."""

import operator
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ezsd.cache.errors import StoreBusy, StoreError, StoreIncomplete, StoreMismatch
from ezsd.cache.files import (
    FileLock,
    disk_room,
    make_folders,
    read_bytes,
    require_can_write,
    require_room,
    writable,
    write_atomic,
)
from ezsd.cache.format.commit_mark import (
    ENVIRONMENT,
    LOCK,
    LOG,
    MANIFEST,
    CommitMark,
    read_mark,
    require_not_set_aside,
    size_problems,
)
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.schema import SHARD_BYTES, Block
from ezsd.cache.format.sealed_json import JSON, Difference, canonical_json, seal
from ezsd.cache.journal.bad_images import all_bad_images
from ezsd.cache.journal.commit import Committer, Finisher, remove_journal
from ezsd.cache.journal.disk_room import room_to_commit, small_bytes
from ezsd.cache.journal.entries import (
    ENTRY,
    Entry,
    clear_scratch,
    intact,
    journal_folder,
    little_endian,
    lock_store,
    scratch_folder,
    set_aside,
    write_entry,
    write_note,
)
from ezsd.cache.journal.plan import (
    Plan,
    finished_block,
    forget_block,
    free_folder,
    geometry_differences,
    journaled_bad_images,
    per_store_entry,
    per_store_folder,
    plan_folder,
    read_per_store,
    read_plan,
    require_per_store,
)
from ezsd.cache.journal.shards import ShardTask, forget_record, recorded
from ezsd.cache.journal.unfinished import Unfinished
from ezsd.cache.storage.locations import unfinished_plan
from ezsd.errors import inflected, quantity


class StoreWriter:
    """The builder of one store; a context manager, since it holds the build lock.

    Its steps: `write_per_store` for each per-store product of the schema (of a store of regions: teacher, text, and
    proposer where there is one), `write_block` for each of `pending()`, `commit_shard` for each of `commit_tasks()`,
    `finish()`. Blocks and shards may be written by other processes, in any order. Once the per-store products are
    written, several builders may `share` the lock, each for some of the blocks.
    """

    def __init__(self, plan: Plan, lock: FileLock | None) -> None:
        """Use `StoreWriter.open`; without a lock the store is complete."""
        self._plan = plan
        self._lock = lock
        self._kept: Committer | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        image_ids: ArrayLike,
        widths: ArrayLike,
        heights: ArrayLike,
        embed_dim: int | None = None,
        block_images: int,
        shard_bytes: int = SHARD_BYTES,
        shared: bool = False,
    ) -> Self:
        """Create the store, or go on with it: an unfinished or complete one with this manifest and these images.

        Args:
            path: the store's folder; absent, empty, or the same store.
            manifest: everything that shapes the bytes.
            image_ids: whole numbers, each once, (n,).
            widths: of the images in pixels, (n,).
            heights: of the images in pixels, (n,).
            embed_dim: D, the width of the embeddings, for a store of regions; None where the manifest has a schema.
            block_images: images per block, the unit of work that survives a kill.
            shard_bytes: about how large a shard of the finished store may be.
            shared: beside other builders that share the lock, of a store with its per-store products; see `share`.

        Raises:
            StoreMismatch: a store made from something else is there; names the differences.
            StoreBusy: another builder is at work; for `shared`, also when a per-store product is not written yet.
            StoreError: the folder holds other things, or the images make no sense.
        """
        store = Path(path).absolute()
        wanted = Plan(
            store=store,
            manifest=manifest,
            image_ids=_integers(image_ids, "<i8"),
            widths=_integers(widths, "<i4"),
            heights=_integers(heights, "<i4"),
            embed_dim=None if embed_dim is None else int(embed_dim),
            block_images=int(block_images),
            shard_bytes=int(shard_bytes),
        )
        mark = read_mark(store)
        if mark is not None:
            return cls._complete(wanted, mark)
        require_not_set_aside(store)
        _require_own(store)
        return cls._locked(wanted, shared=shared)

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> Self:
        """Go on with an unfinished store as it was planned.

        Raises:
            StoreBusy: another builder is at work.
            StoreError: nothing unfinished is there.
        """
        return cls._locked(unfinished_plan(Path(path).absolute()), shared=False)

    @classmethod
    def _locked(cls, wanted: Plan, *, shared: bool) -> Self:
        require_can_write(wanted.store)
        with writable(wanted.store):
            make_folders(wanted.store)
            lock = lock_store(wanted.store, shared=shared)
        try:
            return cls._start(wanted, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _start(cls, wanted: Plan, lock: FileLock) -> Self:
        # The store may have been completed between the first look and the lock.
        mark = read_mark(wanted.store)
        if mark is not None:
            lock.release()
            return cls._complete(wanted, mark)
        if not lock.shared:
            clear_scratch(wanted.store)
            if not plan_folder(wanted.store).is_dir():
                wanted.write()
        elif not plan_folder(wanted.store).is_dir():
            raise _unprepared(wanted.store)
        plan = read_plan(wanted.store)
        plan.require_same(wanted)
        writer = cls(plan, lock)
        if lock.shared and writer._unwritten:
            raise _unprepared(wanted.store)
        return writer

    @classmethod
    def _complete(cls, wanted: Plan, mark: CommitMark) -> Self:
        store = wanted.store
        file = store / MANIFEST
        found = Manifest.from_json(read_bytes(file), str(file))
        differences = found.differences(wanted.manifest)
        if mark.embed_dim is not None and wanted.embed_dim is not None:
            differences += geometry_differences({"embed_dim": mark.embed_dim}, wanted)
        if differences:
            raise _another_store(store, differences, found.same_products(wanted.manifest))
        problems = size_problems(store, mark)
        if problems:
            raise StoreError(f"{problems[0]}; the store is damaged: run `repair({store})`")
        if journal_folder(store).exists() or (store / LOCK).exists():
            lock = lock_store(store)
            try:
                remove_journal(store)
            finally:
                lock.release()
        return cls(wanted, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the build lock back; what is journaled stays."""
        if self._lock is not None:
            self._lock.release()

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._plan.store

    @property
    def log_path(self) -> Path:
        """File for the build's log; neither compared nor checked."""
        return self.path / LOG

    @property
    def plan_file(self) -> Path:
        """A file of the journal that all processes of a build have to see."""
        return plan_folder(self.path) / ENTRY

    @property
    def complete(self) -> bool:
        """True if the store is committed: then there is nothing left to do."""
        return self._lock is None

    @property
    def blocks(self) -> list[Block]:
        """All blocks, finished or not: consecutive slices of the image list."""
        return list(self._plan.blocks)

    @property
    def shared(self) -> bool:
        """True if other builders may be at work beside this one."""
        return self._lock is not None and self._lock.shared

    def share(self) -> None:
        """Let other builders in; this one can then only write blocks.

        Raises:
            StoreIncomplete: a per-store product is missing, which no two builders may write.
        """
        for product in self._unwritten:
            raise StoreIncomplete(f"{self.path}: {product} was not written yet; use write_per_store first")
        if self._lock is not None:
            self._lock.share()

    def pending(self) -> list[Block]:
        """The blocks that are still to be written.

        Among them may be some that were finished once and dropped, when a shard they went into has been lost.
        """
        if self.complete:
            return []
        entries = self._entries()
        missing = [block for block, entry in zip(self.blocks, entries, strict=True) if entry is None]
        if missing:
            return missing
        committer = self._committer_of([entry for entry in entries if entry is not None])
        return self._lost(committer, self._unrecorded(committer))

    def bad_images(self) -> dict[int, str]:
        """Images of the finished blocks that could not be read, by id, and why."""
        return {} if self.complete else journaled_bad_images(self.path)

    def retry_images(self, image_ids: Collection[int]) -> None:
        """Make blocks pending again in which some of these images could not be read.

        Not once a block was dropped: more rows in one block move those of all others to other shards, and what was
        dropped would have to be computed again, which may be nearly everything.
        """
        entries = self._entries()
        if any(entry is not None and entry.dropped for entry in entries):
            return
        for block, entry in zip(self.blocks, entries, strict=True):
            if entry is not None and not all_bad_images([entry.attributes]).keys().isdisjoint(image_ids):
                forget_block(self.path, block)

    def _entries(self) -> list[Entry | None]:
        return [finished_block(self._plan, block.index) for block in self.blocks]

    def _unrecorded(self, committer: Committer) -> list[ShardTask]:
        """Tasks whose shards are still to be written."""
        return [task for task in committer.tasks if recorded(self.path, task) is None]

    def _lost(self, committer: Committer, tasks: Sequence[ShardTask]) -> list[Block]:
        """Blocks without data whose rows one of these tasks still waits for."""
        waiting = {piece.block for task in tasks for piece in task.pieces}
        return [self.blocks[index] for index in sorted(waiting) if not committer.entries[index].sized]

    def has_per_store(self, product: str) -> bool:
        """True if a per-store product is written already.

        Raises:
            StoreError: the store has no such product.
        """
        folder = per_store_folder(self._plan, product)
        return self.complete or intact(folder)

    @property
    def _per_store(self) -> list[str]:
        return list(self._plan.schema.per_store)

    @property
    def _unwritten(self) -> list[str]:
        """The per-store products that are not written yet."""
        return [product for product in self._per_store if not self.has_per_store(product)]

    def write_per_store(self, product: str, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, JSON]) -> None:
        """Write a per-store product, all of it or nothing; the same contents a second time are accepted.

        Args:
            product: in a store of regions `teacher` or `proposer` (array `values`, (K,) float32), or `text` (array
                `embedding`, (C, D) float32).
            arrays: by name.
            attributes: a JSON object; for `text` of a store of regions it holds `names`, the C class names.

        Raises:
            StoreError: contents that must not get into a store, or others than those written before; or the store has
                no such product.
        """
        fields = self._plan.schema.per_store_product(product, self.path).fields
        require_per_store(self._plan, product, arrays, attributes)
        self._require_unfinished(f"write {product}")
        rows = {field.name: little_endian(arrays[field.name], field.dtype) for field in fields}
        described: dict[str, JSON] = {"plan": self._plan.digest, "user": attributes}
        canonical_json(described, product)
        if self.has_per_store(product):
            before, after = self.read_per_store(product), (rows, attributes)
            if _fingerprint(*before) != _fingerprint(*after):
                raise StoreError(f"{self.path}: {product} was written before, with other contents; use read_per_store")
            return
        with disk_room(self.path, sum(values.nbytes for values in rows.values())):
            name = per_store_folder(self._plan, product).name
            set_aside(self.path, name)
            write_entry(self.path, name, rows, described, point="whole")
        self.unfinished(product).discard()

    def unfinished(self, product: str) -> Unfinished:
        """Place for the state of a per-store product that takes many steps to make; `write_per_store` clears it.

        Raises:
            StoreError: the store has no such product, or is complete.
        """
        self._plan.schema.per_store_product(product, self.path)
        self._require_unfinished(f"work on {product}")
        return Unfinished(self._plan, product)

    def read_per_store(self, product: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The arrays and attributes of a per-store product, also from a complete store.

        Raises:
            StoreIncomplete: it was not written yet.
            StoreError: the store has no such product.
        """
        if self.complete:
            from ezsd.cache.reader import Store

            return Store(self.path).read_per_store(product)
        return read_per_store(self._plan, product)

    def commit_tasks(self) -> list[ShardTask]:
        """The shards that are still to be written, one picklable task each; for `commit_shard`, anywhere.

        Done in this order, they keep the disk from holding everything twice.

        Raises:
            StoreIncomplete: some blocks are missing.
            StoreError: the disk has no room for what is left to be written.
        """
        return [] if self.complete else self._tasks_left(self._committer())

    def _tasks_left(self, committer: Committer) -> list[ShardTask]:
        """The tasks that `commit_tasks` gives; errors as there."""
        tasks = self._unrecorded(committer)
        lost = self._lost(committer, tasks)
        if lost:
            raise StoreIncomplete(
                f"{self.path}: a shard was lost; write {quantity(len(lost), 'pending block')} again first"
            )
        for task in tasks:
            # A record of other rows must not let a block be dropped.
            forget_record(self.path, task)
        require_room(self.path, room_to_commit(committer, tasks))
        return tasks

    def commit_numbers(self) -> tuple[str, list[int]]:
        """The digest and the shards' numbers that `commit_numbered` takes, of the tasks of `commit_tasks`.

        A task lists all that goes into its shard; a number is small enough to be sent to any worker, which finds what
        goes into which shard in a note of that digest, instead of reading the entries of all blocks.
        """
        if self.complete:
            return "", []
        committer = self._committer()
        left = {task.file for task in self._tasks_left(committer)}
        if not left:
            return "", []
        numbers = [number for number, task in enumerate(committer.tasks) if task.file in left]
        return self.write_note(committer.shards.to_bytes()), numbers

    def _committer(self) -> Committer:
        if self.shared:
            raise StoreError(f"{self.path}: a builder that shares the store cannot commit it; open it alone")
        entries = self._entries()
        present = [entry for entry in entries if entry is not None]
        if len(present) < len(entries):
            raise StoreIncomplete(
                f"{self.path}: {len(present)} of {len(entries)} blocks {inflected(len(present), 'is', 'are')} done; "
                "write the rest first"
            )
        return self._committer_of(present)

    def _committer_of(self, entries: Sequence[Entry]) -> Committer:
        """The committer of these entries: the one before, unless a block was written anew since."""
        if self._kept is None or any(map(operator.is_not, self._kept.entries, entries)):
            self._kept = Committer(self._plan, entries)
        return self._kept

    def finish(self) -> None:
        """Write what is left and the commit mark, and remove the journal. The store is complete afterwards.

        Raises:
            StoreIncomplete: blocks, shards or per-store products are missing.
        """
        if self.complete:
            return
        committer = self._committer()
        found = {task.file: recorded(self.path, task) for task in committer.tasks}
        shards = {file: record for file, record in found.items() if record is not None}
        if len(shards) < len(found):
            raise StoreIncomplete(
                f"{self.path}: {len(shards)} of {len(found)} shards are written; commit the rest first"
            )
        entries = {product: per_store_entry(self._plan, product) for product in self._per_store}
        with disk_room(self.path, small_bytes(committer, entries)):
            Finisher(committer, shards, {}).finish(entries)
        self.close()
        self._lock = None

    def write_note(self, data: bytes) -> str:
        """Leave bytes for the workers of this build; returns their name for `ezsd.cache.read_note`."""
        self._require_unfinished("leave a note")
        with disk_room(self.path, len(data)):
            return write_note(self.path, data)

    def write_environment(self, environment: Mapping[str, JSON]) -> None:
        """Record who built this, where and with what (`environment.json`); neither compared nor checked later."""
        self._require_unfinished("write the environment")
        data = seal(environment)
        scratch = scratch_folder(self.path)
        with disk_room(self.path, len(data)):
            write_atomic(self.path / ENVIRONMENT, data, scratch=scratch, point="metadata")

    def _require_unfinished(self, action: str) -> None:
        if self.complete:
            raise StoreError(f"{self.path}: the store is complete; cannot {action} any more")


def _another_store(store: Path, differences: Sequence[Difference], same: Sequence[str]) -> StoreMismatch:
    """The error about a complete store of other settings; `same` are products that need not be made again."""
    folder = free_folder(store)
    equal = f"; equal there: {', '.join(same)}" if same else ""
    error = StoreMismatch.between(store, differences, cure=f"build into another folder: `path={folder}`{equal}")
    error.shared, error.folder = same, folder
    return error


def _unprepared(store: Path) -> StoreBusy:
    return StoreBusy(f"{store}: is not prepared yet for builders that share it")


def _fingerprint(arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, JSON]) -> tuple[object, ...]:
    return canonical_json(attributes), *((name, rows.shape, rows.tobytes()) for name, rows in sorted(arrays.items()))


def _integers(values: ArrayLike, dtype: str) -> NDArray[Any]:
    found = np.asarray(values)
    numbers = little_endian(found if found.dtype.kind in "iu" else [], dtype)
    if found.size and not np.array_equal(numbers, found):
        raise StoreError(f"images: ids, widths and heights must be whole numbers within {np.dtype(dtype).name}")
    return numbers


def _require_own(store: Path) -> None:
    """Refuse a folder that holds something else than a store being built."""
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store}: is a file; choose another folder: `path=NEW`")
    if plan_folder(store).is_dir() or not store.is_dir():
        return
    # A build killed before its plan leaves these at most.
    own = {LOCK, LOG, ENVIRONMENT, journal_folder(store).name}
    foreign = sorted(file.name for file in store.iterdir() if file.name not in own)
    if foreign:
        raise StoreError(f"{store}: holds {foreign[0]!r} but no store; choose an empty or new folder: `path=NEW`")
