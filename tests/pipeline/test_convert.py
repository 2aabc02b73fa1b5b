"""Folders of Pascal-VOC and YOLO labels become COCO-format folders that the other commands take, or nothing at all."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from ezsd.errors import EzsdError
from ezsd.pipeline.console.data_messages import conversion_lines
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.convert import convert_folder
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.voc import convert_voc

SIZE = (100, 80)


def image(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path, **options)


def xml(path, *objects, size=SIZE, filename=""):
    """A file with objects of (name, xmin, ymin, xmax, ymax) and perhaps a 1 for a difficult one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ""
    for name, *corners in objects:
        marks = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
        box = "".join(f"<{mark}>{value}</{mark}>" for mark, value in marks)
        difficult = "".join(f"<difficult>{one}</difficult>" for one in corners[4:])
        text += f"<object><name>{name}</name>{difficult}<bndbox>{box}</bndbox></object>"
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(f"<annotation><filename>{filename}</filename>{shape}{text}</annotation>")


def text(path, words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)


def document(out, part):
    return json.loads((out / f"{part}.json").read_text())


def boxes(out, part="train"):
    """File name, class and box of each annotation."""
    found = document(out, part)
    names = {one["id"]: one["name"] for one in found["categories"]}
    files = {one["id"]: one["file_name"] for one in found["images"]}
    return [(files[one["image_id"]], names[one["category_id"]], *one["bbox"]) for one in found["annotations"]]


