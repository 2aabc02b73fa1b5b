"""Label files of Pascal VOC and YOLO: boxes computed by hand, and one line for what is not as it must be."""

import pytest

from ezsd.data.pascal_voc import VOC_CLASSES, VOC_SPLITS, read_voc
from ezsd.data.yolo import read_yolo
from ezsd.errors import AnnotationError
from ezsd.vocabulary import COCO_SPLIT

DOG = """<annotation>
  <folder>VOC2007</folder><filename>000005.jpg</filename>
  <size><width>500</width><height>375</height><depth>3</depth></size>
  <object>
    <name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
    <bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>
  <object>
    <name>sofa</name><difficult>1</difficult>
    <bndbox><ymin>1</ymin><xmin>1</xmin><ymax>375</ymax><xmax>500</xmax></bndbox>
  </object>
</annotation>"""


@pytest.fixture
def file(tmp_path):
    def write(text, name="a.xml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_voc_counts_pixels_from_one_and_the_last_one_too(file):
    image = read_voc(file(DOG))
    assert (image.file_name, image.size) == ("000005.jpg", (500, 375))
    dog, sofa = image.objects
    assert (dog.name, dog.difficult, sofa.name, sofa.difficult) == ("dog", False, "sofa", True)
    # Columns 48 to 195 are 148, of which the first begins at 47; rows 240 to 371 are 132.
    assert dog.xywh("inclusive") == (47, 239, 148, 132)
    assert sofa.xywh("inclusive") == (0, 0, 500, 375)
    assert dog.xywh("edges") == (48, 240, 147, 131)


@pytest.mark.parametrize(
    "data",
    [
        DOG.encode("utf-8-sig"),
        DOG.encode("utf-16"),
        b'<?xml version="1.0" encoding="latin-1"?>' + DOG.replace("dog", "ch\xefen").encode("latin-1"),
        b'<?xml version="1.0" encoding="gbk"?>' + DOG.replace("dog", "\u72d7").encode("gbk"),
    ],
    ids=["byte order mark", "utf-16", "latin-1", "gbk"],
)
def test_the_encoding_is_the_one_that_the_file_states(file, data):
    assert read_voc(file(data)).objects[0].name in ("dog", "ch\xefen", "\u72d7")


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_file_need_not_know_the_size_of_its_image(file, size):
    start, _, rest = DOG.partition("<size>")
    assert read_voc(file(start + size + rest.partition("</size>")[2])).size is None


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]>'
WRONG_XML = {
    "number": (("<xmin>48", "<xmin>4x8"), r"object\[1\]/bndbox/xmin: expected a number of pixels, found '4x8'"),
    "absurd number": (("<xmax>195", "<xmax>1e300"), r"object\[1\]/bndbox/xmax: expected a number of pixels"),
    "infinity": (("<xmax>195", "<xmax>inf"), r"object\[1\]/bndbox/xmax: expected a number of pixels"),
    "corner": (("<ymax>375</ymax>", ""), r"object\[2\]/bndbox/ymax: expected a number of pixels, found nothing"),
    "name": (("sofa", " "), r"object\[2\]/name: expected the name of a class"),
    "line break": (("sofa", "so\nfa"), r"object\[2\]/name: expected the name of a class, found 'so\\nfa'"),
    "difficult": (("<difficult>1", "<difficult>hard"), r"object\[2\]/difficult: expected 0 or 1, found 'hard'"),
    "size": (("<width>500", "<width>-5"), r"size/width: expected a number of pixels, found '-5'"),
    "root": (("annotation>", "page>"), "expected an element <annotation>, found <page>"),
    "cut": (("</annotation>", ""), "expected XML, found something else"),
    "entities": (("<annotation>", f"{BOMB}<annotation>"), "expected XML without a document type, found a <!DOCTYPE"),
    "external entity": (
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>'),
        "expected XML without a document type",
    ),
    "encoding": (("<annotation>", '<?xml version="1.0" encoding="klingon"?><annotation>'), "expected text in klingon"),
}


