"""Images of a dataset from tar files: the same store and figures as from a folder, and one line for what is wrong."""

import gzip
import io
import os
import pickle
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from ezsd.cache import Store
from ezsd.data.annotations import ImageRecord
from ezsd.errors import AnnotationError
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.data.image_source import image_source
from ezsd.pipeline.errors import DatasetError, ImageError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.training.train import TrainRequest, train

TOML = """
name = "packed"
[train]
images = "{train}"
annotations = "annotations/instances_train.json"
[val]
images = "{val}"
annotations = "annotations/instances_val.json"
[classes]
base = {base}
novel = {novel}
"""


def pack(tar: Path, files: dict[str, bytes], kind: str = "w") -> Path:
    with tarfile.open(tar, kind) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return tar


def images_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def toml(root: Path, dataset: Dataset, train: str, val: str) -> Dataset:
    lists = {"base": list(dataset.split.base), "novel": list(dataset.split.novel)}
    (root / "packed.toml").write_text(TOML.format(train=train, val=val, **lists))
    return find_dataset(str(root / "packed.toml"))


@pytest.fixture
def packed(shapes_root, shapes_dataset, tmp_path):
    """The shapes without a folder of images: training ones in three shards, validation ones in one tar file."""
    root = tmp_path / "packed"
    shutil.copytree(shapes_root / "annotations", root / "annotations")
    images = list(images_of(shapes_root / "train", "./").items())
    (root / "shards").mkdir()
    for number in range(3):
        pack(root / f"shards/train-{number:03d}.tar", dict(images[4 * number : 4 * number + 4]))
    pack(root / "val.tar", {"val/": b"", **images_of(shapes_root / "val", "val/")})
    return toml(root, shapes_dataset, "shards/train-{000..002}.tar", "val.tar/val")


def store_bytes(store: Path) -> dict[str, bytes]:
    files = (file for file in sorted(store.rglob("*")) if file.is_file() and file.suffix != ".log")
    return {str(file.relative_to(store)): file.read_bytes() for file in files if file.name != "environment.json"}


def record(name: str, size: tuple[int, int] = (8, 4)) -> ImageRecord:
    return ImageRecord(1, name, *size)


@pytest.fixture
def png(tmp_path) -> bytes:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "red.png")
    return (tmp_path / "red.png").read_bytes()


def test_the_store_the_losses_and_the_figures_are_those_of_a_folder(
    packed, shapes_root, shapes_dataset, quick_config, tmp_path
):
    plain = toml(tmp_path, shapes_dataset, str(shapes_root / "train"), str(shapes_root / "val"))
    shutil.copytree(shapes_root / "annotations", tmp_path / "annotations")
    losses, figures, stores = [], [], []
    for name, dataset in (("plain", plain), ("packed", packed)):
        store = tmp_path / f"{name}-store"
        build_cache(BuildRequest(dataset=dataset, config=quick_config, out=store, workers=1))
        run = train(TrainRequest(cache=store, run=tmp_path / f"{name}-run", config=quick_config))
        figures.append(evaluate_run(run, data_root=None, device="cpu"))
        losses.append([line["loss"] for line in run.read_metrics()])
        stores.append(store_bytes(store))
    assert stores[0] == stores[1]
    assert losses[0] == losses[1]
    assert figures[0] == figures[1]
    assert not list((packed.root).rglob("*.png"))


def test_a_folder_of_tar_files_is_read_as_they_are(packed, shapes_dataset):
    whole = packed.images("train")
    as_folder = toml(packed.root, shapes_dataset, "shards", "val.tar/val").images("train")
    for number in range(1, 13):
        one = record(f"{number:06d}.png", (128, 128))
        assert torch.equal(as_folder.read(one), shapes_dataset.images("train").read(one))
        assert torch.equal(pickle.loads(pickle.dumps(whole)).read(one), as_folder.read(one))  # noqa: S301


