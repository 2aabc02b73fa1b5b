"""Small synthetic stores: an image's rows follow from its id alone, so any order of work must give the same bytes."""

import hashlib
import json
from pathlib import Path

import numpy as np

from ezsd.cache import (
    Manifest,
    Origin,
    RaggedRows,
    StoreWriter,
    commit_shard,
    images_digest,
    read_plan,
    write_block,
)
from ezsd.cache.files import file_digest
from ezsd.cache.format.commit_mark import CommitMark, read_mark

IDS = [70, 3, 11, 900000000001, 5, 42, 8, 9, 10, 77, 12]
WIDTHS = [64, 50, 64, 640, 64, 33, 64, 64, 64, 64, 64]
HEIGHTS = [48, 50, 48, 480, 48, 44, 48, 48, 48, 48, 48]
DIM = 32
# Images 8 and 9 fill a block of their own with no rows at all.
EMPTY = {5, 8, 9}
INPUTS = {
    "teacher": {"name": "fake", "sha256": "ab" * 32, "seed": 3},
    "text": {"names": ["circle", "star", "Ünïcode"]},
    "proposals": {"nms_iou": 0.7, "sizes": [32, 64]},
    "regions": {"keep": 150},
    "ground_truth": {"boxes_sha256": "cd" * 32},
}
NEEDS = {
    "text": ("teacher",),
    "proposals": ("teacher", "text"),
    "regions": ("teacher", "text", "proposals"),
    "ground_truth": ("teacher",),
}
PROPOSER = {"steps": 400, "seed": 3}
"""Inputs of the optional product: `manifest(proposer=PROPOSER)`."""
NAMES = ["circle", "star", "Ünïcode"]
PER_STORE = {
    "teacher": ({"values": np.linspace(-1, 1, 37, dtype="f4")}, {"parameters": [["ln.weight", [37]]], "accuracy": 0.5}),
    "text": ({"embedding": np.eye(3, DIM, dtype="f4")}, {"names": NAMES, "prompts": ["a photo of a {}"]}),
    "proposer": ({"values": np.linspace(3, 5, 5000, dtype="f4")}, {"parameters": [["conv.weight", [50, 100]]]}),
}
# One chunk of embeddings per shard: several shards without many rows.
SHARD_BYTES = 256 * DIM * 2


def image_rows(image_id, width, height, *, most=150, empty=EMPTY):
    """All columns of one image, by product and field."""
    random = np.random.default_rng(image_id)
    rows = {}
    for product in ("proposals", "regions", "ground_truth"):
        n = 0 if image_id in empty else int(random.integers(1, most))
        first = random.random((n, 2), dtype="f4") * 0.5 * np.array([width, height], "f4")
        box = np.concatenate([first, first + np.array([width, height], "f4") * np.float32(0.25)], axis=1)
        vectors = random.standard_normal((n, DIM), dtype="f4")
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = {
            "box": box,
            "score": random.random(n, dtype="f4"),
            "confidence": random.random(n, dtype="f4"),
            "class_index": random.integers(0, 3, n, dtype="i4"),
            "annotation_id": random.integers(0, 2**40, n, dtype="i8"),
            "embedding": vectors.astype("f2"),
        }
        rows[product] = {name: columns[name] for name in FIELDS[product]}
    return rows


FIELDS = {
    "proposals": ("box", "score"),
    "regions": ("box", "score", "confidence", "class_index", "embedding"),
    "ground_truth": ("box", "class_index", "annotation_id", "embedding"),
}


def block_rows(block, **options):
    """The products of one block, as `write_block` wants them."""
    sizes = list(zip(IDS, WIDTHS, HEIGHTS, strict=True))[block.start : block.stop]
    images = [image_rows(*size, **options) for size in sizes]
    return {
        product: RaggedRows(
            counts=np.array([len(rows[product]["box"]) for rows in images], "i4"),
            fields={name: np.concatenate([rows[product][name] for rows in images]) for name in names},
        )
        for product, names in FIELDS.items()
    }


def manifest(*, embedding="float16", images=(IDS, WIDTHS, HEIGHTS), **inputs):
    """The manifest of the synthetic stores; `inputs` override those of products, and may add a proposer."""
    needs = {**NEEDS, "proposals": (*NEEDS["proposals"], *(inputs.keys() & {"proposer"}))}
    products = {
        name: Origin(1, {**INPUTS.get(name, {}), **inputs.get(name, {})}, needs.get(name, ()))
        for name in (INPUTS | inputs)
    }
    return Manifest(products, images_digest(*images), embedding)


