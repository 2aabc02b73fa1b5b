"""The photo benchmark runs from photos to its table, at a size of seconds."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from ezsd.data.pascal_voc import VOC_SPLITS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLUGINS = Path(__file__).parents[1] / "plugins"
NOVEL = VOC_SPLITS["voc-16-4"].novel
QUICK = ("train.steps=2", "train.batch_size=2", "train.min_size=96", "train.max_size=128", "model.rpn_sizes=[24,48,96]")
QUICK_BUILD = (
    *("proposer.steps=2", "proposer.batch_size=2", "proposer.rpn_sizes=[24,48,96]", "proposer.min_size=96"),
    *("proposer.max_size=128", "proposer.max_proposals=8", "proposals.sizes=[300]"),
)


@pytest.fixture(scope="module")
def voc():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(PLUGINS)
        yield importlib.import_module("voc")


@pytest.fixture(scope="module")
def words(voc_photos, conse_tools, tmp_path_factory):
    """Command line. Two of four training photos are trained on; all show base and novel objects."""
    root, folder = tmp_path_factory.mktemp("voc"), tmp_path_factory.mktemp("work")
    for part, count in (("train", 4), ("val", 2)):
        document = json.loads((voc_photos / f"{part}.json").read_text())
        novel = {one["id"] for one in document["categories"] if one["name"] in NOVEL}
        shown = {True: set(), False: set()}
        for box in document["annotations"]:
            if not box["iscrowd"]:
                shown[box["category_id"] in novel].add(box["image_id"])
        with_both = sorted(shown[True] & shown[False])[:count]
        document["images"] = [image for image in document["images"] if image["id"] in with_both]
        document["annotations"] = [box for box in document["annotations"] if box["image_id"] in with_both]
        (root / part).mkdir()
        for image in document["images"]:
            shutil.copy(voc_photos / part / image["file_name"], root / part)
        (root / f"{part}.json").write_text(json.dumps(document))
    weights = conse_tools.parent / "data/conse/mobilenet_v2_fp16.safetensors"
    words = ["--work", folder / "work", "--results", folder / "results", "--data-root", root, "--photos", "2"]
    words += ["--teacher", "plugin:conse_plugin:factory", "--backbone", "plugin:conse_body:MobileNetV2"]
    words += ["--backbone-weights", weights, "--seeds", "0"]
    words += [word for setting in QUICK for word in ("--set", setting)]
    return [*map(str, words), *(word for setting in QUICK_BUILD for word in ("--build-set", setting))]


@pytest.fixture(scope="module")
def rows(voc, words):
    """Rows of all arms on the validation photos."""
    voc.main(words)
    return voc.driver.read("voc", Path(words[3]))


def test_each_arm_has_a_row_of_base_and_novel_figures(voc, rows):
    assert [row["arm"] for row in rows] == list(voc.ARMS)
    for row in rows:
        assert row["AP50"].keys() == {"base", "novel", "all"}
        assert None not in row["AP50"].values()


def test_a_row_names_its_store_by_all_of_its_bytes(voc, words, rows):
    digests = {name: voc.Store(Path(words[1], "voc-16-4-2/stores", name)).digest for name in voc.STORES}
    assert len(set(digests.values())) == len(voc.STORES)
    assert {row["arm"]: row["store"] for row in rows} == {arm.name: digests[arm.store] for arm in voc.ARMS.values()}


def test_regions_are_judged_by_the_novel_objects_of_the_training_photos(rows, words):
    document = json.loads(Path(words[5], "train.json").read_text())
    novel = {one["id"] for one in document["categories"] if one["name"] in NOVEL}
    seen = sorted(image["id"] for image in document["images"])[:2]
    boxes = [box for box in document["annotations"] if box["image_id"] in seen]
    objects = [box for box in boxes if box["category_id"] in novel and not box["iscrowd"]]
    assert {row["regions"]["novel_objects"] for row in rows} == {len(objects)}


def test_rows_that_are_there_are_not_made_again(voc, words, rows, monkeypatch):
    monkeypatch.setattr(voc, "measure", lambda *_: pytest.fail("measured again"))
    voc.main([*words, "--arms", "ours"])


def test_settings_are_chosen_without_a_novel_box_on_photos_that_nothing_was_trained_on(voc, words, rows, capsys):
    voc.main([*words, "--arms", "ours", "--dev"])
    row = voc.driver.read("voc", Path(words[3]))[-1]
    assert (row["part"], row["AP50"]["novel"], row["regions"]) == ("dev", None, None)
    dev = json.loads(Path(words[1], "voc-16-4-2/dev.json").read_text())
    train = json.loads(Path(words[5], "train.json").read_text())
    assert [image["id"] for image in dev["images"]] == sorted(image["id"] for image in train["images"])[-2:]
    novel = {one["id"] for one in dev["categories"] if one["name"] in NOVEL}
    assert not [box for box in dev["annotations"] if box["category_id"] in novel]
    with pytest.raises(SystemExit, match="--photos 4: --dev needs photos beside them"):
        voc.main([*words, "--arms", "ours", "--dev", "--photos", "4"])
    # Rows of other photos and other settings are other tables.
    capsys.readouterr()
    voc.main([*words, "--dev", "--table"])
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["| ours", "1"]]


def test_the_table_has_a_line_for_each_arm(voc, words, rows, capsys):
    voc.main([*words, "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {arm}" for arm in voc.ARMS]


def test_what_is_missing_is_named(voc, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        voc.main(["--work", "nowhere"])
    assert "--teacher is needed" in capsys.readouterr().err
