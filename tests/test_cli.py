"""The command line as a user meets it: in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ezsd.cache.format.sealed_json import seal
from tests.commandkit import ezsd

ROOT = Path(__file__).resolve().parent.parent


def assert_one_clear_line(result, *words):
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    if lines[0].startswith("Usage"):
        # Typer's own refusals: usage, then what is wrong.
        lines = [line for line in lines if "Usage" not in line]
    else:
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("ezsd: ")
    for word in words:
        assert word in " ".join(lines), result.stderr


def test_help_loads_neither_torch_nor_zarr():
    code = (
        "import sys, ezsd.cli as c; c.app(['-h'], standalone_mode=False); print(sorted(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Train an object detector" in result.stdout
    for heavy in ("torch", "zarr", "numpy", "open_clip", "matplotlib", "dask"):
        assert f"'{heavy}'" not in result.stderr


@pytest.mark.parametrize("command", ["detect", "eval"])
def test_a_search_without_competitors_is_offered(command):
    assert "--alone" in ezsd(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache", "build", "--dataset", "coco", "--data-root", "nowhere"], ["nowhere", "instances_train2017.json"]),
        (["cache", "build", "--dataset", "cocoa"], ["cocoa", "shapes"]),
        (["audit", "nowhere"], ["nowhere: no such folder; give that of a run or a store"]),
        (["audit", "docs", "--cache", "b"], ["--cache b: goes with a run"]),
        (["cache", "build", "--dataset", "a.json"], ["--dataset a.json", "give --novel NAMES"]),
        (["cache", "build", "--dataset", "a.json", "--novel", "cat"], ["--dataset a.json", "no such file"]),
        (["cache", "build", "--dataset", "voc-16-4"], ["--data-root data/voc", "train.json", "val.json"]),
        (["data", "check", "--dataset", "coco", "--novel", "cat"], ["--novel goes with a JSON file as --dataset"]),
        (["data", "voc", "--root", "nowhere", "--out", "b"], ["--root nowhere", "VOC2007"]),
        (["data", "voc", "--root", "nowhere", "--out", "b", "--year", "2008"], ["2008", "2007", "2012"]),
        (["data", "convert", "nowhere", "--out", "b"], ["nowhere: no such folder"]),
        (["data", "split", "nowhere.json", "--out", "b"], ["nowhere.json: no such file"]),
        (["data", "split", "nowhere.json", "--out", "b", "--val", "all"], ["--val all", "a number of images"]),
        (["data", "split", "nowhere.json", "--out", "b", "--novel", "cat,,ox"], ["--novel", "an empty name"]),
        (["cache", "build", "--dataset", "shapes", "--set", "proposals.sises=[3]"], ["sises", "sizes"]),
        (["cache", "build", "--dataset", "shapes", "--set", "train"], ["section.key=value"]),
        (["cache", "build", "--dataset", "shapes", "--set", "train.steps=many"], ["steps", "many", "int"]),
        (["cache", "build", "--dataset", "shapes", "--device", "tpu"], ["tpu", "cuda"]),
        (["cache", "build", "--datset", "shapes"], ["--datset"]),
        (["cache", "info", "nowhere"], ["nowhere"]),
        (["cache", "ls", "nowhere"], ["nowhere", "not a folder"]),
        (["cache", "verify", "nowhere"], ["nowhere", "is not a store"]),
        (["cache", "repair", "nowhere"], ["nowhere", "is not a store"]),
        (["cache", "gc", "nowhere"], ["nowhere", "is not a store"]),
        (["cache", "diff", "nowhere", "elsewhere"], ["nowhere", "is not a store"]),
        (["cache", "build", "--dataset", "shapes", "--set", "build.embedding=int4"], ["int4", "float16, int8"]),
        (["train", "--cache", "nowhere"], ["nowhere"]),
        (["train", "--cache", "nowhere", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["train", "--cache", "nowhere", "--seed", "1", "--set", "train.seed=2"], ["--seed 1", "train.seed=2"]),
        (["train", "--cache", "nowhere", "--set", "teacher.name=b"], ["teacher.name=b", "build another store"]),
        (["eval", "--run", "nowhere"], ["nowhere", "run.json"]),
        (["report", "--run", "nowhere"], ["nowhere", "run.json"]),
        (["detect", "nowhere.png", "--run", "nowhere", "--classes", "ring"], ["nowhere"]),
        (["eval"], ["--run", "--detections"]),
        (["eval", "--run", "a", "--detections", "b"], ["not both"]),
        (["eval", "--detections", "b"], ["--annotations"]),
        (["eval", "--run", "a", "--novel", "cat"], ["--novel", "--detections alone"]),
        (["eval", "--detections", "b", "--annotations", "c", "--crops"], ["--crops", "--run alone"]),
        (["eval", "--detections", "b", "--annotations", "c"], ["--detections b", "no such file"]),
        (["eval", "--detections", "b", "--annotations", "c", "--alone"], ["--alone", "--run alone"]),
        (["eval", "--run", "a", "--classes", "all", "--alone"], ["--alone", "base or novel"]),
        (["eval", "--run", "a", "--weights", "b"], ["--weights b", "--crops", "eval.teacher_weight_novel"]),
        (["eval", "--run", "a", "--crops", "--weights", "b"], ["--weights b", "no such file"]),
        (["eval", "--detections", "b", "--annotations", "c", "--weights", "d"], ["--weights", "--run alone"]),
        (["detect", "b.png", "--run", "a", "--classes", "c", "--weights", "d"], ["--weights d", "no such file"]),
        (["eval", "--run", "a", "--device", "gpu"], ["--device gpu"]),
        (["eval", "--run", "a", "--max-detections", "0"], ["--max-detections", "1"]),
        (["eval", "--detections", "b", "--annotations", "c", "--out", "d/e.json"], ["--out d/e.json", "no folder d"]),
        (["eval", "--detections", "b", "--annotations", "c", "--out", "."], ["--out .", "is a folder"]),
        (["detect", "b.png", "--run", "a", "--classes", "cat;dog"], ["'cat;dog'", "commas between"]),
        (["detect", "b.png", "--run", "a", "--classes", "cat\ndog"], ["a line break", "--classes-file"]),
        (["detect", "b.png", "--run", "a", "--classes-file", "n.txt"], ["--classes-file n.txt", "cannot be read"]),
        (["detect", "b.png", "--run", "a", "--class", "cat", "--classes", "cat"], ["'cat' occurs twice"]),
        (["eval", "--run", "a", "--novel-file", "b"], ["--novel-file", "--detections alone"]),
    ],
)
def test_misuse_is_one_clear_line(arguments, words, tmp_path):
    assert_one_clear_line(ezsd(*arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "data"])


def test_what_an_error_quotes_cannot_command_a_terminal_nor_fill_it(tmp_path):
    done = ezsd("data", "check", "--dataset", "\x1b[31mred.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "\\x1b[31mred.toml" in done.stderr
    assert "\x1b" not in done.stderr
    (tmp_path / "names.txt").write_text("x" * 10**6 + "\0")
    done = ezsd("detect", "a.png", "--run", ".", "--classes-file", "names.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert "names.txt: line 1: expected class names, found a control character" in done.stderr
    assert len(done.stderr) < 5000


BARE = """
import contextlib, io, json, os, sys
from ezsd import cli
for words, folder in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.chdir(folder)
        sys.argv[1:] = words
        code = 0
        # What is said is told with the rest.
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        print(json.dumps([code, "torch" in sys.modules, out.getvalue(), err.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


def from_bare(*commands, folder=ROOT):
    """Exit code, whether torch is loaded, and both outputs of commands: forks of an interpreter without torch."""
    asked = json.dumps([[list(map(str, words)), str(folder)] for words in commands])
    done = python(BARE, arguments=[asked], capture_output=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands), done.stderr
    return answers


REFUSED = [
    ["eval", "--run", "nowhere"],
    ["eval", "--detections", "nowhere.json", "--annotations", "nowhere.json"],
    ["detect", "nowhere.png", "--run", "nowhere", "--classes", "ring"],
    ["detect", "nowhere.png", "--run", "nowhere", "--classes", "ring,ring"],
    ["report", "--run", "nowhere"],
    ["train", "--cache", "nowhere"],
    ["train", "--cache", "nowhere", "--device", "tpu"],
    ["data", "check", "--dataset", "cocoa"],
    ["data", "voc", "--root", "nowhere", "--out", "b"],
    ["data", "convert", "nowhere", "--out", "b"],
    ["data", "split", "nowhere.json", "--out", "b"],
    ["cache", "build", "--dataset", "cocoa"],
    ["cache", "build", "--dataset", "coco", "--data-root", "nowhere"],
    ["cache", "build", "--dataset", "shapes", "--preset", "shape"],
    ["cache", "build", "--dataset", "shapes", "--set", "train.stepps=3"],
    ["cache", "build", "--dataset", "shapes", "--teacher", "ViT-B-23", "--weights", "openai"],
    ["cache", "build", "--dataset", "shapes", "--set", "proposer.backbone=timm:resnet10x"],
    ["cache", "build", "--dataset", "shapes", "--device", "tpu"],
    ["cache", "commit", "nowhere"],
    ["cache", "repair", "nowhere"],
]


@pytest.fixture(scope="module")
def refused():
    return from_bare(*REFUSED)


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=map(" ".join, REFUSED))
def test_arguments_are_refused_before_torch_is_loaded(number, refused):
    """Seconds sooner than after it."""
    assert refused[number][:2] == [2, False], refused[number]


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("open('nowhere/file')", 2),
        ("open('/dev/full', 'wb', buffering=0).write(b'0')", 2),
        ("socket.create_connection(('127.0.0.1', 1))", 2),
        ("os.close(-1)", 1),
        ("os.fdopen(os.pipe()[0]).seek(1)", 1),
    ],
)
def test_an_error_of_the_system_without_a_place_is_a_bug_and_shows_itself(what, code, tmp_path):
    """No line about a bad file descriptor: who called has nothing to mend there."""
    script = f"import os, socket; from ezsd import cli; cli.app = lambda **_: {what}; cli.main()"
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=here, check=False)
    assert result.returncode == code, result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)


