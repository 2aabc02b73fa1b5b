"""What is read of strangers' files, and by which calls: one target for each kind of file.

An input is a line "WAY NAME" and the content of that one file among sound ones, see `tests.fuzz.mutate`. `Target.run`
does with it what commands do, and raises `Finding` for whatever is neither an answer nor an error of ezsd.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load, save

from ezsd.cache import Store, StoreWriter, collect, commit_shard, compare, info, pull, repair, verify, write_block
from ezsd.cache.files import file_digest
from ezsd.cache.format.sealed_json import canonical_json, seal
from ezsd.cache.tools.export import export
from ezsd.data.annotations import ImageRecord, load_evaluation, load_training
from ezsd.data.masks import read_outlines
from ezsd.data.pascal_voc import read_voc
from ezsd.data.records import Annotations
from ezsd.data.yolo import read_yolo
from ezsd.pipeline.audit import AuditRequest, audit
from ezsd.pipeline.config.descriptions import read_descriptions
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.arguments import class_names, find_sources
from ezsd.pipeline.console.store_messages import info_json, info_lines, verify_lines
from ezsd.pipeline.data.annotation_cache import evaluation_annotations, read_categories
from ezsd.pipeline.data.check import check_dataset, check_table
from ezsd.pipeline.data.convert import convert_folder
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.image_source import image_source
from ezsd.pipeline.data.images import look, read_pixels, to_image
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.data.split import chosen_split
from ezsd.pipeline.data.split_images import split_images
from ezsd.pipeline.data.yolo_names import read_names
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.external_proposals import given_proposals
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import Classes, evaluate_results, evaluation_tables
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.report import write_report
from ezsd.pipeline.runs.card import write_card
from ezsd.pipeline.runs.model import read_backbone
from ezsd.pipeline.runs.run import Run, restore_optimiser, rows_digest
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.teacher.weights import load_checkpoint
from ezsd.vocabulary import Split
from tests.cache import storekit
from tests.fuzz.guard import tried, watched
from tests.fuzz.mutate import Chance, change_input, packed, unpacked

SPLIT = Split(base=("cat", "red car"), novel=("dog",))
SIZES = {"a.png": (24, 16), "b.jpg": (16, 20)}
SECRET = "outside/secret"


class Target(ABC):
    """One kind of file. `work` is a folder of its own, for what all inputs share and for each input's scene."""

    name: str
    ways: Sequence[str] = ("as",)
    examples = 100
    """Mutations in the fast form."""
    reads_outside = False
    """True where the file's owner may name places anywhere, and links are followed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._scene = work / "scene"
        (work / SECRET).parent.mkdir(parents=True, exist_ok=True)
        (work / SECRET).write_text("{}")

    @cached_property
    def seeds(self) -> dict[str, bytes]:
        """Sound content of each file that is changed, by name."""
        return self._seeds()

    @abstractmethod
    def _seeds(self) -> dict[str, bytes]: ...

    @abstractmethod
    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        """Do with the scene in a folder, one of whose files is the input's, what commands do."""

    def set_up(self, folder: Path) -> None:  # noqa: B027 - most need nothing
        """Make what is beside the file."""

    def place(self, folder: Path, way: str, name: str, content: bytes) -> None:
        """Put the file in its place."""
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # Other scenes may have a link to the same file.
        file.unlink(missing_ok=True)
        if way == "link":
            with contextlib.suppress(OSError, ValueError):
                file.symlink_to(os.fsdecode(content[:200]) or "gone")
        elif way != "gone":
            file.write_bytes(content)

    def inputs(self) -> list[bytes]:
        """The sound inputs."""
        return [packed(self.ways[0], name, content) for name, content in self.seeds.items()]

    def change(self, data: bytes, chance: Chance) -> bytes:
        """Another input, made of one by its structure."""
        return change_input(data, self.seeds, self.ways, chance)

    def example(self, number: int) -> bytes:
        """The input of a number, always the same one."""
        chance = Chance(f"{self.name} {number}")
        return self.change(chance.choice(self.inputs()), chance)

    def run(self, data: bytes) -> list[str]:
        """Read one input; the errors of ezsd that it met. `Finding` for what is neither an answer nor such an error."""
        way, name, content = unpacked(data, list(self.seeds))
        if way not in self.ways:
            way = self.ways[0]
        shutil.rmtree(self._scene, ignore_errors=True)
        folder, parsed = self._scene / "folder", self._scene / "parsed"
        folder.mkdir(parents=True)
        parsed.mkdir()
        before = os.environ.get("EZSD_CACHE_DIR")
        os.environ["EZSD_CACHE_DIR"] = str(parsed)
        try:
            self.set_up(folder)
            self.place(folder, way, name, content)
            with watched(folder, parsed, secret=None if self.reads_outside else self.work / "outside") as refused:
                self.read(folder, way, name, content)
            return refused
        finally:
            if before is None:
                del os.environ["EZSD_CACHE_DIR"]
            else:
                os.environ["EZSD_CACHE_DIR"] = before


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of a format."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def drawn(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A small picture that no two formats pack alike."""
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values).convert(mode)