def test_a_folder_with_other_files_too_holds_images(tmp_path, png):
    pack(tmp_path / "a.tar", {"x.png": png})
    (tmp_path / "y.png").write_bytes(png)
    source = image_source(tmp_path, ".", "turn")
    assert source.has("y.png")
    assert not source.has("x.png")


def test_a_sound_packed_dataset_is_checked_without_a_word(packed):
    check = check_dataset(packed, decode=True)
    assert check.problems == []


def test_a_missing_shard_is_named(packed):
    (packed.root / "shards/train-001.tar").unlink()
    assert packed.missing("val") == []
    (line,) = packed.missing()
    assert line.startswith("no shards/train-001.tar in it; [train] images says so;")


def test_a_member_that_is_missing_is_one_line_with_where_it_is(packed, shapes_dataset):
    check = check_dataset(toml(packed.root, shapes_dataset, "shards", "val.tar"))
    (line,) = check.problems
    assert "val.tar/000001.png: no such image (8 like this" in line
    assert line.endswith('Try images = "val.tar/val" in [val].')
    whole = image_source(packed.root, "val.tar", "turn")
    assert whole.elsewhere(".//000001.png", packed.root) == "val.tar/val"
    assert whole.elsewhere("other/../val/000001.png", packed.root) is None
    with pytest.raises(ImageError, match=r"shards/000099\.png: no such image$"):
        image_source(packed.root, "shards", "turn").read(record("000099.png"))


def test_a_missing_member_is_left_out_of_a_store_with_a_reason_that_says_no_place(packed, with_settings, tmp_path):
    images = packed.root / "shards/train-000.tar"
    with tarfile.open(images) as archive:
        kept = {name: archive.extractfile(name).read() for name in archive.getnames()}
    pack(images, {**kept, "./000002.png": kept["./000002.png"][:100]})
    config = with_settings(build={"max_bad_images": 0.1, "block_images": 4}, adapt={"steps": 2})
    report = build_cache(BuildRequest(dataset=packed, config=config, out=tmp_path / "store", workers=1))
    assert report.bad_images == 1
    (reason,) = Store(tmp_path / "store").bad_images.values()
    assert reason.startswith("000002.png: cannot be read")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:1060], "unexpected end of data"),
        (lambda data: data.rstrip(b"\0").ljust(1536, b"\0"), r"no end at byte 1536\)"),
        (lambda data: data[: 1536 + 100], r"no end at byte 1536\)"),
        (lambda data: data[:512] + b"\xff" * 512 + data[1024:], "no header at byte"),
        (gzip.compress, "without compression"),
        (lambda data: b"", "empty file"),
        (lambda data: b"no tar" * 400, "is not a whole tar file"),
    ],
)
def test_a_damaged_tar_file_is_one_line(spoil, said, tmp_path, png):
    # An empty first member: what follows its header is another.
    tar, source = pack(tmp_path / "a.tar", {"empty": b"", "x.png": png}), image_source(tmp_path, "a.tar", "turn")
    whole = tar.read_bytes()
    tar.write_bytes(spoil(whole))
    with pytest.raises(DatasetError, match=said) as caught:
        source.read(record("x.png"))
    tar.write_bytes(whole)
    assert source.read(record("x.png")).shape == (3, 4, 8)
    assert str(caught.value).startswith(f"{tar}: ")
    assert "\n" not in str(caught.value)


def test_a_dataset_with_a_damaged_tar_file_is_refused_by_the_check_and_the_build(packed, quick_config, tmp_path):
    tar = packed.root / "shards/train-001.tar"
    tar.write_bytes(tar.read_bytes()[:-20000])
    assert [line for line in check_dataset(packed).problems if "train-001.tar: is not a whole tar file" in line]
    with pytest.raises(DatasetError, match=r"train-001\.tar: is not a whole tar file"):
        build_cache(BuildRequest(dataset=packed, config=quick_config, out=tmp_path / "store", workers=1))