def test_the_package_by_itself_loads_nothing_heavy():
    code = "import sys, ezsd, ezsd.errors; print([m for m in ('torch', 'numpy', 'zarr', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_the_names_of_open_clips_models_are_known_without_it():
    code = "import json, sys; from ezsd.teacher.requirements import open_clip_models; print("
    code += "json.dumps([open_clip_models(), 'open_clip' in sys.modules]))\n"
    # Other tests give this process's open_clip models of their own.
    code += "import open_clip; print(json.dumps([sorted(open_clip.list_models()), sorted(open_clip_models())]))"
    done = python(code, capture_output=True)
    (known, is_loaded), both = map(json.loads, done.stdout.splitlines())
    assert not is_loaded
    assert both == [known, known]


STORES = {"info": ["cache/whole"], "ls": ["cache"], "verify": ["cache/whole", "--deep"]}


def test_looking_at_stores_loads_no_torch(shapes_store, tmp_path):
    shutil.copytree(shapes_store, tmp_path / "cache/whole")
    wanted = {("cache", command, *words): 0 for command, words in STORES.items()}
    wanted |= {("cache", command, "nowhere"): 2 for command in STORES}
    for words, answer in zip(wanted, from_bare(*wanted, folder=tmp_path), strict=True):
        assert answer[:2] == [wanted[words], False], (words, answer)