@pytest.mark.parametrize("case", WRONG_XML)
def test_a_wrong_xml_is_refused_by_its_place(file, case):
    (old, new), message = WRONG_XML[case]
    assert old in DOG
    # The cure: as it was, it is read.
    path = file(DOG.replace(old, new))
    with pytest.raises(AnnotationError, match=message) as caught:
        read_voc(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert read_voc(file(DOG))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-7"])
def test_no_encoding_hides_a_document_type(file, encoding):
    declared = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding == "utf-7" else ""
    text = BOMB + DOG.replace("dog", "&c;")
    with pytest.raises(AnnotationError, match="without a document type"):
        read_voc(file(declared.encode() + text.encode(encoding)))


def test_what_is_too_large_or_not_there_is_refused(file, tmp_path, monkeypatch):
    monkeypatch.setattr("ezsd.data.label_file.MOST_BYTES", 100)
    with pytest.raises(AnnotationError, match="expected at most 100 bytes"):
        read_voc(file(DOG))
    with pytest.raises(AnnotationError, match="expected a label file, found none of this name"):
        read_yolo(tmp_path / "none.txt", 2)


def test_yolo_states_fractions_around_the_centre(file):
    first, second = read_yolo(file("1 0.5 0.4 0.25 0.2\n\n0.0 0.95 0.5 0.1 1\r\n", "a.txt"), 2)
    assert (first.line, first.class_index, second.line, second.class_index) == (1, 1, 3, 0)
    # 200 wide and 100 high: the centre is at (100, 40), the size 50 x 20.
    assert first.xywh(200, 100) == (75, 30, 50, 20)
    assert second.xywh(200, 100) == (180, 0, 20, 100)


WRONG_YOLO = {
    "0 0.5 0.5 0.1": "line 2: expected a box: class, centre x, centre y, width, height, found 4 values",
    "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2": "line 2: expected a box.*found 9 values",
    "dog 0.5 0.5 0.1 0.1": "line 2: expected five numbers, found 'dog 0.5",
    "3 0.5 0.5 0.1 0.1": "line 2: expected a class from 0 to 2, found 3",
    "1.5 0.5 0.5 0.1 0.1": "line 2: expected a class from 0 to 2, found 1.5",
    "nan 0.5 0.5 0.1 0.1": "line 2: expected a class from 0 to 2, found nan",
    "0 150 0.5 0.1 0.1": "line 2: expected fractions of the image's width and height, from 0 to 1, found 150",
    "0 0.5 nan 0.1 0.1": "line 2: expected fractions.*found nan",
    "0 0.5 0.5 -0.1 0.1": "line 2: expected fractions.*found -0.1",
}


@pytest.mark.parametrize("line", WRONG_YOLO)
def test_a_wrong_line_is_refused_by_its_number(file, line):
    path = file(f"0 0.5 0.5 0.1 0.1\n{line}\n", "a.txt")
    with pytest.raises(AnnotationError, match=WRONG_YOLO[line]) as caught:
        read_yolo(path, 3)
    assert str(caught.value).startswith(f"{path}: ")
    # The cure: without the line.
    assert len(read_yolo(file("0 0.5 0.5 0.1 0.1\n", "a.txt"), 3)) == 1


def test_a_label_file_that_is_not_text_is_refused(file):
    with pytest.raises(AnnotationError, match="expected text in UTF-8"):
        read_yolo(file(b"\xff\xd8\xff\xe0", "a.txt"), 3)


def test_the_splits_of_voc_share_out_its_classes_by_their_names_in_coco():
    names = set(VOC_CLASSES.values())
    assert {name: len(split.base) for name, split in VOC_SPLITS.items()} == {"voc-16-4": 16, "voc-15-5": 15}
    assert all(set(split.names) == names and len(split.names) == 20 for split in VOC_SPLITS.values())
    # All but two are in COCO's own split.
    assert names - set(COCO_SPLIT.names) == {"dining table", "potted plant"}
