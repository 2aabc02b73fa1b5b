"""A lost commit mark made again from the rest of a store, once every checksum in it holds.

A finished store says everything twice: metadata are in each `zarr.json` and in the root's, the manifest's digest is in
the root, and every chunk has its checksum. Files that agree in all of this are those that were committed, unless some
were exchanged: only the mark binds rows to the manifest, so that an array and its checksums, both from another store
with the same shapes, are not noticed. Compare the new mark's digest with a run's record, or the store with a copy.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import ABSENT, MOST_UNSTATED, FileDigest, open_to_read, unreadable
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums
from ezsd.cache.format.commit_mark import COMMIT, MANIFEST, CommitMark, parse_mark
from ezsd.cache.format.manifest import Manifest, images_digest
from ezsd.cache.format.names import ROOT, inside
from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, IMAGES, ArraySpec
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.journal.commit import root_attributes
from ezsd.cache.journal.entries import little_endian, raw_bytes
from ezsd.cache.storage.direct import direct_spec


def remake_mark(store: Path) -> CommitMark:
    """The commit mark that a finished store without one had, unless files were exchanged (see the module).

    Raises:
        StoreError: a file is missing, or does not match what the others say of it: names the first one.
        StoreUnreadable: the system does not let one be read.
    """
    return _Remake(store).mark()


@dataclass(frozen=True)
class _Remake:
    store: Path
    files: dict[str, FileDigest] = field(default_factory=dict)
    """Digests of the files found to be whole."""

    def mark(self) -> CommitMark:
        nodes, manifest, embed_dim = self._described()
        embedding = None if manifest.schema else manifest.embedding
        arrays = [name for name, node in nodes.items() if node.get("node_type") == "array"]
        columns = dict[str, NDArray[Any]]()
        for name in arrays:
            if not name.startswith(f"{CHECKSUMS}/"):
                self._check_array(self._spec(nodes, name), self._spec(nodes, f"{CHECKSUMS}/{name}"), columns)
        listed = images_digest(*(columns[f"images/{column.name}"] for column in IMAGES))
        self._require(listed == manifest.images_sha256, MANIFEST, "was made for another list of images")
        data = CommitMark(manifest.digest, embed_dim, embedding, self.files, manifest.schema).to_bytes()
        return parse_mark(data, str(self.store / COMMIT))

    def _described(self) -> tuple[Mapping[str, Any], Manifest, int | None]:
        """Metadata of all nodes, the manifest, and D of a store of regions, once all that says them agrees."""
        where = str(self.store / ROOT)
        root = self._read(ROOT)
        manifest = Manifest.from_json(self._read(MANIFEST), str(self.store / MANIFEST))
        self._take(MANIFEST, manifest.to_json().encode())
        try:
            nodes = parse_json(root, where)["consolidated_metadata"]["metadata"]
            embed_dim = None if manifest.schema else int(nodes["regions/embedding"]["shape"][1])
            schema = manifest.layout(embed_dim)
            lengths = {name: f"{name}/{product.fields[0].name}" for name, product in schema.per_image.items()}
            rows = {product: int(nodes[name]["shape"][0]) for product, name in lengths.items()}
            images = int(nodes["images/id"]["shape"][0])
            names = [*schema.groups, *schema.arrays]
            wanted = {*names, CHECKSUMS, *(f"{CHECKSUMS}/{name}" for name in names)}
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise self._refusal(ROOT, "does not describe the arrays of a store") from error
        self._require(nodes.keys() == wanted, ROOT, "describes other arrays than those of its manifest")
        for name, node in nodes.items():
            kind = _node_type(name)
            sound = isinstance(node, dict) and node.get("node_type") == kind
            self._require(sound, ROOT, f"does not describe {name!r} as of node_type {kind!r}")
        attributes = root_attributes(manifest, rows, images=images, embed_dim=embed_dim)
        self._take(ROOT, encoding.metadata_bytes(encoding.root_metadata(attributes, nodes)))
        for name, node in nodes.items():
            self._take(f"{name}/{ROOT}", encoding.metadata_bytes(node))
        return nodes, manifest, embed_dim

    def _spec(self, nodes: Mapping[str, Any], name: str) -> ArraySpec:
        spec = direct_spec(nodes[name], name)
        if spec is None:
            raise self._refusal(f"{name}/{ROOT}", "describes another layout than the format's")
        return spec

    def _check_array(self, spec: ArraySpec, of_sums: ArraySpec, columns: dict[str, NDArray[Any]]) -> None:
        """Compare the shards of an array with its checksums, and these with what they must be, byte for byte."""
        sums: list[int] = []
        rows = []
        for shard in range(spec.shards):
            data = self._shard(spec, shard)
            found = ChunkSums(spec, shard)
            for _ in found.watch([data]):
                pass
            sums += found.sums
            if spec.name.startswith("images/"):
                rows.append(encoding.shard_rows(spec, shard, data))
        if spec.name.startswith("images/"):
            columns[spec.name] = np.concatenate([np.empty(0, spec.dtype), *rows])
        values = little_endian(sums, CHECKSUM.dtype)
        self._require(of_sums.shape == values.shape, f"{of_sums.name}/{ROOT}", "describes other chunks than there are")
        for shard in range(of_sums.shards):
            start, stop = of_sums.shard_range(shard)
            # First its length: as much is made as the metadata say.
            found_sums, name = self._shard(of_sums, shard), of_sums.shard_file(shard)
            parts = encoding.shard_parts(of_sums, shard, [raw_bytes(values[start:stop])])
            self._require(found_sums == b"".join(parts), name, f"does not match the chunks of {spec.name}")

    def _shard(self, spec: ArraySpec, shard: int) -> bytes:
        """The bytes of a shard, as long as it must be, with the index that it must have."""
        name = spec.shard_file(shard)
        size = encoding.shard_bytes_on_disk(spec, shard)
        data = self._read(name, most=size)
        start, stop = spec.shard_range(shard)
        self._require(len(data) == size, name, f"is {len(data)} bytes long, expected {size}")
        self._require(data.endswith(encoding.shard_index(spec, stop - start)), name, "has another chunk index")
        self.files[name] = _digest(data)
        return data

    def _take(self, name: str, expected: bytes) -> None:
        found = self._read(name, most=len(expected))
        self._require(found == expected, name, "does not match what the other files say of it")
        self.files[name] = _digest(expected)

    def _read(self, name: str, *, most: int = MOST_UNSTATED) -> bytes:
        """The bytes of a file, and one more than `most` of a longer one."""
        file = inside(self.store, name)
        try:
            with os.fdopen(open_to_read(file), "rb") as opened:
                return opened.read(min(most, os.fstat(opened.fileno()).st_size) + 1)
        except ABSENT as error:
            raise self._refusal(name, "is missing") from error
        except OSError as error:
            raise unreadable(file, error) from error

    def _require(self, sound: bool, name: str, reason: str) -> None:
        if not sound:
            raise self._refusal(name, reason)

    def _refusal(self, name: str, reason: str) -> StoreError:
        return StoreError(
            f"{self.store}: its commit mark is lost, and cannot be made again where not all else is whole: "
            f"{self.store / name} {reason}; copy {COMMIT} from a copy of this store, or build it anew in another folder"
        )


def _node_type(name: str) -> str:
    """Kind of the node that has this name in every store."""
    return "array" if "/" in name.removeprefix(f"{CHECKSUMS}/") else "group"


def _digest(data: bytes) -> FileDigest:
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())