def test_a_results_file_is_evaluated_and_written_without_torch(shapes_run, shapes_root, tmp_path):
    found, truth = shapes_run.folder / "detections.json", shapes_root / "annotations/instances_val.json"
    arguments = ["eval", "--detections", found, "--annotations", truth, "--base", "circle,square"]
    ((code, is_loaded, *said),) = from_bare([*arguments, "--out", tmp_path / "figures.json"])
    assert (code, is_loaded) == (0, False), said
    assert (tmp_path / "figures.json").is_file()


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    result = ezsd("cache", "build", "--dataset", "shapes", "--device", "cuda:99", cwd=tmp_path)
    assert_one_clear_line(result, "cuda:99", "--device cpu")


def test_data_shapes_refuses_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert_one_clear_line(ezsd("data", "shapes", "--out", tmp_path / "mine"), "mine", "choose another")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_clutter_is_drawn_checked_and_not_taken_for_shapes(tmp_path):
    words = ["--out", "data/clutter", "--train", 40, "--val", 40]
    assert ezsd("data", "clutter", *words, cwd=tmp_path).stdout.startswith("data/clutter: 40 training and 40 val")
    for name in ("clutter", "clutter-split3"):
        checked = ezsd("data", "check", "--dataset", name, cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert checked.stdout.startswith(name)
    assert_one_clear_line(ezsd("data", "shapes", *words, cwd=tmp_path), "data/clutter", "choose another")


def test_labels_of_others_are_converted_split_and_checked(tmp_path):
    (tmp_path / "in").mkdir()
    for stem, name in (("a", "cow"), ("b", "cow"), ("c", "goat"), ("d", "cow")):
        Image.new("RGB", (60, 40)).save(tmp_path / f"in/{stem}.png")
        corners = "<xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>40</ymax>"
        words = f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
        (tmp_path / f"in/{stem}.xml").write_text(words)
    made = ezsd("data", "convert", "in", "--out", "data/farm", "--novel", "goat", "--corners", "edges", cwd=tmp_path)
    assert (made.returncode, made.stdout.splitlines()[-1]) == (0, "next: ezsd data check --dataset data/farm/farm.toml")
    assert "train: 4 images, 4 boxes" in made.stdout
    divided = ezsd("data", "split", "data/farm/train.json", "--out", "two", "--val", "25%", cwd=tmp_path)
    assert (divided.returncode, "val: 1 image, 1 box\n" in divided.stdout) == (0, True), divided.stderr
    for dataset in (["data/farm/farm.toml"], ["two/two.toml"], ["data/farm/train.json", "--novel", "goat"]):
        checked = ezsd("data", "check", "--dataset", *dataset, cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    (tmp_path / "in/b.xml").write_text("<annotation>")
    again = ezsd("data", "convert", "in", "--out", "again", cwd=tmp_path)
    *progress, said = again.stderr.splitlines()
    assert (again.returncode, [line.partition(":")[0] for line in progress]) == (2, ["read train"])
    assert said.startswith("ezsd: in/b.xml: the file: expected XML, found something else")
    assert not (tmp_path / "again").exists()


def test_cache_info_tells_rows_and_teacher(shapes_store):
    result = ezsd("cache", "info", shapes_store, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["complete"] is True
    assert found["images"] == 12
    assert found["manifest"]["products"]["teacher"]["inputs"]["model"]["name"] == "tiny-shapes"
    result = ezsd("cache", "info", shapes_store)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  "))
    assert facts["state"] == "complete, format version 2"
    assert facts["images"] == "12"
    assert facts["dataset"].startswith("shapes, 13 base and 7 novel classes, images in /")
    assert facts["teacher"] == "tiny-shapes"
    rows = {product["name"]: product["rows"] for product in found["products"]}
    assert f"\nregions       {rows['regions']:>4}  {rows['regions'] / 12:>9.1f}  " in result.stdout


def test_cache_info_of_a_record_with_anything_in_it_is_text(shapes_store, tmp_path):
    store = shutil.copytree(shapes_store, tmp_path / "store")
    record = {"dataset": 3, "data_root": ["\x1b[2J"], "versions": "new", "teacher": {"weights": ["a\nb"]}}
    (store / "environment.json").write_bytes(seal(record))
    result = ezsd("cache", "info", store)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert 'teacher     tiny-shapes, weights ["a\\nb"]\n' in result.stdout


def test_a_backend_that_cannot_run_here_is_refused(shapes_store, tmp_path):
    words = ["train", "--cache", shapes_store, "--run", tmp_path / "run", "--set", "train.backend=triton"]
    result = ezsd(*words, "--device", "cpu", TRITON_INTERPRET="0")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith('ezsd: backend="triton" cannot run here')
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_store_is_listed_verified_and_compared(shapes_store, tmp_path):
    listed = ezsd("cache", "ls", shapes_store.parent)
    assert listed.returncode == 0
    assert listed.stdout.startswith("shapes  complete, 12 images, ")
    verified = ezsd("cache", "verify", shapes_store, "--deep")
    assert (verified.returncode, verified.stdout) == (0, f"{shapes_store}: nothing is wrong\n")
    copy = shutil.copytree(shapes_store, tmp_path / "copy")
    assert "same content, file for file" in ezsd("cache", "diff", shapes_store, copy).stdout
    (copy / "notes.txt").write_text("mine")
    (copy / "regions/score/c/0").write_bytes(b"")
    verified = ezsd("cache", "verify", copy)
    assert verified.returncode == 1
    assert "lost are rows 0 to" in verified.stdout
    assert "notes.txt: does not belong" in verified.stdout
    assert "kept: notes.txt (4 bytes), not made by ezsd" in ezsd("cache", "gc", copy).stdout
    assert "removed: notes.txt (4 bytes)" in ezsd("cache", "gc", copy, "--strays").stdout
    repaired = ezsd("cache", "repair", copy)
    assert repaired.returncode == 1
    assert "marked incomplete, 1 file is still damaged" in repaired.stdout
    assert_one_clear_line(ezsd("train", "--cache", copy), "marked incomplete", "--data-root")


def test_detect_finds_named_classes_and_draws_them(shapes_run, shapes_root, tmp_path):
    image = shapes_root / "val/000001.png"
    drawn = tmp_path / "drawn.png"
    result = ezsd(
        "detect", image, "--run", shapes_run.folder, "--classes", "ring,bar", "--threshold", 0, "--out", drawn
    )
    assert result.returncode == 0, result.stderr
    names = {line.split()[1] for line in result.stdout.splitlines()}
    assert names <= {"ring", "bar"}
    assert names
    with Image.open(drawn) as picture:
        assert picture.width >= 128


def test_what_detect_prints_is_evaluated(shapes_run, shapes_root, tmp_path):
    truth = shapes_root / "annotations/instances_val.json"
    for images, count in ((shapes_root / "val", 8), (f"{shapes_root}/val/00000[1].png", 1)):
        found = ezsd("detect", images, "--run", shapes_run.folder, "--threshold", 0, "--json")
        assert found.returncode == 0, found.stderr
        assert len(json.loads(found.stdout)["images"]) == count
        (tmp_path / "r.json").write_text(found.stdout)
        words = ["eval", "--detections", tmp_path / "r.json", "--annotations", truth, "--base", "circle,square"]
        result = ezsd(*words, "--out", tmp_path / "figures.json")
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / "figures.json").read_text())["generalised"]["detections"] > 0


def test_detect_takes_names_of_every_kind_and_an_out_with_a_slash(shapes_run, shapes_root, tmp_path):
    (tmp_path / "names.txt").write_text("# two\nbar\n\n")
    words = ["detect", shapes_root / "val/000001.png", "--run", shapes_run.folder, "--threshold", 0, "--json"]
    words += ["--class", "ring", "--classes-file", tmp_path / "names.txt", "--classes", '"red ring"']
    result = ezsd(*words, "--classes", "star", "--out", f"{tmp_path}/out/")
    assert result.returncode == 0, result.stderr
    names = [one["name"] for one in json.loads(result.stdout)["categories"]]
    assert names == ["ring", "red ring", "star", "bar"]
    assert (tmp_path / "out/000001.png").is_file()


def test_detect_prints_a_document_of_several_images(shapes_run, shapes_root):
    result = ezsd("detect", shapes_root / "val", "--run", shapes_run.folder, "--classes", "ring", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["images"]) == 8


def test_eval_of_a_results_file_writes_the_same_bytes_twice(shapes_run, shapes_root, tmp_path):
    truth = shapes_root / "annotations/instances_val.json"
    arguments = ["eval", "--detections", shapes_run.folder / "detections.json", "--annotations", truth]
    written = []
    for name in ("a.json", "b.json"):
        result = ezsd(*arguments, "--base", "circle,square", "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert "at most 300 detections per image" in result.stdout


def test_detect_refuses_what_is_no_image(shapes_run, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    result = ezsd("detect", tmp_path / "notes.png", "--run", shapes_run.folder, "--classes", "ring")
    assert_one_clear_line(result, "notes.png", "not an image")


def test_detect_goes_on_past_a_bad_image_and_saves_the_others(shapes_run, shapes_root, tmp_path):
    for number in (1, 2, 3):
        content = (shapes_root / f"val/00000{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(content[:200] if number == 2 else content)
    words = ["detect", tmp_path, "--run", shapes_run.folder, "--threshold", 0, "--class-agnostic-nms"]
    result = ezsd(*words, "--save", f"csv={tmp_path}/found.csv", "--out", f"{tmp_path}/drawn/")
    assert result.returncode == 2
    named, counted, last = result.stderr.splitlines()
    assert named.endswith("2.png: cannot be read: image file is truncated; left out")
    assert counted.startswith("detect: 3/3 images")
    assert last.startswith("ezsd: 1 of 3 could not be read and is left out, the first: ")
    printed = {line.split()[0] for line in result.stdout.splitlines()}
    assert printed == {f"{tmp_path}/1.png", f"{tmp_path}/3.png"}
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + len(result.stdout.splitlines())
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["1.png", "3.png"]


def test_detect_refuses_a_class_that_the_teacher_has_no_words_for(shapes_run, shapes_root):
    image = shapes_root / "val/000001.png"
    result = ezsd("detect", image, "--run", shapes_run.folder, "--classes", "zebra")
    assert_one_clear_line(result, "zebra", "tiny-shapes")


def test_detect_embeds_a_name_that_the_run_never_had(shapes_run, shapes_root):
    image = shapes_root / "val/000001.png"
    arguments = ["detect", image, "--run", shapes_run.folder, "--threshold", 0]
    # Alone: after six steps the names that were learned win every region.
    result = ezsd(*arguments, "--classes", "red ring", "--alone")
    assert result.returncode == 0, result.stderr
    assert " red ring " in result.stdout


def test_train_refuses_a_store_whose_annotations_have_changed(shapes_store, shapes_root, tmp_path):
    moved = tmp_path / "data"
    moved.mkdir()
    for part in ("train", "val"):
        (moved / part).symlink_to(shapes_root / part)
    (moved / "annotations").mkdir()
    for name in ("instances_train.json", "instances_val.json"):
        document = json.loads((shapes_root / "annotations" / name).read_text())
        circle = next(c["id"] for c in document["categories"] if c["name"] == "circle")
        for entry in document["annotations"]:
            if entry["category_id"] == circle:
                entry["bbox"][0] += 1
        (moved / "annotations" / name).write_text(json.dumps(document))
    result = ezsd("train", "--cache", shapes_store, "--run", tmp_path / "run", "--data-root", moved)
    *said, result.stderr = result.stderr.strip().split("\n")
    assert any("no box of novel" in line for line in said)
    assert_one_clear_line(result, "base_boxes_sha256", "build a new store")
    assert not (tmp_path / "run").exists()


def python(code, *, arguments=(), env=None, **options):
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **(env or {})}, text=True, check=False, **options)


PRINTS = "import typer; from ezsd import cli; cli.app = lambda **_: typer.echo('caf\\u00e9 \\u5706'); cli.main()"


@pytest.mark.parametrize(
    ("encoding", "read_as", "printed"),
    [
        # typer takes ASCII for a locale that was never set.
        ("ascii", "utf-8", "caf\xe9 \u5706\n"),
        ("latin-1", "latin-1", "caf\xe9 \\u5706\n"),
        ("cp1252", "cp1252", "caf\xe9 \\u5706\n"),
        ("utf-8", "utf-8", "caf\xe9 \u5706\n"),
    ],
)
def test_names_outside_the_encoding_of_standard_output_are_escaped(encoding, read_as, printed):
    done = python(PRINTS, env={"PYTHONIOENCODING": encoding}, capture_output=True, encoding=read_as)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


def test_closed_standard_output_is_one_line(tmp_path):
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m ezsd cache ls "{tmp_path}" >&-'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "ezsd: standard output is closed; send it somewhere, for example to a file or /dev/null\n"


def test_a_reader_that_leaves_early_ends_the_command_in_silence(shapes_store):
    process = subprocess.Popen(
        [sys.executable, "-m", "ezsd", "cache", "info", str(shapes_store)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT: start several processes with `torchrun`"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected the number of processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "expected a rank below the number of processes",
        ),
    ],
)
def test_variables_of_a_launcher_that_are_not_whole_are_one_line(given, words):
    """Said before the store is opened, which is not there."""
    done = ezsd("train", "--cache", "nowhere", **given)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_finished_run_says_so_and_what_next(shapes_run, shapes_store, tmp_path):
    words = ["train", "--cache", str(shapes_store), "--run", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--set", "train.steps=1", "--set", "train.batch_size=2"]
    first, again = (ezsd(*words) for _ in range(2))
    assert "run: trained; next: ezsd eval" in first.stdout
    assert "run: already trained for its 1 step; next: ezsd eval" in again.stdout
    assert "resuming" not in again.stderr
