"""A store's contents in formats of other tools, for those who leave."""

import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import discard, rename, require_can_write
from ezsd.cache.format.commit_mark import MANIFEST
from ezsd.cache.reader import Store, Verify

Format: TypeAlias = Literal["npz", "parquet", "webdataset"]
FORMATS: tuple[Format, ...] = get_args(Format)
IMAGES_PER_FILE = 1024
"""Images whose rows go into one file."""


def export(
    store: str | os.PathLike[str], folder: str | os.PathLike[str], *, format: Format, verify: Verify = "full"
) -> Path:
    """Write everything a store holds into a new folder; it appears when it is whole.

    In each format `manifest.json` tells what it was made from, and a file such as `text.npz` holds each product of the
    whole store, with its attributes as JSON text (`attributes`). Rows of `IMAGES_PER_FILE` images make one
    file NUMBER:

    - npz: `PRODUCT-NUMBER.npz`: arrays `image_id` (n,), `offset` (n + 1,), and one per field.
    - parquet: `images.parquet`, and `PRODUCT-NUMBER.parquet` with one line per row: `image_id`, then the fields.
    - webdataset: `images-NUMBER.tar`, one sample per image: `ID.json` with id, width and height, and
      `ID.PRODUCT.FIELD.npy`.

    Args:
        store: a complete store, or its URL.
        folder: absent or empty.
        format: one of `FORMATS`.
        verify: how far what is read is checked, see `Store`.

    Returns:
        The folder.

    Raises:
        StoreError: a format that is not known or whose library is missing, a folder that holds something, or a
            damaged store.
    """
    if format not in FORMATS:
        raise StoreError(f"`format={format}`: expected {', '.join(FORMATS)}")
    source, target = Store(store, verify=verify), Path(folder).absolute()
    require_can_write(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: exists and is not empty; choose a new folder")
    write = _writer(format)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        (temporary / MANIFEST).write_text(source.manifest.to_json())
        for product in source.schema.per_store:
            arrays, attributes = source.read_per_store(product)
            _save(temporary / f"{product}.npz", {**arrays, "attributes": np.array(json.dumps(attributes))})
        write(source, temporary)
        # An empty folder may be replaced by a rename, and nothing else.
        rename(temporary, target)
    finally:
        discard(temporary)
    return target


def _writer(format: Format) -> Callable[[Store, Path], None]:
    if format == "npz":
        return _write_npz
    if format == "webdataset":
        return _write_webdataset
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise StoreError("`format=parquet`: needs pyarrow; install it with `pip install 'ezsd[parquet]'`") from error
    return _write_parquet


def _parts(store: Store) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Number and image ids of each file."""
    ids = store.image_ids
    for number, start in enumerate(range(0, len(ids), IMAGES_PER_FILE)):
        yield f"{number:05d}", ids[start : start + IMAGES_PER_FILE]


def _write_npz(store: Store, folder: Path) -> None:
    for number, ids in _parts(store):
        for product in store.schema.per_image:
            batch = store.product(product).batch(ids.tolist())
            offset = np.concatenate([[0], np.cumsum(batch.counts)])
            arrays = {"image_id": ids, "offset": offset, **batch.rows}
            _save(folder / f"{product}-{number}.npz", arrays)
    width, height = store.sizes.T
    _save(folder / "images.npz", {"id": store.image_ids, "width": width, "height": height})


def _save(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(store: Store, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width, height = store.sizes.T
    images = {"id": store.image_ids, "width": np.ascontiguousarray(width), "height": np.ascontiguousarray(height)}
    pq.write_table(pa.table(images), folder / "images.parquet")
    for number, ids in _parts(store):
        for product in store.schema.per_image:
            batch = store.product(product).batch(ids.tolist())
            columns = {"image_id": pa.array(np.repeat(ids, batch.counts))}
            for name, values in batch.rows.items():
                flat = pa.array(values.reshape(-1))
                for size in reversed(values.shape[1:]):
                    flat = pa.FixedSizeListArray.from_arrays(flat, size)
                columns[name] = flat
            pq.write_table(pa.table(columns), folder / f"{product}-{number}.parquet")


def _write_webdataset(store: Store, folder: Path) -> None:
    sizes = store.sizes.tolist()
    place = 0
    for number, ids in _parts(store):
        with tarfile.open(folder / f"images-{number}.tar", "w") as tar:
            for image_id in ids.tolist():
                width, height = sizes[place]
                place += 1
                about = json.dumps({"id": image_id, "width": width, "height": height})
                # Samples are told apart by what stands before the first dot.
                _add(tar, f"{image_id:012d}.json", about.encode())
                for product in store.schema.per_image:
                    for name, values in store.product(product)[image_id].items():
                        _add(tar, f"{image_id:012d}.{product}.{name}.npy", _npy(values))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