def document(**extra: object) -> dict[str, Any]:
    """Two images and five boxes in COCO's format."""
    ring = [2, 2, 9, 2, 9, 8, 2, 8]
    images = [
        {"id": number, "file_name": name, "width": size[0], "height": size[1]}
        for number, (name, size) in enumerate(SIZES.items(), start=1)
    ]
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 7, 6], "area": 42, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1.5, 3, 9.25, 4], "area": 20.5, "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"id": 4, "image_id": 2, "category_id": 1, "bbox": [3, 3, 100, 100], "iscrowd": 1},
        {"id": 5, "image_id": 2, "category_id": 2, "bbox": [4, 4, 2, 2], "iscrowd": 0},
    ]
    for box in boxes:
        box["segmentation"] = [ring]
    # Columns of 20 pixels: the first has 5 of the object, the others none.
    boxes[3]["segmentation"] = {"size": [20, 16], "counts": [0, 5, 315]}
    boxes[4]["segmentation"] = {"size": [20, 16], "counts": "05k9"}
    names = {1: "cat", 2: "red car", 7: "dog"}
    categories = [{"id": number, "name": name, "supercategory": "thing"} for number, name in names.items()]
    return {"info": {"year": 2026}, "images": images, "categories": categories, "annotations": boxes, **extra}


def lvis_document() -> dict[str, Any]:
    """The same with what LVIS adds."""
    found = document()
    for image in found["images"]:
        image |= {"neg_category_ids": [7], "not_exhaustive_category_ids": [1]}
    for category, frequency in zip(found["categories"], "fcr", strict=True):
        category |= {"frequency": frequency, "synset": "x.n.01", "synonyms": [category["name"]]}
    for box in found["annotations"]:
        box["segmentation"], box["iscrowd"] = [[2, 2, 9, 2, 9, 8]], 0
        box["area"] = 21
    found["images"][1]["neg_category_ids"] = []
    return found


def as_bytes(value: object) -> bytes:
    """JSON."""
    return json.dumps(value).encode()


