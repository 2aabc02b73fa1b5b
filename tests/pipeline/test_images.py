"""One reader of images: orientation, modes and size by one rule, from `data check` to `ezsd detect`."""

import contextlib
import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ezsd.cache import Store, StoreMismatch
from ezsd.cache.format.sealed_json import seal
from ezsd.data.annotations import ImageRecord
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.arguments import find_sources
from ezsd.pipeline.data import images
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import find_dataset, from_definition
from ezsd.pipeline.data.image_source import ImageFolder
from ezsd.pipeline.data.images import ALPHA, MAX_PIXELS, SIXTEEN_BITS, look, read_image, read_pixels
from ezsd.pipeline.errors import DatasetError, ImageError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.extraction.reuse import plan_reuse
from ezsd.pipeline.inference.detect import detect_images
from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
from ezsd.pipeline.training.train import TrainRequest, store_dataset, train, training_samples

ORIENTATION = 0x0112
# How a picture has to be stored so that a viewer, told the orientation, shows it upright.
STORED = {
    1: lambda shown: shown,
    2: np.fliplr,
    3: lambda shown: np.rot90(shown, 2),
    4: np.flipud,
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: np.rot90(shown, 2).swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}
TOML = """
name = "own"
{exif}
[train]
images = "train"
annotations = "annotations/instances_train.json"
[val]
images = "val"
annotations = "annotations/instances_val.json"
[classes]
base = {base}
novel = {novel}
"""


def scene(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save_turned(shown, orientation, path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](shown))).save(path, exif=exif)


def by_size(pixels):
    return pixels.shape[1], pixels.shape[0]


# Orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("size", [(24, 24), (30, 20)])
def test_an_image_is_turned_where_the_turned_size_is_the_stated_one(orientation, size, tmp_path):
    shown, path = scene(*size), tmp_path / "a.png"
    save_turned(shown, orientation, path)
    stored = np.asarray(STORED[orientation](shown))
    np.testing.assert_array_equal(read_pixels(path), shown)
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0), shown)
    np.testing.assert_array_equal(read_pixels(path, size, "turn"), shown)
    np.testing.assert_array_equal(read_pixels(path, by_size(stored), "ignore"), stored)
    np.testing.assert_array_equal(read_pixels(path, by_size(stored), "legacy"), stored)
    if by_size(stored) != size:
        np.testing.assert_array_equal(read_pixels(path, by_size(stored), "turn"), stored)
    record = ImageRecord(1, "a.png", *size)
    np.testing.assert_array_equal(ImageFolder("turn", tmp_path).read(record).permute(1, 2, 0), shown)
    assert look(path, size).size == size


@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_and_a_tiff_are_turned_as_well(orientation, tmp_path):
    # Blocks of one colour survive JPEG.
    shown = np.kron(scene(3, 2), np.ones((16, 16, 1), np.uint8))
    for name in ("a.jpg", "a.tif"):
        save_turned(shown, orientation, tmp_path / name)
        found = read_pixels(tmp_path / name, by_size(shown))
        assert np.abs(found[8::16, 8::16].astype(int) - shown[8::16, 8::16]).max() < 24, name


def test_the_message_about_a_size_names_exif_where_that_explains_it(tmp_path):
    save_turned(scene(30, 20), 6, tmp_path / "a.png")
    with pytest.raises(ImageError, match=r'say 30 x 20 pixels.* 20 x 30, or 30 x 20 .*EXIF.*exif = "ignore"'):
        read_pixels(tmp_path / "a.png", (30, 20), "ignore")
    with pytest.raises(ImageError, match=r"say 31 x 20 pixels.* has 20 x 30, or 30 x 20 when turned by its EXIF"):
        read_pixels(tmp_path / "a.png", (31, 20), "turn")


def test_xmp_and_unknown_orientations(tmp_path):
    shown = scene(9, 7)
    save_turned(shown, 1, tmp_path / "one.png")
    for value in (0, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        Image.fromarray(shown).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), shown)


