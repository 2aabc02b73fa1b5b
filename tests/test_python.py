"""The face for Python: what a notebook uses, with signatures that stay."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ezsd
from ezsd.pipeline.data.images import ImageError, to_image
from ezsd.pipeline.inference.detect import Model, detect_images

ROOT = Path(__file__).resolve().parent.parent
SIGNATURES = {
    "export": (
        "(run: PLACE, out: PLACE, *, format: Format = onnx, classes: Sequence[str] | None = None, "
        "overrides: Sequence[str] = (), weights: PLACE | None = None) -> Exported"
    ),
    "load": "(run: PLACE, *, device: str = auto, overrides: Sequence[str] = (), template: str | None = None) -> Model",
    "RegionDataset": "(store: Store | PLACE, image_ids: Sequence[int] | None = None) -> None",
    "Store": "(path: PLACE, *, verify: Literal[quick, full] = full) -> None",
}
OPEN = ["eval.score_threshold=0"]


@pytest.fixture(scope="module")
def model(shapes_run):
    return ezsd.load(shapes_run.folder, device="cpu", overrides=OPEN)


@pytest.fixture
def image(shapes_root):
    return shapes_root / "val/000001.png"


def test_signatures_stay():
    assert sorted(ezsd.__all__) == ["EzsdError", "RegionDataset", "Store", "export", "load"]
    assert set(ezsd.__all__) <= set(dir(ezsd))
    place = "str | os.PathLike[str]"
    assert {name: str(inspect.signature(getattr(ezsd, name))).replace("'", "") for name in SIGNATURES} == {
        name: said.replace("PLACE", place) for name, said in SIGNATURES.items()
    }
    options = ["threshold", "class_thresholds", "alone", "batch_size"]
    assert list(inspect.signature(Model.__call__).parameters) == ["self", "images", "names", *options]
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        ezsd.lode  # noqa: B018


def test_a_model_finds_what_the_command_finds(model, shapes_run, image):
    names = ["circle", "ring"]
    (wanted,) = detect_images([image], shapes_run, names, threshold=0.0, device="cpu", drawn=None, overrides=OPEN)
    found = model(image, names, threshold=0.0)
    assert found == wanted
    assert len(found) == len(found.objects) > 0
    assert found[0].score == max(one.score for one in found)
    assert (found.boxes.shape, found.scores.shape, found.masks) == ((len(found), 4), (len(found),), None)
    assert set(found.names) <= set(names)
    assert found.source == str(image)
    assert len(model(image, names, threshold=found[0].score)) == 1
    # No names: all of the run's own.
    assert model.names[: len(model.base_names)] == model.base_names
    assert {one.name for one in model(image, threshold=0.0)} <= set(model.names)
    assert {one.name for one in model(image, "ring", threshold=0.0, alone=True)} == {"ring"}


def test_an_image_is_the_same_in_every_form(model, image):
    with Image.open(image) as opened:
        picture = opened.convert("RGB")
    pixels = np.asarray(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = [image, str(image), image.as_uri(), picture, pixels, tensor, tensor / 255]
    first, *others = model(forms, ["ring"], threshold=0.0)
    assert len(first) > 0
    for other in others:
        assert other.objects == first.objects
    assert [one.source for one in (first, *others)] == [str(image)] * 2 + [image.as_uri()] + [""] * 4


def test_a_picture_is_turned_as_viewers_show_it(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert tuple(to_image(opened).shape) == tuple(to_image(tmp_path / "turned.jpg").shape) == (3, 40, 20)
    assert tuple(to_image(np.zeros((20, 40), np.uint8)).shape) == (3, 20, 40)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gone.png", "no such image"),
        ("memory://gone.png", "memory://gone.png: cannot be read: FileNotFoundError"),
        (np.zeros((4, 4, 3)), r"expected an array \(H, W, 3\) or \(H, W\) uint8, found \(4, 4, 3\) float64"),
        (torch.zeros(4, 4, 3), r"expected a tensor \(3, H, W\).*found \(4, 4, 3\)"),
        (7, "expected a path, URL, PIL image, array or tensor, found int"),
        (torch.full((3, 4, 4), 128.0), r"floating values in \[0, 1\], found 128 to 128"),
        (torch.full((3, 4, 4), torch.nan), "floating values in"),
        (torch.zeros(3, 0, 5), "at least one pixel, found 5 x 0"),
        (Image.new("RGB", (0, 4)), "at least one pixel, found 0 x 4"),
        ("zip://x.png::gone.zip", "cannot be read"),
    ],
)
def test_what_is_no_image_is_one_line(source, words):
    with pytest.raises(ImageError, match=words) as caught:
        to_image(source)
    assert isinstance(caught.value, ezsd.EzsdError)


def test_a_picture_that_is_cut_or_closed_is_one_line(image, tmp_path):
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:500])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ImageError, match="the image: cannot be read"):
        to_image(cut)
    with Image.open(image) as closed:
        pass
    with pytest.raises(ImageError, match="the image: (is closed|cannot be read)"):
        to_image(closed)
    with Image.open(image) as loaded:
        loaded.load()
    assert to_image(loaded).shape == to_image(image).shape


def test_a_picture_turned_by_hand_is_not_turned_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a b.jpg", exif=exif)
    with Image.open(tmp_path / "a b.jpg") as opened:
        assert tuple(to_image(opened.rotate(-90, expand=True)).shape) == (3, 40, 20)
    assert tuple(to_image((tmp_path / "a b.jpg").as_uri()).shape) == (3, 40, 20)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "at least one class name"),
        ([3], "at least one class name"),
        (["circle", "circle"], "'circle' occurs twice"),
        ([""], "is empty"),
        ("cat\ndog", "a line break"),
    ],
)
def test_names_that_are_none_are_one_line(model, image, names, words):
    with pytest.raises(ezsd.EzsdError, match=words):
        model(image, names)


def test_arguments_of_a_call(model, image, shapes_run):
    with pytest.raises(ezsd.EzsdError, match=r"threshold must lie in \[0, 1\], got 30"):
        model(image, threshold=30)
    assert model([], ["ring"]) == []
    same = ezsd.load(shapes_run.folder, device=torch.device("cpu"), overrides=OPEN[0])
    assert same(image, ["ring"], threshold=0.0) == model(image, ["ring"], threshold=0.0)


def test_masks_are_arrays_even_of_nothing(masked_run, image):
    model = ezsd.load(masked_run.folder, device="cpu", overrides=OPEN)
    found = model(image, ["ring"], threshold=0.0)
    assert found.masks.shape == (len(found), found.height, found.width)
    assert model(image, ["ring"], threshold=1.0).masks.shape == (0, found.height, found.width)


def test_notebooks_show_tables(model, image, shapes_store):
    found = model(image, ["ring"], threshold=0.0)
    shown = found._repr_html_()
    assert shown.count("<tr>") == len(found) + 1
    assert f"{len(found)} objects" in shown
    store = ezsd.Store(shapes_store)
    rows = sum(len(store.regions[int(number)].box) for number in store.image_ids)
    assert f"<th>regions</th><td>{rows:,}</td>" in store._repr_html_()
    assert "ring" in repr(model.names)
    assert re.fullmatch(r"<ezsd model .*: 13 base names, \d+ in all>", repr(model))


def test_a_store_is_a_dataset(shapes_store):
    store = ezsd.Store(shapes_store)
    dataset = ezsd.RegionDataset(shapes_store)
    assert len(dataset) == len(store.image_ids)
    number = int(store.image_ids[3])
    item = dataset[3]
    assert int(item["image_id"]) == number
    assert item["size"].tolist() == store.sizes[3].tolist()
    assert np.array_equal(item["boxes"], store.regions[number].box)
    assert np.array_equal(item["embeddings"], store.regions[number].embedding.astype(np.float32))
    assert np.array_equal(item["ground_truth_labels"], store.ground_truth[number].class_index)
    assert dataset.names == store.text[0]
    some = ezsd.RegionDataset(store, image_ids=[number])
    (batch,) = DataLoader(some, batch_size=None, num_workers=1)
    assert torch.equal(batch["boxes"], item["boxes"])
    with pytest.MonkeyPatch.context() as patch:
        # Making one reads no rows.
        patch.setattr(type(store.regions), "__getitem__", None)
        assert len(ezsd.RegionDataset(store, image_ids=[number])) == 1
    with pytest.raises(ezsd.EzsdError, match="no image with id 999999"):
        ezsd.RegionDataset(store, image_ids=[999999])


def test_the_readmes_python_runs(shapes_run, shapes_store, shapes_root, capsys):
    (code,) = re.findall(r"```python\n(import ezsd.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for said, there in (
        ("demo/runs/distilled", shapes_run.folder),
        ("demo/data/shapes", shapes_root),
        ("demo/cache/shapes", shapes_store),
    ):
        assert said in code
        code = code.replace(said, str(there))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["dataset"]) == len(names["store"].image_ids)
    assert json.loads(json.dumps(names["regions"].box.tolist()))