def put_images(folder: Path) -> None:
    """The images of `document`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(encoded(drawn(*SIZES["a.png"]), "PNG"))
    (folder / "b.jpg").write_bytes(encoded(drawn(*SIZES["b.jpg"]), "JPEG"))


def require_sound(found: Annotations) -> None:
    """The contract of a record."""
    width, height = (getattr(found.images, side)[found.image_index] for side in ("width", "height"))
    box = found.box
    assert np.isfinite(box).all()
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] > box[:, :2]).all()
    assert (box[:, 2] <= width).all()
    assert (box[:, 3] <= height).all()
    assert (np.diff(found.images.id) > 0).all()
    assert (np.diff(found.image_index) >= 0).all()
    assert len(set(found.annotation_id.tolist())) == len(found.annotation_id)
    assert not len(found.class_index) or 0 <= found.class_index.min() <= found.class_index.max() < len(found.names)
    found.digest()


class AnnotationFiles(Target):
    """COCO- and LVIS-format JSON, as a dataset, to evaluate on and to split."""

    name = "annotations"
    ways = ("as", "link")

    def _seeds(self) -> dict[str, bytes]:
        return {"coco.json": as_bytes(document()), "lvis.json": as_bytes(lvis_document())}

    def set_up(self, folder: Path) -> None:
        put_images(folder / "images")

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        path = folder / name
        dataset = tried(lambda: find_dataset(str(path), folder / "images", strict=False, novel=["dog"]))
        checked = dataset if isinstance(dataset, Exception) else tried(lambda: check_dataset(dataset, masks=True))
        if not isinstance(checked, Exception):
            _ = checked.problems or check_table(checked)
        tried(lambda: read_categories(path))
        split = SPLIT if isinstance(dataset, Exception) else dataset.split
        training = tried(lambda: load_training(path, split))
        if isinstance(training, Exception):
            # Whoever has checked a dataset is not refused later.
            assert isinstance(checked, Exception) or checked.problems, training
        else:
            require_sound(training)
            assert not set(training.names) & set(split.novel)
            tried(lambda: list(self._outlines(path, training)))
        for read in (load_evaluation, evaluation_annotations):
            found = tried(lambda read=read: read(path, split))
            if not isinstance(found, Exception):
                require_sound(found)
        made = tried(
            lambda: split_images(
                path, folder / "out", data_root=folder / "images", val=0.5, seed=0, base=None, novel=["dog"]
            )
        )
        if not isinstance(made, Exception):
            find_dataset(str(next((folder / "out").glob("*.toml"))))

    def _outlines(self, path: Path, found: Annotations) -> Iterator[object]:
        images = found.images
        sizes = {
            int(number): (int(images.height[at]), int(images.width[at]))
            for number, at in zip(found.annotation_id, found.image_index, strict=True)
        }
        return read_outlines(path, sizes, [1, 2])


TOML = b"""
name = "own"
exif = "turn"
[train]
images = "images"
annotations = "train.json"
[val]
images = "images"
annotations = "train.json"
[classes]
base = ["cat", "red car"]
novel = "others"
[prompts]
template = ["a photo of a {}", "a {} in a field"]
background = "background"
names = "clean"
descriptions = "descriptions.json"
"""
SENTENCES = as_bytes({"cat": ["a small animal", "an animal with whiskers"], "dog": ["an animal that barks"]})


class DatasetFiles(Target):
    """Dataset TOML and its descriptions. Its owner may name places anywhere."""

    name = "toml"
    reads_outside = True

    def _seeds(self) -> dict[str, bytes]:
        return {"own.toml": TOML, "descriptions.json": SENTENCES}

    def set_up(self, folder: Path) -> None:
        put_images(folder / "images")
        (folder / "train.json").write_bytes(as_bytes(document()))
        for name, content in self.seeds.items():
            (folder / name).write_bytes(content)

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        path = folder / "own.toml"
        loose = tried(lambda: find_dataset(str(path), strict=False))
        checked = loose if isinstance(loose, Exception) else tried(lambda: check_dataset(loose))
        found = tried(lambda: find_dataset(str(path)).require())
        if isinstance(found, Exception):
            assert isinstance(checked, Exception) or checked.problems, found
            return
        assert set(found.split.base).isdisjoint(found.split.novel)
        json.dumps(found.definition())
        for part in found.parts:
            tried(lambda part=part: found.images(part).read(ImageRecord(1, "a.png", *SIZES["a.png"])))


ORIENTED = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)


class ImageFiles(Target):
    """Image files of all kinds, with EXIF and without."""

    name = "images"
    examples = 200

    def _seeds(self) -> dict[str, bytes]:
        exif = b"Exif\0\0" + ORIENTED
        transparent = drawn(mode="RGBA")
        transparent.putalpha(drawn(mode="L"))
        wide = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24))
        files = {
            "rgb.png": encoded(drawn(), "PNG"),
            "oriented.png": encoded(drawn(), "PNG", exif=exif),
            "alpha.png": encoded(transparent, "PNG"),
            "palette.png": encoded(drawn(mode="P"), "PNG", transparency=3),
            "wide.png": encoded(wide, "PNG"),
            "grey.png": encoded(drawn(mode="L"), "PNG", transparency=7),
            "bits.png": encoded(drawn(mode="1"), "PNG"),
            "rgb.jpg": encoded(drawn(), "JPEG", exif=exif),
            "progressive.jpg": encoded(drawn(), "JPEG", progressive=True),
            "cmyk.jpg": encoded(drawn(mode="CMYK"), "JPEG"),
        }
        kinds = ("GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "DDS", "PCX", "SGI", "EPS", "ICNS")
        for kind in (*kinds, "MPO", "AVIF", "QOI"):
            # Which formats can be written depends on how Pillow was built.
            with contextlib.suppress(OSError, KeyError, ValueError):
                files[f"x.{kind.lower()}"] = encoded(drawn(), kind)
        for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "group4"):
            mode = "1" if compression == "group4" else "RGB"
            with contextlib.suppress(OSError, KeyError, ValueError):
                files[f"{compression}.tif"] = encoded(drawn(mode=mode), "TIFF", compression=compression)
        return files

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        path = folder / name
        for exif in ("turn", "ignore", "legacy"):
            reading = tried(lambda exif=exif: look(path, None, exif))
            pixels = tried(lambda exif=exif: read_pixels(path, None, exif))
            if isinstance(pixels, Exception):
                continue
            assert pixels.dtype == np.uint8
            assert not isinstance(reading, Exception)
            assert pixels.shape == (reading.size[1], reading.size[0], 3)
        tried(lambda: to_image(path))
        tried(lambda: find_sources([str(path)]))


class TarFiles(Target):
    """Tar files of images."""

    name = "tars"

    def _seeds(self) -> dict[str, bytes]:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, size in SIZES.items():
                data = encoded(drawn(*size), "PNG")
                entry = tarfile.TarInfo(f"train/{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            for name, kind in (("train/link.png", tarfile.SYMTYPE), ("train/same.png", tarfile.LNKTYPE)):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, "train/a.png"
                tar.addfile(entry)
            entry = tarfile.TarInfo("train/" + "long" * 60)
            tar.addfile(entry, io.BytesIO())
        return {"a.tar": file.getvalue()}

    def change(self, data: bytes, chance: Chance) -> bytes:
        """Mostly with header checksums that fit."""
        changed = super().change(data, chance)
        if chance.random() < 0.2:
            return changed
        way, name, content = unpacked(changed, list(self.seeds))
        found = bytearray(content)
        for at in range(0, len(found) - 511, 512):
            if found[at + 257 : at + 262] == b"ustar":
                found[at + 148 : at + 156] = b" " * 8
                found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
        return packed(way, name, bytes(found))

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        source = tried(lambda: image_source(folder, "a.tar/train", "turn"))
        for file_name in ("a.png", "same.png", "link.png", "b.jpg", "x", "long" * 60):
            tried(lambda file_name=file_name: source.find(file_name))
            tried(lambda file_name=file_name: source.identity(file_name))
            tried(lambda file_name=file_name: source.elsewhere(file_name, folder))
            tried(lambda file_name=file_name: source.read(ImageRecord(1, file_name, *SIZES["a.png"])))


# Stores


def linked(tree: Path, folder: Path) -> None:
    """A copy of a folder whose files are links to the same bytes: what is written anew leaves the first as it is."""
    shutil.copytree(tree, folder, copy_function=os.link, dirs_exist_ok=True)


def values_of(store: Store) -> list[Any]:
    """All that a store gives."""
    found: list[Any] = [store.manifest.fields, store.image_ids, store.sizes, *store.text, *store.teacher]
    found.append(store.bad_images)
    for product, fields in storekit.FIELDS.items():
        batch = getattr(store, product).batch(store.image_ids.tolist())
        found += [batch.counts, *(getattr(batch.rows, field) for field in fields)]
    return found


def equal(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Return whether two stores give the same."""
    return all(
        np.array_equal(mine, other) if isinstance(mine, np.ndarray) else mine == other
        for mine, other in zip(ours, theirs, strict=True)
    )