def test_a_compressed_tar_file_is_refused_by_its_name_too(tmp_path, png):
    pack(tmp_path / "a.tar.gz", {"x.png": png}, "w:gz")
    with pytest.raises(DatasetError, match="unpack a compressed one"):
        image_source(tmp_path, "a.tar.gz", "turn").read(record("x.png"))
    (tmp_path / "a.tar").write_bytes(gzip.decompress((tmp_path / "a.tar.gz").read_bytes()))
    assert image_source(tmp_path, "a.tar", "turn").read(record("x.png")).shape == (3, 4, 8)


def test_a_doubled_member_is_refused_where_it_is_asked_for(tmp_path, png):
    pack(tmp_path / "a-0.tar", {"x.png": png, "y.png": png})
    pack(tmp_path / "a-1.tar", {"x.png": png, "z.png": png, "./z.png": png})
    source = image_source(tmp_path, "a-{0..1}.tar", "turn")
    assert source.read(record("y.png")).shape == (3, 4, 8)
    with pytest.raises(DatasetError, match=r"a-1.tar: has 'x.png', as \S+a-0.tar has; keep one of them$"):
        source.read(record("x.png"))
    with pytest.raises(DatasetError, match=r"a-1.tar: has 'z.png' twice; keep one of them$"):
        source.read(record("z.png"))
    pack(tmp_path / "a-1.tar", {"z.png": png})
    assert [source.read(record(f"{name}.png")).shape for name in "xyz"] == [(3, 4, 8)] * 3


def test_concatenated_tar_files_are_refused_and_read_as_shards(tmp_path, png):
    parts = [pack(tmp_path / f"a-{name}.tar", {f"{name}.png": png}) for name in "01"]
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(DatasetError, match=r"both\.tar: has more members after its end; keep .* apart$"):
        image_source(tmp_path, "both.tar", "turn").read(record("0.png"))
    assert image_source(tmp_path, "a-{0..1}.tar", "turn").read(record("1.png")).shape == (3, 4, 8)


def tar(folder: Path, *arguments: str) -> None:
    subprocess.run(["tar", *arguments], cwd=folder, check=True)  # noqa: S603, S607


def test_a_link_or_a_sparse_member_is_refused_where_it_is_asked_for(tmp_path, png):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "hole.png")
    with (tmp_path / "hole.png").open("ab") as file:
        file.truncate(1 << 20)
    (tmp_path / "link.png").symlink_to("red.png")
    named = ("red.png", "link.png", "hole.png")
    source = image_source(tmp_path, "a.tar", "turn")
    for kind in ("gnu", "posix"):
        tar(tmp_path, "-S", f"--format={kind}", "-cf", "a.tar", *named)
        assert source.read(record("red.png")).shape == (3, 4, 8)
        with pytest.raises(DatasetError, match=r"a\.tar/link\.png: is a symbolic link to 'red\.png'; pack it with -h$"):
            source.read(record("link.png"))
        with pytest.raises(DatasetError, match=r"a\.tar/hole\.png: is stored sparse; pack it without -S$"):
            source.read(record("hole.png"))
    tar(tmp_path, "-h", "-cf", "a.tar", *named)
    assert [source.read(record(name)).shape for name in named] == [(3, 4, 8)] * 3

    # The first shard has the target, but a link leads only within its own tar file.
    (tmp_path / "x.png").hardlink_to(tmp_path / "red.png")
    tar(tmp_path, "-cf", "b-1.tar", "red.png", "x.png")
    tar(tmp_path, "-f", "b-1.tar", "--delete", "red.png")
    pack(tmp_path / "b-0.tar", {"red.png": png})
    shards = image_source(tmp_path, "b-{0..1}.tar", "turn")
    with pytest.raises(DatasetError, match=r"b-1\.tar/x\.png: is a hard link to 'red\.png'.*; pack the file itself$"):
        shards.read(record("x.png"))
    tar(tmp_path, "-cf", "b-1.tar", "x.png")
    assert shards.read(record("x.png")).shape == (3, 4, 8)