def refused(call, words):
    """One line, and nothing beside what was there."""
    with pytest.raises(EzsdError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    return as_options(str(caught.value))


# Pascal VOC itself


def devkit(root, year="2007", sets=None):
    sets = sets or {"trainval": ["000005", "000009"], "test": ["000001"]}
    folder = root / f"VOCdevkit/VOC{year}"
    for name, stems in sets.items():
        text(folder / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            image(folder / f"JPEGImages/{stem}.jpg")
            xml(folder / f"Annotations/{stem}.xml", ("cat", 48, 24, 95, 37, 0), ("sofa", 1, 1, 100, 80, 1))
    return folder.parent


def test_voc_becomes_what_its_two_splits_read(tmp_path):
    made = convert_voc(devkit(tmp_path), "2007", tmp_path / "voc")
    assert [tuple(part) for part in made.parts] == [("train", 2, 2, 2), ("val", 1, 1, 1)]
    found = document(tmp_path / "voc", "train")
    assert found["images"] == [
        {"id": number, "file_name": f"{number:06d}.jpg", "width": 100, "height": 80} for number in (5, 9)
    ]
    assert [one["name"] for one in found["categories"]][-3:] == ["couch", "train", "tv"]
    first, second = found["annotations"][:2]
    # Columns 48 to 95 are 48, rows 24 to 37 are 14.
    assert (first["bbox"], first["area"], first["iscrowd"]) == ([47, 23, 48, 14], 672, 0)
    assert (second["bbox"], second["iscrowd"], second["category_id"]) == ([0, 0, 100, 80], 1, 18)
    for name in ("voc-16-4", "voc-15-5"):
        check = check_dataset(find_dataset(name, tmp_path / "voc"))
        assert check.problems == []
        assert [(part.images, part.base + part.novel, part.crowd) for part in check.parts] == [(2, 2, 2), (1, 1, 1)]
        # The file beside the data is the same dataset.
        assert find_dataset(str(tmp_path / f"voc/{name}.toml")) == find_dataset(name, tmp_path / "voc")


@pytest.mark.parametrize(
    ("year", "sets", "parts"),
    [
        ("2007", {"trainval": ["000005"], "train": ["000007"], "val": ["000009"]}, ("train", "val")),
        ("2012", {"trainval": ["2008_000001"], "train": ["2008_000002"], "val": ["2008_000003"]}, ("train", "val")),
    ],
)
def test_without_test_images_train_and_val_are_the_parts(year, sets, parts, tmp_path):
    root = devkit(tmp_path, year, sets)
    made = convert_voc(root / f"VOC{year}", year, tmp_path / "voc")
    assert made.sources == [f"{part}: {root}/VOC{year}/ImageSets/Main/{part}.txt" for part in parts]
    ids = [document(tmp_path / "voc", part)["images"][0]["id"] for part in parts]
    assert ids == [int(sets[part][0].replace("_", "")) for part in parts]


def test_images_are_linked_to_or_copied(tmp_path):
    root = devkit(tmp_path)
    convert_voc(root, "2007", tmp_path / "linked")
    assert (tmp_path / "linked/train").readlink() == (root / "VOC2007/JPEGImages").resolve()
    convert_voc(root, "2007", tmp_path / "copied", copy=True)
    assert sorted(path.name for path in (tmp_path / "copied/train").iterdir()) == ["000005.jpg", "000009.jpg"]
    shutil.rmtree(root)
    assert find_dataset("voc-16-4", tmp_path / "copied").missing() == []
    assert find_dataset("voc-16-4", tmp_path / "linked").missing() != []


LIST = "ImageSets/Main/trainval.txt"
WRONG_VOC = {
    "no image": (lambda f: (f / "JPEGImages/000009.jpg").unlink(), "000009.jpg: no such image"),
    "no labels": (
        lambda f: (f / "Annotations/000009.xml").unlink(),
        "000009.xml: the file: expected a label file.* Add it, or",
    ),
    "unknown class": (
        lambda f: xml(f / "Annotations/000009.xml", ("dogg", 1, 1, 2, 2)),
        r"000009.xml: object\[1\]/name: expected one of the 20 classes of VOC, found 'dogg'. did you mean 'dog'\?",
    ),
    "other size": (
        lambda f: image(f / "JPEGImages/000009.jpg", (50, 40)),
        "000009.jpg: the annotations say 100 x 80 pixels, the file has 50 x 40",
    ),
    "image in both": (
        lambda f: text(f / "ImageSets/Main/test.txt", "000009\n"),
        r"test.txt: '000009' is in trainval.txt too \(1 image is in both\)",
    ),
    "image twice": (lambda f: text(f / LIST, "000009\n000009\n"), "line 2: '000009' stands in line 1 too"),
    "path in a list": (lambda f: text(f / LIST, "000005\n../x\n"), "line 2: expected the name of an image"),
    "other names": (lambda f: text(f / LIST, "000005 -1\n"), "expected names such as 000005 or 2008_000032"),
    "empty list": (lambda f: text(f / LIST, "\n"), "trainval.txt: names no image"),
    "no lists": (
        lambda f: shutil.rmtree(f / "ImageSets"),
        "expected the lists trainval.txt and test.txt or train.txt and val.txt",
    ),
    "other edition": (lambda f: f.rename(f.with_name("VOC2012")), "with a folder VOC2007 in it, found VOC2012"),
}


def test_a_folder_without_an_edition_is_said_to_be_there_or_not(tmp_path):
    refused(lambda: convert_voc(tmp_path, "2007", tmp_path / "voc"), "in it, found no edition of VOC")
    refused(lambda: convert_voc(tmp_path / "in", "2007", tmp_path / "voc"), "in it, found no such folder")


@pytest.mark.parametrize("case", WRONG_VOC)
def test_a_wrong_devkit_is_refused_by_its_place_and_leaves_nothing(case, tmp_path):
    root = devkit(tmp_path / "in")
    change, words = WRONG_VOC[case]
    change(root / "VOC2007")
    refused(lambda: convert_voc(root, "2007", tmp_path / "out/voc"), words)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_of_many_wrong_files_the_first_is_named_and_the_others_are_counted(tmp_path):
    root = devkit(tmp_path)
    for stem in ("000001", "000005", "000009"):
        xml(root / f"VOC2007/Annotations/{stem}.xml", ("cow", 1, 1, "x", 2))
    said = refused(lambda: convert_voc(root, "2007", tmp_path / "voc"), "000005.xml")
    assert "(2 more files are refused: " in said
    assert "000009.xml, ...)" in said
    xml(root / "VOC2007/Annotations/000001.xml", ("cow", 1, 1, 2, 2))
    assert "(1 more file is refused: " in refused(lambda: convert_voc(root, "2007", tmp_path / "voc"), "000005.xml")


def test_a_folder_above_the_labels_leads_to_the_one_that_was_meant(tmp_path):
    root = devkit(tmp_path)
    words = rf"no .xml file in it has an image of its name in .*; did you mean {root}/VOC2007\?$"
    refused(lambda: convert_folder(root, tmp_path / "farm"), words)
    labels = root / "VOC2007/Annotations"
    refused(lambda: convert_folder(labels, tmp_path / "farm"), "; give the folder that images and labels are both in$")
    assert not (tmp_path / "farm").exists()
    convert_folder(root / "VOC2007", tmp_path / "farm")


def test_a_label_file_that_is_not_there_is_added_or_taken_from_the_list(tmp_path):
    root = devkit(tmp_path)
    path, listed = root / "VOC2007/Annotations/000009.xml", root / f"VOC2007/{LIST}"
    kept = path.read_text()
    path.unlink()
    for number, cure in enumerate((lambda: text(listed, "000005\n"), lambda: text(path, kept))):
        text(listed, "000005\n000009\n")
        refused(lambda out=number: convert_voc(root, "2007", tmp_path / str(out)), "none of this name. Add it, or take")
        cure()
        convert_voc(root, "2007", tmp_path / str(number))


def test_sides_swapped_in_a_file_are_those_of_the_image(tmp_path):
    root = devkit(tmp_path)
    xml(root / "VOC2007/Annotations/000009.xml", ("cat", 1, 1, 2, 2), size=SIZE[::-1])
    made = convert_voc(root, "2007", tmp_path / "voc")
    assert (made.oddities[0].partition(":")[0], made.oddities[0].rpartition("/")[2]) == (
        "label files that swap width and height, which the image decides",
        "000009.xml",
    )
    assert check_dataset(find_dataset("voc-16-4", tmp_path / "voc")).problems == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    root = devkit(tmp_path)
    out = tmp_path / "voc"
    text(out / "thesis.tex", "words")
    said = refused(lambda: convert_voc(root, "2007", out), "is not empty; choose a new folder, or empty it")
    assert f"--out {out}" in said
    convert_voc(root, "2007", tmp_path / "new")
    (out / "thesis.tex").unlink()
    convert_voc(root, "2007", out)


def test_a_place_where_no_folder_can_be_is_refused(tmp_path, monkeypatch):
    root = devkit(tmp_path)
    text(tmp_path / "file", "words")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for out, words in (
        (Path(), "is the folder you are in"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "nowhere", "is a link"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/x", f"{tmp_path}/file is a file"),
    ):
        said = refused(partial(convert_voc, root, "2007", out), "; choose another place")
        assert said == f"--out {out}: {words}; choose another place"
    convert_voc(root, "2007", tmp_path / "other")


def test_what_is_written_is_no_input_of_the_next_conversion(tmp_path):
    root = tmp_path / "in"
    in_one_folder(root, label_xml)
    refused(lambda: convert_folder(root, root / "farm"), "is below .*in, which is read; choose a folder outside of it")
    convert_folder(root, tmp_path / "farm")


# Folders of one's own


def in_one_folder(root, label):
    for stem in ("b", "a"):
        image(root / f"{stem}.jpg")
        label(root, stem)


def beside_each_other(root, label, places=("JPEGImages", "Annotations")):
    for stem in ("b", "a"):
        image(root / places[0] / f"deep/{stem}.JPG")
        label(root / places[1] / "deep", stem)


def parts_within(root, label):
    """As ultralytics lays data out."""
    for part, stem in (("train2017", "b"), ("train2017", "a"), ("val2017", "c")):
        image(root / f"images/{part}/{stem}.png")
        label(root / f"labels/{part}", stem)


def parts_around(root, label):
    """As Roboflow exports data."""
    for part, stem in (("train", "b"), ("train", "a"), ("valid", "c"), ("test", "d")):
        image(root / f"{part}/images/{stem}.png")
        label(root / f"{part}/labels", stem)


def listed(root, label):
    for stem in ("a", "b", "c"):
        image(root / f"JPEGImages/{stem}.jpg")
        label(root / "Annotations", stem)
    text(root / "ImageSets/Main/train.txt", "b\na\n")
    text(root / "ImageSets/Main/val.txt", "c\n")


def label_xml(folder, stem):
    xml(folder / f"{stem}.xml", ("goat", 11, 21, 20, 40))


def label_text(folder, stem):
    text(folder / f"{stem}.txt", "1 0.15 0.375 0.1 0.25\n")


@pytest.mark.parametrize("label", [label_xml, label_text])
@pytest.mark.parametrize("layout", [in_one_folder, beside_each_other, parts_within, parts_around, listed])
def test_layouts_of_images_and_labels_are_found(layout, label, tmp_path):
    root = tmp_path / "in"
    layout(root, label)
    text(root / "data.yaml", "path: ../somewhere\ntrain: no/where\nnames: {0: cow, 1: goat}\n")
    made = convert_folder(root, tmp_path / "farm")
    parts = LAYOUT_PARTS[layout]
    assert [part.name for part in made.parts] == parts
    assert [line for line in made.oddities if "left out" in line] == []
    assert [one[1:] for part in parts for one in boxes(tmp_path / "farm", part)] == [
        ("goat", 10, 20, 10, 20) for part in made.parts for _ in range(part.images)
    ]
    names = [one["file_name"] for one in document(tmp_path / "farm", "train")["images"]]
    assert len(names) == 2
    assert names == sorted(names)
    ids = [one["id"] for part in parts for one in document(tmp_path / "farm", part)["images"]]
    assert ids == list(range(1, len(ids) + 1))
    dataset = find_dataset(str(tmp_path / "farm/farm.toml"))
    assert dataset.parts == (("train",) if len(parts) == 1 else ("train", "val"))
    assert check_dataset(dataset).problems == []


def test_folders_of_parts_are_found_in_upper_case_and_what_is_beside_them_is_counted(tmp_path):
    root = tmp_path / "in"
    for part, stem in (("Train", "a"), ("Val", "b"), ("Extra", "c")):
        image(root / f"images/{part}/{stem}.png")
        label_text(root / f"labels/{part.lower()}", stem)
    image(root / "images/loose.png")
    text(root / "classes.txt", "cow\ngoat\n")
    made = convert_folder(root, tmp_path / "farm")
    assert [tuple(part) for part in made.parts] == [("train", 1, 1, 0), ("val", 1, 1, 0)]
    left = "images outside of the folders of the parts, left out: 2, the first"
    assert made.oddities == [
        f"{left} {root}/images/Extra/c.png",
        "base classes without a training box: 1, the first 'cow'",
    ]


def test_of_two_folders_of_labels_the_one_of_the_format_is_read(tmp_path):
    root = tmp_path / "in"
    image(root / "images/a.jpg")
    text(root / "annotations/instances.json", "{}")
    label_xml(root / "Annotations", "a")
    text(root / "labels/classes.txt", "cow\ngoat\n")
    convert_folder(root, tmp_path / "alone")
    text(root / "labels/a.txt", "0 0.5 0.5 0.1 0.1\n")
    refused(
        lambda: convert_folder(root, tmp_path / "farm"),
        "labels and Annotations both have label files; say which kind to read: `format=voc` or yolo",
    )
    for form, name in (("voc", "goat"), ("yolo", "cow")):
        convert_folder(root, tmp_path / form, format=form)
        assert [one[:2] for one in boxes(tmp_path / form)] == [("a.jpg", name)]
    label_xml(root / "labels", "a")
    refused(lambda: convert_folder(root, tmp_path / "farm", format="voc"), "both have label files, expected one folder")


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    root = devkit(tmp_path)
    text(root / f"VOC2007/{LIST}", "\ufeff000005\n")
    assert convert_voc(root, "2007", tmp_path / "voc").parts[0].images == 1


LAYOUT_PARTS = {
    in_one_folder: ["train"],
    beside_each_other: ["train"],
    parts_within: ["train", "val"],
    parts_around: ["train", "val", "test"],
    listed: ["train", "val"],
}


def test_classes_of_xml_are_those_that_are_found_and_novel_ones_are_chosen(tmp_path, caplog):
    root = tmp_path / "in"
    for stem, name in (("a", "goat"), ("b", "cow"), ("c", "aeroplane")):
        image(root / f"{stem}.png")
        xml(root / f"{stem}.xml", (name, 1, 1, 9, 9))
    made = convert_folder(root, tmp_path / "farm", novel=["goat", "unicorn"])
    (split,) = made.splits.values()
    assert (split.base, split.novel) == (("aeroplane", "cow"), ("goat", "unicorn"))
    (line,) = caplog.messages
    assert line.startswith(f"{root}: no entry in categories named 'unicorn': without ground truth")
    assert find_dataset(str(tmp_path / "farm/farm.toml")).split == split
    lines = conversion_lines(convert_folder(root, tmp_path / "my farm"))
    assert lines[-1] == f"next: ezsd data check --dataset '{tmp_path}/my farm/my-farm.toml'"
    lines = conversion_lines(convert_folder(root, tmp_path / "all"))
    assert "no class is novel yet" in lines[-2]
    toml = tmp_path / "all/all.toml"
    assert lines[-1] == f"next: ezsd data check --dataset {toml}"
    text(toml, toml.read_text().replace(', "goat"]', "]").replace("novel = []", 'novel = ["goat"]'))
    assert find_dataset(str(toml)).split.novel == ("goat",)


def test_a_misspelt_novel_class_is_named(tmp_path, caplog):
    root = tmp_path / "in"
    in_one_folder(root, label_text)
    text(root / "classes.txt", "cow\ngoat\n")
    refused(
        lambda: convert_folder(root, tmp_path / "farm", novel=["Goat"]),
        "in: has no class 'Goat', but 'goat'; spell the novel name as it does",
    )
    assert not (tmp_path / "farm").exists()
    assert caplog.messages == []
    convert_folder(root, tmp_path / "near", novel=["goats"])
    assert caplog.messages[0].startswith(f"{root}: no entry in categories named 'goats' (did you mean 'goat'?)")
    text(root / "a.txt", "0 0.15 0.375 0.1 0.25\n")
    convert_folder(root, tmp_path / "farm", novel=["goat"])
    assert len(caplog.messages) == 1


def test_an_xml_without_a_namesake_names_its_image(tmp_path):
    root = tmp_path / "in"
    image(root / "images/photo 1.jpg")
    image(root / "images/b.jpg")
    xml(root / "annotations/label1.xml", ("goat", 1, 1, 9, 9), filename="C:\\data\\photo 1.jpg")
    xml(root / "annotations/b.xml", ("goat", 1, 1, 9, 9), filename="photo 1.jpg")
    convert_folder(root, tmp_path / "farm")
    assert sorted(one[0] for one in boxes(tmp_path / "farm")) == ["b.jpg", "photo 1.jpg"]
    xml(root / "annotations/label2.xml", ("goat", 1, 1, 9, 9), filename="photo 1.jpg")
    refused(lambda: convert_folder(root, tmp_path / "again"), "its image photo 1.jpg is that of .*; remove one of them")
    xml(root / "annotations/label2.xml", ("goat", 1, 1, 9, 9), filename=f"{'x' * 300}.jpg")
    refused(
        lambda: convert_folder(root, tmp_path / "again"), r"label2.xml: filename: expected .*, found 'x.* \(File name"
    )
    (root / "annotations/label2.xml").unlink()
    convert_folder(root, tmp_path / "again")


def test_oddities_are_left_out_or_kept_and_counted(tmp_path):
    root = tmp_path / "in"
    for stem in ("a", "b", "lone"):
        image(root / f"{stem}.png")
    xml(root / "a.xml", ("cow", 20, 1, 10, 9), ("cow", 1, 1, 9, 9), ("cow", 101, 1, 120, 9), ("cow", 20, 1, 9, 9))
    xml(root / "b.xml", ("cow", 90, 1, 120, 9), ("cow", 0, 0, 9, 9), ("goat", 1, 1, 9, 9, 1))
    xml(root / "orphan.xml", ("cow", 1, 1, 9, 9))
    made = convert_folder(root, tmp_path / "farm")
    assert [one[1:] for one in boxes(tmp_path / "farm")] == [
        ("cow", 0, 0, 9, 9),
        ("cow", 89, 0, 31, 9),
        ("cow", -1, -1, 10, 10),
        ("goat", 0, 0, 9, 9),
    ]
    kinds = {line.partition(":")[0]: line for line in made.oddities}
    assert f"boxes without an area, left out: 2, the first {root}/a.xml: object[1]" in made.oddities
    assert f"boxes outside their image, left out: 1, the first {root}/a.xml: object[3]" in made.oddities
    assert kinds["boxes that reach beyond their image, which will clip them"].endswith(
        f"2, the first {root}/b.xml: object[1]"
    )
    assert kinds["label files without an image, left out"].endswith(f"1, the first {root}/orphan.xml")
    assert kinds["images without a label file, left out"].endswith(f"1, the first {root}/lone.png")
    assert "base classes without a training box: 1, the first 'goat'" in made.oddities


def test_corners_at_zero_are_said_to_be_distances(tmp_path):
    root = tmp_path / "in"
    image(root / "a.png")
    xml(root / "a.xml", ("cow", 0, 10, 50, 80))
    lines = conversion_lines(convert_folder(root, tmp_path / "one"))
    assert "if your tool wrote distances from the edges, take --corners edges: 1, the first" in lines[0]
    assert boxes(tmp_path / "one") == [("a.png", "cow", -1, 9, 51, 71)]
    assert convert_folder(root, tmp_path / "two", corners="edges").oddities == []
    assert boxes(tmp_path / "two") == [("a.png", "cow", 0, 10, 50, 70)]


def test_corners_of_voc_have_one_meaning(tmp_path):
    root = devkit(tmp_path)
    xml(root / "VOC2007/Annotations/000009.xml", ("cat", 0, 1, 20, 20))
    lines = conversion_lines(convert_voc(root, "2007", tmp_path / "voc"))
    assert lines[0].startswith("warning: corners below 1, where VOC counts pixels from 1: 1, the first ")


def test_an_image_that_is_turned_by_exif_alone_is_counted(tmp_path):
    root = tmp_path / "in"
    turned = Image.Exif()
    turned[0x0112] = 6
    image(root / "a.jpg", (80, 40), exif=turned)
    xml(root / "a.xml", ("cow", 1, 1, 9, 9), size=None)
    (line,) = convert_folder(root, tmp_path / "one").oddities
    assert line.startswith("images turned by EXIF whose label files have no size")
    xml(root / "a.xml", ("cow", 1, 1, 9, 9), size=(40, 80))
    assert convert_folder(root, tmp_path / "two").oddities == []


def test_yolo_boxes_are_those_of_the_image_as_it_is_shown(tmp_path):
    root = tmp_path / "in"
    turned = Image.Exif()
    turned[0x0112] = 6
    image(root / "images/a.jpg", (80, 40), exif=turned)
    image(root / "images/empty.jpg")
    image(root / "images/none.jpg")
    text(root / "labels/a.txt", "0 0.5 0.5 0.5 0.25\n")
    image(root / "images/b.jpg")
    text(root / "labels/b.txt", "0 0.5 0.5 0.5 0.25\n")
    text(root / "labels/empty.txt", "")
    text(root / "labels/classes.txt", "cow\ngoat\n")
    made = convert_folder(root, tmp_path / "farm")
    # Shown, the image is 40 wide and 80 high.
    assert boxes(tmp_path / "farm") == [("a.jpg", "cow", 10, 30, 20, 20), ("b.jpg", "cow", 25, 30, 50, 20)]
    assert [one["width"] for one in document(tmp_path / "farm", "train")["images"]] == [40, 100, 100, 100]
    assert any(line.startswith("images without a label file, taken as background: 1,") for line in made.oddities)
    assert check_dataset(find_dataset(str(tmp_path / "farm/farm.toml"))).problems == []


NAMES = {
    "names: [cow, goat]": ("cow", "goat"),
    "names: {0: cow, 1: goat}\nnc: 2": ("cow", "goat"),
    "names: ['yes', \"no\"]": ("yes", "no"),
    "names: [yes, no]": r"data.yaml: names\[0\]: expected a text, found True. Write it in quotes",
    "names: {1: cow, 2: goat}": "names: expected a list of names, or a table of them numbered from 0",
    "names: [cow, goat]\nnc: 3": "nc: expected 2, the number of names, found 3",
    "names: [cow, cow]": "names: expected different names, found others .*'cow' occurs twice",
    "names: []": "names: expected class names, found none",
    "classes: [cow]": "names: expected a list of names",
    "names: {1: goat, 0: cow}": ("cow", "goat"),
    "names: [cow, goat]\ndate: 2024-13-45": "data.yaml: the file: expected YAML, found something else .month must be",
    "names: [cow": "data.yaml: the file: expected YAML, found something else",
    "names: !!python/object/apply:os.system ['touch hacked']": "expected YAML, found something else",
}


@pytest.mark.parametrize("yaml", NAMES)
def test_names_of_yolo_are_read_from_data_yaml(yaml, tmp_path):
    root = tmp_path / "in"
    in_one_folder(root, label_text)
    text(root / "data.yaml", yaml)
    if isinstance(NAMES[yaml], tuple):
        (split,) = convert_folder(root, tmp_path / "farm").splits.values()
        assert split.base == NAMES[yaml]
    else:
        refused(lambda: convert_folder(root, tmp_path / "farm"), NAMES[yaml])
        # The cure: names in the order of their numbers, in quotes.
        text(root / "data.yaml", "names: ['cow', 'goat']")
        convert_folder(root, tmp_path / "farm")


def test_names_of_yolo_may_stand_in_a_text_file(tmp_path):
    root = tmp_path / "in"
    in_one_folder(root, label_text)
    said = refused(lambda: convert_folder(root, tmp_path / "farm"), "no class names: expected one of data.yaml")
    assert said.endswith("give --names FILE")
    for words, wrong in (("cow\n\ngoat\n", "is empty"), (b"c\xf6w\n", "expected text in UTF-8")):
        (tmp_path / "names.txt").write_bytes(words if isinstance(words, bytes) else words.encode())
        refused(lambda: convert_folder(root, tmp_path / "farm", names=tmp_path / "names.txt"), wrong)
    text(tmp_path / "names.txt", "cow\ngoat\n")
    convert_folder(root, tmp_path / "farm", names=tmp_path / "names.txt")
    assert boxes(tmp_path / "farm")[0][1] == "goat"
    text(tmp_path / "names.txt", "cow\n")
    refused(
        lambda: convert_folder(root, tmp_path / "new", names=tmp_path / "names.txt"), "a class from 0 to 0, found 1"
    )
    text(tmp_path / "names.txt", "cow\ngoat\npig\n")
    convert_folder(root, tmp_path / "new", names=tmp_path / "names.txt")


def outside(root):
    (root / "b.jpg").rename(root.with_name("b.jpg"))
    (root / "b.jpg").symlink_to(root.with_name("b.jpg"))


def only_val(root):
    shutil.rmtree(root)
    image(root / "val/a.jpg")
    label_text(root / "val", "a")


def train_twice(root):
    for part in ("train", "train2017"):
        image(root / f"images/{part}/a.jpg")


WRONG_FOLDERS = {
    "no folder": (shutil.rmtree, "in: no such folder", None),
    "no labels": (lambda r: [one.unlink() for one in r.glob("*.txt")], "no label file: expected .xml, or .txt", None),
    "both kinds": (
        lambda r: label_xml(r, "a"),
        "labels of both kinds, .xml and .txt; say which to read: --format voc or yolo",
        {"format": "voc"},
    ),
    "two endings": (lambda r: image(r / "a.png"), "a.jpg and a.png differ in their ending alone; rename one", None),
    "a link": (outside, "b.jpg: is a link to an image outside of its folder; take --copy", {"copy": True}),
    "no image": (lambda r: text(r / "a.jpg", "words"), "a.jpg: is not an image", None),
    "no boxes": (lambda r: [text(r / f"{s}.txt", "") for s in "ab"], "2 images with labels, and not one box", None),
    "no base boxes": (
        lambda r: None,
        "2 images with labels, and not one box of a base class in them to train on",
        {},
        {"novel": ["goat"]},
    ),
    "no XML": (
        lambda r: None,
        "no .xml file in it has an image of its name in",
        {"format": "yolo"},
        {"format": "voc"},
    ),
    "only val": (only_val, "has a folder val, expected one named train beside it", None),
    "train twice": (train_twice, "has train and train2017, expected one folder for train", None),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_and_leaves_nothing(case, tmp_path):
    root = tmp_path / "in"
    in_one_folder(root, label_text)
    text(root / "classes.txt", "cow\ngoat\n")
    change, words, cure, *options = WRONG_FOLDERS[case]
    change(root)
    with pytest.raises(EzsdError) as caught:
        convert_folder(root, tmp_path / "farm", **(options[0] if options else {}))
    assert words in as_options(str(caught.value))
    assert not any(path.name.startswith((".farm", "farm")) for path in tmp_path.iterdir())
    if cure:
        convert_folder(root, tmp_path / "farm", **cure)
    if case == "two endings":
        (root / "a.png").rename(root / "c.png")
        convert_folder(root, tmp_path / "farm")


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path):
    text(tmp_path / ".voc.partial/train.json", "half")
    convert_voc(devkit(tmp_path), "2007", tmp_path / "voc")
    assert not (tmp_path / ".voc.partial").exists()
    assert "half" not in (tmp_path / "voc/train.json").read_text()


# VOC 2007's own photos


def test_the_photos_of_voc_are_read_by_both_splits(voc_photos):
    counts = {}
    for name in ("voc-16-4", "voc-15-5"):
        dataset = find_dataset(name, voc_photos)
        assert dataset.preset == "photos"
        assert find_dataset(str(voc_photos / f"{name}.toml")) == dataset
        assert dataset.missing() == []
        counts[name] = [_counts(dataset, part) for part in dataset.parts]
    assert counts["voc-16-4"] == [(3506, 8833 - 1597, 1597, 2202), (1502, 3768 - 706, 706, 852)]
    assert counts["voc-15-5"] == [(3506, 8833 - 1095, 1095, 2202), (1502, 3768 - 466, 466, 852)]


def _counts(dataset, part):
    from ezsd.data.annotations import read_raw

    raw = read_raw(dataset.annotations(part), dataset.split.names)
    base = raw.class_index < len(dataset.split.base)
    single = ~raw.crowd
    return len(raw.images), int((base & single).sum()), int((~base & single).sum()), int(raw.crowd.sum())


def test_voc_written_as_xml_comes_back_as_it_was(voc_photos, tmp_path):
    known = json.loads((voc_photos / "val.json").read_text())
    wanted = {one["id"]: one for one in known["images"][:40]}
    names = {one["id"]: one["name"] for one in known["categories"]}
    voc = {"airplane": "aeroplane", "couch": "sofa", "dining table": "diningtable", "motorcycle": "motorbike"}
    voc |= {"potted plant": "pottedplant", "tv": "tvmonitor"}
    kept = [one for one in known["annotations"] if one["image_id"] in wanted]
    folder = tmp_path / "VOC2007"
    for number, entry in wanted.items():
        objects = []
        for one in kept:
            x, y, w, h = one["bbox"]
            if one["image_id"] == number:
                name = names[one["category_id"]]
                objects.append((voc.get(name, name), x + 1, y + 1, x + w, y + h, one["iscrowd"]))
        xml(folder / f"Annotations/{number:06d}.xml", *objects, size=(entry["width"], entry["height"]))
    stems = [f"{number:06d}\n" for number in wanted]
    text(folder / "ImageSets/Main/train.txt", "".join(stems[:20]))
    text(folder / "ImageSets/Main/val.txt", "".join(stems[20:]))
    (folder / "JPEGImages").symlink_to(voc_photos / "val")
    convert_voc(folder, "2007", tmp_path / "voc")
    found = [document(tmp_path / "voc", part) for part in ("train", "val")]
    assert [one for part in found for one in part["images"]] == list(wanted.values())
    assert found[0]["categories"] == known["categories"]
    seen = [one for part in found for one in part["annotations"]]
    for one, other in zip(seen, kept, strict=True):
        assert {**one, "id": 0, "bbox": pytest.approx(one["bbox"], abs=1e-3), "area": 0} == {
            **other,
            "id": 0,
            "area": 0,
        }