SEALED = ("COMMIT.json", "INCOMPLETE.json", "TRANSFER.json", "environment.json", "journal/")


class StoreFiles(Target):
    """A finished store; the file of an input is one of some kinds of its files."""

    examples = 15
    ways = ("as", "fit", "gone", "link")
    reads_outside = True

    @cached_property
    def whole(self) -> Path:
        """The store."""
        path = self.work / "whole"
        if not (path / "COMMIT.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            _write_store(path)
        return path

    @cached_property
    def values(self) -> list[Any]:
        """All that it gives."""
        return values_of(Store(self.whole))

    @abstractmethod
    def is_changed(self, name: str) -> bool:
        """Return whether a file is one of this target's."""

    def _seeds(self) -> dict[str, bytes]:
        assert self.values
        names = sorted(one.relative_to(self.whole).as_posix() for one in self.whole.rglob("*") if one.is_file())
        return {name: (self.whole / name).read_bytes() for name in names if self.is_changed(name)}

    def set_up(self, folder: Path) -> None:
        linked(self.whole, folder / "store")

    def place(self, folder: Path, way: str, name: str, content: bytes) -> None:
        store = folder / "store"
        if way == "fit":
            content = self._fit(store, name, content)
        super().place(store, way, name, content)

    def _fit(self, store: Path, name: str, content: bytes) -> bytes:
        """The content with its own seal, or with its digest in the commit mark."""
        record: object = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(content)
        if name.startswith(SEALED):
            if isinstance(record, dict):
                with contextlib.suppress(Exception):
                    record.pop("sha256", None)
                    return seal(record)
            return content
        super().place(store, "as", name, content)
        mark = json.loads((self.whole / "COMMIT.json").read_bytes())
        del mark["sha256"]
        found = file_digest(store / name)
        mark["files"][name] = {"size": found.size, "sha256": found.sha256}
        if name == "manifest.json":
            with contextlib.suppress(Exception):
                mark["manifest_digest"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()
        super().place(store, "as", "COMMIT.json", seal(mark))
        return content

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        store = folder / "store"
        tried(lambda: [str(one) for one in verify(store, deep=True)])
        tried(lambda: info_json(store))
        tried(lambda: info_lines(store))
        tried(lambda: verify_lines(store, deep=False))
        for where, how in ((store, "full"), (store, "quick"), (store.as_uri(), "full")):
            found = tried(lambda where=where, how=how: values_of(Store(where, verify=how)))
            if not isinstance(found, Exception) and way != "fit" and how == "full":
                # What is damaged is not taken for data.
                assert equal(found, self.values)
            tried(lambda where=where, how=how: Store(where, verify=how).environment)
        tried(lambda: str(compare(store, self.whole)))
        tried(lambda: export(store, folder / "out", format="npz"))
        tried(lambda: export(store.as_uri(), folder / "tars", format="webdataset"))


def _blocks(path: Path, writer: StoreWriter) -> None:
    for block in writer.pending():
        inside = storekit.IDS[1] in storekit.IDS[block.start : block.stop]
        rows = storekit.block_rows(block, most=6, empty={storekit.IDS[1]})
        write_block(path, block, rows, bad_images={storekit.IDS[1]: "truncated"} if inside else {})


def _write_store(path: Path, *, tasks: int | None = None) -> None:
    """A store of few rows, with an image that could not be read; so many of its shards, or all of it."""
    with storekit.open_writer(path, block_images=6) as writer:
        writer.write_environment({"host": "here"})
        storekit.write_per_store(writer)
        _blocks(path, writer)
        for task in writer.commit_tasks()[:tasks]:
            commit_shard(path, task)
        if tasks is None:
            writer.finish()


class StoreMetadata(StoreFiles):
    """zarr.json and manifest.json."""

    name = "store-metadata"

    def is_changed(self, name: str) -> bool:
        """See `StoreFiles.is_changed`."""
        return name == "manifest.json" or name.endswith("zarr.json")


class StoreShards(StoreFiles):
    """Shards of rows, offsets, checksums and per-store values."""

    name = "store-shards"

    def is_changed(self, name: str) -> bool:
        """See `StoreFiles.is_changed`."""
        return not name.endswith(".json") and "/c/" in name


class StoreMarks(StoreFiles):
    """COMMIT.json and what stands in its place while a store is mended or copied."""

    name = "store-marks"

    def is_changed(self, name: str) -> bool:
        """See `StoreFiles.is_changed`."""
        return name in ("COMMIT.json", "environment.json")

    def _seeds(self) -> dict[str, bytes]:
        mark = (self.whole / "COMMIT.json").read_bytes()
        return {**super()._seeds(), "INCOMPLETE.json": mark, "TRANSFER.json": mark}

    def place(self, folder: Path, way: str, name: str, content: bytes) -> None:
        if name in ("INCOMPLETE.json", "TRANSFER.json"):
            (folder / "store/COMMIT.json").unlink()
        super().place(folder, way, name, content)

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        super().read(folder, way, name, content)
        store = folder / "store"
        tried(lambda: pull(store.as_uri(), folder / "pulled"))
        tried(lambda: collect(store, strays=True, dry_run=True))
        if name == "TRANSFER.json":
            tried(lambda: pull(self.whole.as_uri(), store))
        tried(lambda: repair(store, storekit.Images(most=6)))
        tried(lambda: collect(store, strays=True))


class StoreJournal(StoreFiles):
    """The journal of an unfinished store."""

    name = "store-journal"
    examples = 15

    @cached_property
    def whole(self) -> Path:
        """The unfinished store."""
        path = self.work / "journaled"
        shutil.rmtree(path, ignore_errors=True)
        _write_store(path, tasks=4)
        return path

    @cached_property
    def values(self) -> list[Any]:
        """All that it gives once it is finished."""
        path = self.work / "finished"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.whole, path)
        return self._gone_on(path)

    def is_changed(self, name: str) -> bool:
        """See `StoreFiles.is_changed`."""
        return name.startswith("journal/")

    def _fit(self, store: Path, name: str, content: bytes) -> bytes:
        return super()._fit(store, name, content) if name.endswith(".json") else content

    def set_up(self, folder: Path) -> None:
        # A build writes into files of its journal.
        shutil.copytree(self.whole, folder / "store")

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        store = folder / "store"
        tried(lambda: [str(one) for one in verify(store, deep=True)])
        tried(lambda: info_json(store))
        tried(lambda: info_lines(store))
        tried(lambda: info(store))
        assert isinstance(tried(lambda: Store(store)), Exception)
        tried(lambda: repair(store))
        tried(lambda: collect(store))
        found = tried(lambda: self._gone_on(store))
        if not isinstance(found, Exception) and way == "as" and name.endswith(".json"):
            assert equal(found, self.values)

    def _gone_on(self, store: Path) -> list[Any]:
        with storekit.open_writer(store, block_images=6) as writer:
            storekit.write_per_store(writer)
            _blocks(store, writer)
            for task in writer.commit_tasks():
                commit_shard(store, task)
            writer.finish()
        return values_of(Store(store))


# Runs


RUN = (
    *("adapt.steps=1", "adapt.batch_size=16", "proposals.search=exhaustive", "proposals.sizes=[40]"),
    *("proposals.stride=0.5", "build.block_images=5", "train.steps=1", "train.batch_size=2", "train.warmup_steps=1"),
    *("train.reference_batch_size=2", "train.pseudo_confidence=0", "train.checkpoint_every=1"),
    "model.fpn_channels=8",
)


class RunFolders(Target):
    """A run's folder: JSON, tables, checkpoints."""

    name = "runs"
    ways = ("as", "fit", "gone", "link")
    examples = 10
    reads_outside = True

    @cached_property
    def run_folder(self) -> Path:
        """A finished, evaluated and audited run on drawn data."""
        path = self.work / "run"
        if not (path / "audit.json").exists():
            self._train(path)
        return path

    def _train(self, path: Path) -> None:
        for made in ("data", "store", "run"):
            shutil.rmtree(self.work / made, ignore_errors=True)
        config = load_preset("shapes", RUN)
        write_shapes(self.work / "data", train=3, val=2, seed=5, workers=1)
        dataset = find_dataset("shapes", self.work / "data")
        build_cache(BuildRequest(dataset=dataset, config=config, out=self.work / "store", workers=1, scheduler="sync"))
        run = train(TrainRequest(cache=self.work / "store", run=path, config=config))
        evaluate_run(run, data_root=None, device="cpu")
        audit(AuditRequest(target=str(path)))

    def _seeds(self) -> dict[str, bytes]:
        left_out = ("report.html", "train.lock")
        names = sorted(
            one.relative_to(self.run_folder).as_posix() for one in self.run_folder.rglob("*") if one.is_file()
        )
        return {name: (self.run_folder / name).read_bytes() for name in names if name not in left_out}

    def set_up(self, folder: Path) -> None:
        linked(self.run_folder, folder / "run")

    @property
    def _step(self) -> str:
        return "checkpoints/step-00000001/"

    def place(self, folder: Path, way: str, name: str, content: bytes) -> None:
        run = folder / "run"
        super().place(run, way, name, content)
        if way != "fit":
            return
        # Whoever makes a file makes the digests that go with it.
        spec, state = (json.loads(self.seeds[one]) for one in ("run.json", f"{self._step}state.json"))
        with contextlib.suppress(Exception):
            if name == "run.json":
                changed = json.loads(content)
                state |= {key: changed.get(key) for key in ("names", "text_sha256", "config")}
                state["store_digest"] = changed["store"]["digest"]
            elif name == "tables.safetensors":
                state["text_sha256"] = spec["text_sha256"] = rows_digest(load(content)["text"].numpy())
                super().place(run, "as", "run.json", as_bytes(spec))
            elif name.startswith(self._step) and name.endswith(".safetensors"):
                state["sha256"][name.removeprefix(self._step)] = file_digest(run / name).sha256
        if name != f"{self._step}state.json":
            super().place(run, "as", f"{self._step}state.json", as_bytes(state))

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        run = tried(lambda: Run.open(folder / "run"))
        if isinstance(run, Exception):
            return
        for look_at in (
            lambda: run.config,
            lambda: run.environment,
            run.starts,
            run.seconds,
            run.embeddings,
            run.latest,
            run.finished,
            run.read_metrics,
            run.read_validation,
        ):
            tried(look_at)
        weighed = name.startswith(("checkpoints/", "tables."))
        # A page and a network take most of the time: what no other file is needed for is left out.
        if weighed or name == "run.json":
            found = tried(lambda: load_trained(run, "cpu"))
            if not isinstance(found, Exception):
                image = torch.zeros(3, 40, 40, dtype=torch.uint8)
                (seen,) = found.detect([image], found.search(found.text))
                assert way == "fit" or torch.isfinite(seen.boxes).all()
        if not weighed:
            tried(lambda: write_report(run, data_root=None, images=1))
            tried(lambda: audit(AuditRequest(target=str(folder / "run"))))
            tried(lambda: write_card(run))
        spec = json.loads(self.seeds["run.json"])
        resumed = tried(lambda: Run.create_or_resume(folder / "run", spec, {"text": torch.eye(2)}))
        if not isinstance(resumed, Exception):
            tried(lambda: self._resume(resumed))

    def _resume(self, run: Run) -> None:
        latest = run.latest()
        if latest is not None:
            latest.trained()
            latest.average()
            latest.class_counts()
            parameter = torch.nn.Parameter(torch.zeros(3))
            restore_optimiser(torch.optim.SGD([parameter], lr=0.1), latest.optimiser())


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


class Weights(Target):
    """Weights of backbones and teachers: .safetensors, and .pth without code."""

    name = "weights"

    @cached_property
    def model(self) -> open_clip.CLIP:
        """A teacher that the weights may fit."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return open_clip.CLIP(**CLIP)

    def _seeds(self) -> dict[str, bytes]:
        state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
        whole = {name: value for name, value in self.model.state_dict().items() if isinstance(value, torch.Tensor)}
        code = {**state, "code": _Code()}
        files: dict[str, bytes] = {"a.safetensors": save(state), "clip.safetensors": save(whole)}
        for name, value in (("a.pth", state), ("clip.pt", whole), ("code.pth", code)):
            file = io.BytesIO()
            torch.save(value, file)
            files[name] = file.getvalue()
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=False)
            files[f"old-{name}"] = file.getvalue()
        return {**files, "bare.pt": pickle.dumps(code)}

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        state = tried(lambda: read_backbone(folder / name))
        if not isinstance(state, Exception):
            assert all(isinstance(value, torch.Tensor) for value in state.values())
        tried(lambda: load_checkpoint(self.model, "small", folder / name))


# Results, names and labels


class DetectionFiles(Target):
    """Results files and documents of detections."""

    name = "detections"

    def _seeds(self) -> dict[str, bytes]:
        found = document()
        results = [
            {
                "image_id": box["image_id"],
                "category_id": box["category_id"],
                "bbox": box["bbox"],
                "score": 0.9 - 0.1 * at,
            }
            for at, box in enumerate(found["annotations"])
        ]
        boxes = zip(results, found["annotations"], strict=True)
        masks = [{**one, "segmentation": box["segmentation"]} for one, box in boxes]
        whole = {**found, "annotations": [{"id": at, **one} for at, one in enumerate(results)]}
        return {"results.json": as_bytes(results), "masks.json": as_bytes(masks), "document.json": as_bytes(whole)}

    def set_up(self, folder: Path) -> None:
        (folder / "truth.json").write_bytes(as_bytes(document()))
        (folder / "lvis_truth.json").write_bytes(as_bytes(lvis_document()))

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        # An evaluation takes most of the time: one of them for each input.
        choices: tuple[tuple[str, Classes | None], ...] = (
            ("truth.json", None),
            ("truth.json", "novel"),
            ("lvis_truth.json", None),
        )
        truth, classes = choices[zlib.crc32(content) % len(choices)]
        found = tried(
            lambda: evaluate_results(
                folder / name,
                folder / truth,
                base=None,
                novel=["dog"],
                split_file=None,
                classes=classes,
                max_detections=None,
            )
        )
        if not isinstance(found, Exception):
            evaluation_tables(found, per_class=True)
            _require_shares(found)
        config = dataclasses.replace(load_preset("coco").proposals, boxes=str(folder / name))
        images = [ImageRecord(number, file, *size) for number, (file, size) in enumerate(SIZES.items(), start=1)]
        proposals = tried(lambda: given_proposals(config, images))
        if not isinstance(proposals, Exception):
            for image in images:
                box = proposals[image.id]["box"]
                assert np.isfinite(box).all()
                assert (box[:, 2:] - box[:, :2] >= 1).all()
                assert (box >= 0).all()
                assert (box <= [image.width, image.height] * 2).all()


def _require_shares(value: object, key: str = "") -> None:
    """Every AP and AR is a share, or absent."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_shares(inner, str(name))
    elif key.startswith(("AP", "AR")) and isinstance(value, float):
        assert -1e-9 <= value <= 100 + 1e-9, (key, value)


class NameFiles(Target):
    """Class lists, names of numbered classes, descriptions, files of a split."""

    name = "names"

    def _seeds(self) -> dict[str, bytes]:
        return {
            "classes.txt": b"# of the farm\ncat\nred car\n\ndog\n",
            "obj.names": b"cat\nred car\ndog\n",
            "list.csv": b'cat, red car, "tench, Tinca tinca"',
            "data.yaml": b"path: .\nnc: 3\nnames:\n  0: cat\n  1: red car\n  2: 'no'\n",
            "list.yaml": b"names: [cat, 'red car', &a dog]\ntrain: images\nwhen: 2026-01-01\n",
            "descriptions.json": SENTENCES,
            "split.toml": b'base = ["cat", "red car"]\nnovel = ["dog"]\n',
            "tables.toml": b'[classes]\nbase = ["cat"]\nnovel = ["dog"]\n',
        }

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        path = folder / name
        ending = path.suffix
        if ending == ".csv":
            with contextlib.suppress(UnicodeDecodeError):
                text = content.decode("utf-8", "surrogateescape")
                _require_names(tried(lambda: class_names("--classes", lists=[text])))
        elif ending in (".yaml", ".names"):
            _require_names(tried(lambda: read_names(path)))
        elif ending == ".json":
            found = tried(lambda: read_descriptions(path))
            if not isinstance(found, Exception):
                _require_names(tuple(one[0] for one in found))
        elif ending == ".toml":
            self._split(path)
        else:
            _require_names(tried(lambda: class_names("--classes", files=[path])))

    def _split(self, path: Path) -> None:
        table = dict.fromkeys(("cat", "red car", "dog"), "")
        found = tried(lambda: chosen_split(list(table), table, where=path, base=None, novel=None, split_file=path))
        if not isinstance(found, Exception):
            _require_names(found.names)


def _require_names(found: object) -> None:
    if isinstance(found, Exception):
        return
    assert isinstance(found, tuple)
    assert found
    assert all(isinstance(name, str) and name.strip() for name in found)
    assert len(set(found)) == len(found)
    json.dumps(found).encode()


VOC = b"""<annotation>
 <folder>x</folder><filename>a.png</filename>
 <size><width>24</width><height>16</height><depth>3</depth></size>
 <object><name>cat</name><difficult>0</difficult>
  <bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>
 <object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>24</xmax><ymax>16</ymax></bndbox>
  <part><name>head</name></part></object>
</annotation>
"""


VOC_TURNED = (
    VOC.replace(b"a.png", b"b.jpg")
    .replace(b"<width>24", b"<width>16")
    .replace(b"<height>16", b"<height>20")
    .replace(b"<xmax>24", b"<xmax>16")
)
"""The same of the other image, which has another size."""


class LabelFiles(Target):
    """Pascal-VOC XML, YOLO text, their lists and names."""

    name = "labels"
    ways = ("as", "link")

    def _seeds(self) -> dict[str, bytes]:
        return {
            "voc/Annotations/a.xml": VOC,
            "voc/Annotations/named.xml": VOC_TURNED,
            "listed/ImageSets/Main/trainval.txt": b"a\nb\n",
            "yolo/labels/a.txt": b"0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n",
            "yolo/data.yaml": b"nc: 2\nnames: [cat, dog]\n",
        }

    def set_up(self, folder: Path) -> None:
        for kind, images in (("voc", "JPEGImages"), ("listed", "JPEGImages"), ("yolo", "images")):
            put_images(folder / kind / images)
        listed = {"listed/Annotations/a.xml": VOC, "listed/Annotations/b.xml": VOC_TURNED}
        for name, content in (self.seeds | listed).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def read(self, folder: Path, way: str, name: str, content: bytes) -> None:
        kind = name.partition("/")[0]
        if name.endswith(".xml"):
            tried(lambda: read_voc(folder / name))
        elif name.endswith("a.txt"):
            tried(lambda: read_yolo(folder / name, 2))
        for corners in ("inclusive", "edges"):
            out = folder / f"out-{corners}"
            made = tried(
                lambda corners=corners, out=out: convert_folder(folder / kind, out, corners=corners, copy=True)
            )
            if isinstance(made, Exception):
                assert not out.exists()
                continue
            # What was converted is in order.
            found = find_dataset(str(next(out.glob("*.toml"))))
            require_sound(load_training(found.annotations("train"), found.split))
            assert all("re-normalisation" in line for line in check_dataset(found).problems)


TARGETS: tuple[type[Target], ...] = (
    AnnotationFiles,
    DatasetFiles,
    ImageFiles,
    TarFiles,
    StoreMetadata,
    StoreShards,
    StoreMarks,
    StoreJournal,
    RunFolders,
    Weights,
    DetectionFiles,
    NameFiles,
    LabelFiles,
)
BY_NAME = {target.name: target for target in TARGETS}