def test_a_file_that_is_packed_by_its_folder_and_its_name_is_one(tmp_path, png):
    (tmp_path / "dd").mkdir()
    (tmp_path / "dd/a.png").write_bytes(png)
    tar(tmp_path, "-cf", "a.tar", "dd", "dd/a.png")
    assert image_source(tmp_path, "a.tar/dd", "turn").read(record("a.png")).shape == (3, 4, 8)


@pytest.mark.parametrize("member", ["a/x.png", "./a/x.png", "././a//x.png"])
def test_a_spelling_of_a_name_leads_to_its_member(member, tmp_path, png):
    pack(tmp_path / "a.tar", {member: png})
    for place, prefix in (("a.tar", "a/"), ("a.tar/./a/", "")):
        source = image_source(tmp_path, place, "turn")
        names = [start + name for start in ("", "./", "././") for name in (f"{prefix}x.png", f"{prefix}./x.png")]
        assert {source.identity(name) for name in names} == {source.identity(f"{prefix}/x.png".lstrip("/"))}
        assert source.read(record(names[-1])).shape == (3, 4, 8)
        with pytest.raises(ImageError) as caught:
            source.read(record(names[-1], (9, 9)))
        assert str(tmp_path) not in source.portable_reason(caught.value)


@pytest.mark.parametrize("numbers", ["{003..000}", "{0..9999999999}", "{0..999}{000..100}"])
def test_a_range_of_no_or_too_many_tar_files_is_one_line(numbers, tmp_path):
    with pytest.raises(DatasetError, match=r"^images = 'a-\{.*expected .* 1 to 100,000 tar files, found \{[^\n]*$"):
        image_source(tmp_path, f"a-{numbers}.tar", "turn")
    assert len(image_source(tmp_path, "a-{00..99}{0..999}.tar", "turn").roots) == 100_000


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a\\x.png", ""])
def test_a_name_that_leads_out_is_refused_as_in_a_folder(name, tmp_path, png):
    pack(tmp_path / "a.tar", {"x.png": png})
    with pytest.raises(AnnotationError, match=r"expected a path below \S+a\.tar\. Correct file_name"):
        image_source(tmp_path, "a.tar", "turn").read(record(name))


def test_another_unicode_form_of_a_name_and_a_second_name_of_a_file_are_found(tmp_path, png):
    tar = pack(tmp_path / "a.tar", {unicodedata.normalize("NFD", "é.png"): png})
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, unicodedata.normalize("NFD", "././é.png")
        archive.addfile(link)
    source = image_source(tmp_path, "a.tar", "turn")
    assert source.read(record(unicodedata.normalize("NFC", "é.png"))).shape == (3, 4, 8)
    assert source.identity("link.png") == source.identity("é.png")


def test_a_tar_file_that_was_replaced_is_read_anew(tmp_path, png):
    pack(tmp_path / "a.tar", {"x.png": png})
    source = image_source(tmp_path, "a.tar", "turn")
    assert source.read(record("x.png")).shape == (3, 4, 8)
    assert not source.has("y.png")
    pack(tmp_path / "a.tar", {"note": b"longer" * 1000, "x.png": png, "y.png": png})
    assert source.read(record("x.png")).shape == (3, 4, 8)
    assert source.has("y.png")
    # Of the same size and time, as reproducible packing makes them.
    pack(tmp_path / "b.tar", {"note": b"longer" * 1000, "x.png": png, "z.png": png})
    was = (tmp_path / "a.tar").stat()
    os.utime(tmp_path / "b.tar", ns=(was.st_atime_ns, was.st_mtime_ns))
    (tmp_path / "b.tar").rename(tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_size == was.st_size
    assert source.has("z.png")