# The whole way: a dataset whose files are turned gives what the same upright files give


@pytest.fixture(scope="module", params=["lying", pytest.param("square", marks=pytest.mark.slow)])
def pair(request, shapes_root, tmp_path_factory):
    """Two datasets of the same pictures: upright, and stored in all eight orientations."""
    upright, turned = (tmp_path_factory.mktemp(request.param) / name / "shapes" for name in ("upright", "turned"))
    shutil.copytree(shapes_root, upright)
    height = 128 if request.param == "square" else 96
    for part in ("train", "val"):
        path = upright / f"annotations/instances_{part}.json"
        document = json.loads(path.read_text())
        for image in document["images"]:
            image["height"] = height
        document["annotations"] = [one for one in document["annotations"] if one["bbox"][1] < height - 12]
        path.write_text(json.dumps(document))
        for file in (upright / part).iterdir():
            Image.fromarray(read_pixels(file)[:height]).save(file)
    shutil.copytree(upright, turned)
    for part in ("train", "val"):
        for number, file in enumerate(sorted((turned / part).iterdir())):
            save_turned(read_pixels(upright / part / file.name), 1 + number % 8, file)
    return find_dataset("shapes", upright), find_dataset("shapes", turned)


@pytest.fixture(scope="module")
def stores(pair, quick_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, dataset in zip(("upright", "turned"), pair, strict=True):
        build_cache(BuildRequest(dataset=dataset, config=quick_config, out=folder / name, scheduler="sync"))
    return [Store(folder / name) for name in ("upright", "turned")]


def rows(store):
    return [
        getattr(getattr(store, product)[image], field.name)
        for product in ("proposals", "regions", "ground_truth")
        for image in store.image_ids.tolist()
        for field in dataclasses.fields(getattr(store, product)[image])
    ]


def test_stores_of_turned_files_hold_the_rows_of_upright_ones(stores):
    upright, turned = stores
    assert turned.bad_images == {}
    for one, other in zip(rows(upright), rows(turned), strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_evaluation_crops_and_detection_see_the_same_pictures(pair, stores, quick_config, tmp_path):
    found = []
    for name, dataset, store in zip(("upright", "turned"), pair, stores, strict=True):
        samples = training_samples(store, store_dataset(store, None), quick_config.train)
        run = train(TrainRequest(cache=store.path, run=tmp_path / name, config=quick_config))
        evaluate_run(run, data_root=None, device="cpu")
        images = find_sources([dataset.root / "val"])
        options = {"threshold": 0.0, "device": "cpu", "drawn": None}
        found.append(
            (
                [samples.read_image(image) for image in store.image_ids.tolist()],
                (run.folder / "detections.json").read_text(),
                evaluate_crops(run, data_root=None, device="cpu"),
                [one.objects for one in detect_images(images, run, ["ring", "bar"], **options)],
            )
        )
    (pixels, *upright), (other_pixels, *turned) = found
    assert all(torch.equal(one, other) for one, other in zip(pixels, other_pixels, strict=True))
    assert upright == turned


def test_a_store_is_told_from_one_that_was_built_before_images_were_turned(pair, stores, quick_config, tmp_path):
    upright, turned = pair
    assert "images" not in stores[0].manifest.products["teacher"].inputs
    assert stores[1].manifest.products["teacher"].inputs["images"] == {"exif": "turn"}
    old = dataclasses.replace(turned, exif="legacy")
    config = load_preset(
        "shapes", ["adapt.steps=1", "proposals.search=exhaustive", "proposals.sizes=[64]", "build.max_bad_images=0.9"]
    )
    request = BuildRequest(dataset=old, config=config, out=tmp_path / "store", scheduler="sync", limit=4)
    build_cache(request)
    again = dataclasses.replace(request, dataset=turned)
    with pytest.raises(StoreMismatch, match="images"):
        build_cache(again)
    # What was made by either rule is the same where no image is turned.
    same = dataclasses.replace(upright, exif="legacy")
    build_cache(dataclasses.replace(request, dataset=same, out=tmp_path / "same"))
    assert build_cache(dataclasses.replace(request, dataset=upright, out=tmp_path / "same")).already_complete
    assert plan_reuse(tmp_path / "same", Store(tmp_path / "store").manifest).products
    assert not plan_reuse(tmp_path / "store", stores[1].manifest).products


def test_a_store_that_does_not_say_how_it_read_images_is_read_as_it_was(stores, tmp_path):
    for store in stores:
        shutil.copytree(store.path, tmp_path / store.path.name)
        path = tmp_path / store.path.name / "environment.json"
        environment = json.loads(path.read_text())
        del environment["sha256"]
        assert environment["dataset"].pop("exif") == "turn"
        path.write_bytes(seal(environment))
        assert store_dataset(Store(path.parent), None).exif == "legacy"
        del environment["dataset"]
        path.write_bytes(seal(environment))
        assert store_dataset(Store(path.parent), None).exif == "legacy"


def test_a_store_that_did_not_turn_images_says_so_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_told", set())
    for name in ("a", "b"):
        save_turned(scene(24, 24), 3, tmp_path / f"{name}.png")
        read_pixels(tmp_path / f"{name}.png", None, "legacy")
    Image.fromarray(scene(24, 24)).save(tmp_path / "plain.png")
    read_pixels(tmp_path / "plain.png", None, "legacy")
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'a.png'}: has an EXIF orientation (3), which the store was built without")


def test_a_store_that_did_not_turn_images_is_built_again_as_told_and_reads_them_by_the_rule(
    pair, stores, quick_config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(images, "_told", set())
    old = shutil.copytree(stores[1].path, tmp_path / "old")
    environment = json.loads((old / "environment.json").read_text())
    del environment["sha256"], environment["dataset"]["exif"]
    (old / "environment.json").write_bytes(seal(environment))

    def read_all(store):
        caplog.clear()
        samples = training_samples(store, store_dataset(store, None), quick_config.train)
        for image in store.image_ids.tolist():
            with contextlib.suppress(ImageError):
                samples.read_image(image)
        return caplog.text

    assert "has an EXIF orientation (2), which the store was built without heeding" in read_all(Store(old))
    monkeypatch.setattr(images, "_told", set())
    request = BuildRequest(dataset=pair[1], config=quick_config, out=tmp_path / "new", scheduler="sync", reuse=old)
    build_cache(request)
    assert "without heeding" not in read_all(Store(tmp_path / "new"))


@pytest.fixture
def own(pair):
    """The turned files as a TOML file of one's own, with a line about EXIF."""
    _, turned = pair

    def make(exif):
        text = TOML.format(exif=exif, base=json.dumps(turned.split.base), novel=json.dumps(turned.split.novel))
        (turned.root / "own.toml").write_text(text)
        return find_dataset(str(turned.root / "own.toml"))

    return make


def test_data_check_says_which_orientations_it_applies(own):
    found = check_dataset(own(""), decode=True)
    assert found.problems == []
    notes = [note for note in found.notes if "instances_train" in note]
    lying = found.dataset.root.parent.parent.name.startswith("lying")
    either = "the stated size fits either way"
    if lying:
        assert [note.split("note: ")[1][:8] for note in notes] == ["6 of 12 ", "4 of 12 "]
        assert either in notes[0]
        assert "as the stated size says" in notes[1]
    else:
        assert [note.split("note: ")[1][:8] for note in notes] == ["10 of 12"]
        assert either in notes[0]
    assert 'exif = "ignore"' in notes[0]
    ignoring = check_dataset(own('exif = "ignore"'))
    # One line a file, with the number of images.
    assert [problem.count("(4 like this") for problem in ignoring.problems] == ([1, 1] if lying else [])
    assert all("EXIF" in problem for problem in ignoring.problems)
    assert any("which the dataset ignores" in note for note in ignoring.notes)


def test_a_dataset_may_ignore_orientations_and_its_records_say_so(own):
    dataset = own('exif = "ignore"')
    assert from_definition(json.loads(json.dumps(dataset.definition())), dataset.root) == dataset
    assert own('exif = "turn"') == own("")
    with pytest.raises(DatasetError, match=r'own.toml: exif: expected "turn" or "ignore", found \'legacy\''):
        own('exif = "legacy"')
    with pytest.raises(DatasetError, match=r"exif: expected"):
        own("exif = ['turn']")


# Modes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WHITE = np.full((16, 16, 3), 255, np.uint8)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def transparent_palette():
    image = Image.fromarray(RAMP).convert("P")
    image.info["transparency"] = 7
    return image, grey(np.where(RAMP == 7, 255, RAMP))


def keyed_colour():
    image = Image.fromarray(grey(RAMP))
    image.info["transparency"] = (9, 9, 9)
    return image, grey(np.where(RAMP == 9, 255, RAMP))


def with_alpha(mode):
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, :4], alpha[:, 4:8] = 0, 51
    colour = Image.fromarray(RAMP if mode == "LA" else grey(RAMP))
    colour.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    return colour, grey(RAMP) * share + 255 * (1 - share)


MODES = {
    "1.png": lambda: (Image.fromarray(RAMP > 99), grey(255 * (RAMP > 99))),
    "L.png": lambda: (Image.fromarray(RAMP), grey(RAMP)),
    "P.png": lambda: (Image.fromarray(RAMP).convert("P"), grey(RAMP)),
    "RGB.png": lambda: (Image.fromarray(scene(16, 16)), scene(16, 16)),
    "CMYK.tif": lambda: (Image.fromarray(grey(RAMP)).convert("CMYK"), grey(RAMP)),
    "YCbCr.tif": lambda: (Image.fromarray(grey(RAMP)).convert("YCbCr"), grey(RAMP)),
    "16.png": lambda: (Image.fromarray(RAMP.astype(np.uint16) * 257), grey(RAMP)),
    "16.tif": lambda: (Image.fromarray(RAMP.astype(np.uint16) * 257), grey(RAMP)),
    "16 between.png": lambda: (Image.fromarray(np.full((16, 16), 129, np.uint16)), grey(np.full((16, 16), 1))),
    "LA.png": lambda: with_alpha("LA"),
    "RGBA.png": lambda: with_alpha("RGBA"),
    "RGBA.webp": lambda: with_alpha("RGBA"),
    "P transparent.png": transparent_palette,
    "RGB transparent.png": keyed_colour,
}
CONVERTED = {name: SIXTEEN_BITS if name.startswith("16") else ALPHA for name in list(MODES)[6:]}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_read_by_its_rule(name, tmp_path):
    image, expected = MODES[name]()
    options = {"lossless": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, **options)
    found = read_pixels(tmp_path / name)
    assert found.dtype == np.uint8
    assert np.abs(found - np.asarray(expected, float)).max() <= 1
    assert look(tmp_path / name).conversion == CONVERTED.get(name, "")
    if name not in CONVERTED:
        np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_opaque_alpha_changes_no_pixel(tmp_path):
    Image.fromarray(scene(16, 16)).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.png"), scene(16, 16))


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_a_mode_without_a_range_is_refused_by_name(mode, dtype, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "wide.tif")
    for read in (read_pixels, read_image, look):
        with pytest.raises(ImageError, match=rf"wide.tif: has pixels of mode {mode} \(.*save the image as 8-bit"):
            read(tmp_path / "wide.tif")


def test_a_dataset_of_other_modes_is_checked_built_trained_and_detected(shapes_root, quick_config, tmp_path):
    """16-bit and half transparent files give what the same files of 8 bits give."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    shutil.copytree(shapes_root, plain)
    for file in (plain / "train").iterdir():
        Image.fromarray(grey(read_pixels(file)[..., 0])).save(file)
    shutil.copytree(plain, other)
    for number, file in enumerate(sorted((other / "train").iterdir())):
        pixels = read_pixels(file)[..., 0]
        if number % 2:
            Image.fromarray(pixels.astype(np.uint16) * 257).save(file)
        else:
            alpha = np.where(pixels > 128, 0, 255).astype(np.uint8)
            image = Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(alpha)])
            image.save(file)
            Image.fromarray(grey(np.where(alpha, pixels, 255))).save(plain / "train" / file.name)
    found = check_dataset(find_dataset("shapes", other), decode=True)
    assert found.problems == []
    assert [note.split("note: ")[1].split(";")[0] for note in found.notes] == [
        f"6 of 12 images have {kind}" for kind in (ALPHA, SIXTEEN_BITS)
    ]
    stores = []
    for name, root in (("a", plain), ("b", other)):
        dataset = find_dataset("shapes", root)
        build_cache(BuildRequest(dataset=dataset, config=quick_config, out=tmp_path / name, scheduler="sync"))
        stores.append(Store(tmp_path / name))
    for one, two in zip(rows(stores[0]), rows(stores[1]), strict=True):
        np.testing.assert_array_equal(one, two)
    assert stores[1].manifest.products["teacher"].inputs["images"] == {"modes": "converted"}
    train(TrainRequest(cache=stores[1].path, run=tmp_path / "run", config=quick_config))
    for plain_file, file in zip(sorted((plain / "train").iterdir()), sorted((other / "train").iterdir()), strict=True):
        assert torch.equal(read_image(plain_file), read_image(file))


# Size


def empty_png(path, width, height):
    """A PNG that says how large it is, and holds no pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_an_image_that_is_too_large_is_named_with_a_cure(tmp_path):
    empty_png(tmp_path / "large.png", 20_000, 20_000)
    for read in (read_pixels, look):
        with pytest.raises(ImageError, match=r"20000 x 20000 = 400,000,000 pixels, at most 180,000,000 .*tiles"):
            read(tmp_path / "large.png")


def test_a_large_image_within_the_limit_is_opened_without_a_word(tmp_path):
    width = 10_000
    empty_png(tmp_path / "large.png", width, MAX_PIXELS // width)
    command = "import sys, pathlib, ezsd.pipeline.data.images as i; print(i.look(pathlib.Path(sys.argv[1])).size)"
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path / "large.png"], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == (f"({width}, {MAX_PIXELS // width})", "")


@pytest.mark.parametrize("exif", ["turn", "ignore", "legacy"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_a_large_image_is_converted_in_strips_to_the_same_pixels(tmp_path, monkeypatch, mode, exif):
    values = np.random.default_rng(7).integers(0, 2**16 if mode == "I;16" else 256, (13, 9, 4))
    if mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16))
    else:
        picture = Image.fromarray(values.astype(np.uint8)).convert(mode)
    for orientation in range(1, 9):
        picture.getexif()[ORIENTATION] = orientation
        more = {"transparency": 3} if mode in ("P", "L", "I;16") else {}
        picture.save(tmp_path / "a.png", exif=picture.getexif(), **more)
        whole = read_pixels(tmp_path / "a.png", None, exif)
        with monkeypatch.context() as patch:
            # Two rows of pixels at a time.
            patch.setattr(images, "_STRIP", 18)
            np.testing.assert_array_equal(read_pixels(tmp_path / "a.png", None, exif), whole)


def test_too_little_memory_is_not_called_a_damaged_image(tmp_path, monkeypatch):
    def short_of_memory(*_):
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", short_of_memory)
        patch.setattr(Image.Image, "__array_interface__", property(short_of_memory))
        with pytest.raises(MemoryError):
            read_pixels(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png").shape == (8, 8, 3)


def test_formats_that_start_programs_are_refused_by_name_and_not_looked_for_in_folders(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    shutil.copy(tmp_path / "a.eps", tmp_path / "a.jpg")
    for name in ("a.eps", "a.jpg"):
        with pytest.raises(ImageError, match=f"{name}: is not an image of a format that is read"):
            look(tmp_path / name)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    (tmp_path / "a.jpg").unlink()
    assert find_sources([tmp_path]) == [tmp_path / "b.png"]