def open_writer(path, *, embedding="float16", **changes):
    """A writer on the synthetic images; `changes` override its arguments."""
    arguments = {
        "image_ids": IDS,
        "widths": WIDTHS,
        "heights": HEIGHTS,
        "embed_dim": DIM,
        "block_images": 2,
        "shard_bytes": SHARD_BYTES,
    }
    arguments |= changes
    if "manifest" not in arguments:
        arguments["manifest"] = fitting_manifest(arguments, embedding)
    return StoreWriter.open(path, **arguments)


def fitting_manifest(arguments, embedding):
    """The manifest for these images, or for the usual ones where these make no sense."""
    try:
        return manifest(embedding=embedding, images=[arguments[key] for key in ("image_ids", "widths", "heights")])
    except (ValueError, OverflowError):
        return manifest(embedding=embedding)


def write_per_store(writer):
    """The per-store products of the manifest, unless they are there."""
    for product in read_plan(writer.path).schema.per_store:
        arrays, attributes = PER_STORE[product]
        if not writer.has_per_store(product):
            writer.write_per_store(product, arrays, attributes)


def write_one(path, block):
    """Compute and write one block, in whatever process this is called."""
    write_block(path, block, block_rows(block))


def journal_all(writer):
    """Journal all that a store is committed from."""
    write_per_store(writer)
    for block in writer.pending():
        write_one(writer.path, block)


def read_embedding(store, image_id):
    """What a reading worker sees, as bytes."""
    return store.regions[image_id].embedding.tobytes()


def build(path, *, arrange=list, rows=block_rows, **changes):
    """Build or go on with a store in one process; `arrange` orders blocks and shards."""
    with open_writer(path, **changes) as writer:
        if not writer.complete:
            writer.write_environment({"host": str(path)})
            write_per_store(writer)
        for block in arrange(writer.pending()):
            write_block(path, block, rows(block))
        for task in arrange(writer.commit_tasks()):
            commit_shard(path, task)
        writer.finish()
    return Path(path)


class Images:
    """What `repair` asks for, from the synthetic images; `most` rows each, further arguments are the manifest's."""

    def __init__(self, *, most=150, **changes):
        self.manifest = manifest(**changes)
        self.images = tuple(np.array(values) for values in (IDS, WIDTHS, HEIGHTS))
        self.asked = []
        self._most = most

    def per_store(self, product, known):
        return PER_STORE[product][0]

    def annotated(self, block):
        rows = block_rows(block, most=self._most)["ground_truth"]
        return RaggedRows(rows.counts, {name: of for name, of in rows.fields.items() if name != "embedding"})

    def rows(self, blocks, stored):
        assert stored.keys() == self.manifest.layout(DIM).per_store.keys()
        for block in blocks:
            self.asked.append((block.start, block.stop))
            yield block_rows(block, most=self._most)


def sha256(rows):
    """Digest of an array's bytes."""
    return hashlib.sha256(rows.tobytes()).hexdigest()


def flip(file, bit):
    """Turn one bit of a file over."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def recommit(store):
    """Make the files as they are now what the commit mark lists."""
    mark = read_mark(store)
    unlisted = ("COMMIT.json", "environment.json", "build.log")
    listed = [f for f in store.rglob("*") if f.is_file() and f.name not in unlisted]
    files = {file.relative_to(store).as_posix(): file_digest(file) for file in listed}
    (store / "COMMIT.json").write_bytes(
        CommitMark(mark.manifest_digest, mark.embed_dim, mark.embedding, files, mark.recorded).to_bytes()
    )


def contents(path):
    """Digest of every file that must be equal in equal stores."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(path).rglob("*"))
        if file.is_file() and file.name not in ("environment.json", "build.log")
    }


if __name__ == "__main__":
    import sys

    build(sys.argv[1])


def sources(task):
    """The digest of what goes into a shard, made from its parts one by one."""
    pieces = [[piece.block, piece.start, piece.stop, piece.crc32] for piece in task.pieces]
    parts = [task.plan, task.array.name, list(task.array.shape), task.array.shard_rows, task.shard, pieces]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()
