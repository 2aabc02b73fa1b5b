"""`ezsd cache look`: what is measured is what filters without the held-out names keep, and novel boxes stay unread."""

import dataclasses
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ezsd.boxes import iou
from ezsd.cache import Store, StoreIncomplete
from ezsd.cache.format.sealed_json import seal, unseal
from ezsd.data.annotations import load_evaluation
from ezsd.errors import AnnotationError
from ezsd.metrics.recall import first_overlaps, random_boxes, recall_at
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.held_out import HeldOutFilters, folds, unseen_images
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.look import LookRequest, look_at_store
from ezsd.pipeline.look.page import page as page_of
from ezsd.pipeline.look.pictures import Box, Picture
from ezsd.pipeline.look.recall import Case, measure
from ezsd.pipeline.look.verdict import caveats, summary, verdict
from tests.advicekit import Place
from tests.commandkit import ezsd


@pytest.fixture(scope="module")
def filters(shapes_store, shapes_dataset, quick_config):
    store = Store(shapes_store)
    annotations = checked_annotations(store, shapes_dataset)
    teacher = configured_teacher(quick_config.teacher, "cpu")
    return HeldOutFilters(store, shapes_dataset, annotations, quick_config, teacher)


@pytest.fixture(scope="module")
def looked(shapes_store, tmp_path_factory):
    """A look at all images of the store, without novel boxes: document, page, folder."""
    out = tmp_path_factory.mktemp("look")
    document, page = look_at_store(LookRequest(store=shapes_store, out=out, top=3))
    return document, page.read_text(encoding="ascii"), out


def test_with_no_name_held_out_the_regions_are_the_stores(filters, shapes_store):
    store = Store(shapes_store)
    kept = 0
    for position, image_id in enumerate(store.image_ids.tolist()):
        (found,) = filters.regions(position, [()])
        rows = store.regions[image_id]
        for field in ("box", "score", "confidence", "class_index", "embedding"):
            np.testing.assert_array_equal(found[field], getattr(rows, field))
        kept += len(rows.box)
    assert kept


def test_voted_proposals_are_filtered_as_the_build_does(shapes_store, shapes_dataset, with_settings, tmp_path):
    config = with_settings(proposals={"refine": "vote", "refine_iou": 0.2})
    request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", reuse=shapes_store, workers=1)
    build_cache(request)
    store = Store(request.out)
    teacher = configured_teacher(config.teacher, "cpu")
    filters = HeldOutFilters(store, shapes_dataset, checked_annotations(store, shapes_dataset), config, teacher)
    moved = 0
    for position, image_id in enumerate(store.image_ids.tolist()[:4]):
        (found,) = filters.regions(position, [()])
        np.testing.assert_array_equal(found["box"], store.regions[image_id].box)
        anchors = {box.tobytes() for box in store.proposals[image_id].box}
        moved += sum(box.tobytes() not in anchors for box in found["box"])
    assert moved
    document, _ = look_at_store(LookRequest(store=request.out, out=tmp_path / "out", images=2))
    assert document["held_out"]["boxes"]["proposals"] > 0


def test_held_out_names_are_novel_to_the_filters(filters, shapes_store, shapes_dataset):
    store, base = Store(shapes_store), len(shapes_dataset.split.base)
    guessed, on_held_out = set(), 0
    for position, image_id in enumerate(store.image_ids.tolist()):
        truth = store.ground_truth[image_id]
        for name in np.unique(truth.class_index).tolist():
            (found,) = filters.regions(position, [(name,)])
            guesses = set(found["class_index"].tolist())
            assert all(guess == name or guess >= base for guess in guesses)
            guessed |= guesses & {name}
            hidden = torch.from_numpy(truth.box[truth.class_index == name])
            on_held_out += int((iou(torch.from_numpy(found["box"]), hidden) >= 0.3).any(1).sum())
            others = torch.from_numpy(truth.box[truth.class_index != name])
            if len(others) and len(found["box"]):
                assert iou(torch.from_numpy(found["box"]), others).max() < 0.3
    assert guessed, "no region was ever given the name that was held out"
    assert on_held_out, "the boxes of the name that was held out still drop regions"


def test_a_box_is_shown_to_the_teacher_once_for_all_groups(filters):
    before = filters.passes
    filters.regions(0, [()])
    once = filters.passes - before
    filters.regions(0, [(), (), ()])
    assert filters.passes - before == 2 * once > 0


@pytest.mark.parametrize(
    ("base", "novel", "groups"), [(48, 17, 3), (16, 4, 4), (80, 1, 5), (3, 10, 2), (1, 5, 1), (4, 0, 4)]
)
def test_every_base_name_is_held_out_once(base, novel, groups):
    found = folds(base, novel, seed=3)
    assert len(found) == groups
    assert sorted(name for group in found for name in group) == list(range(base))
    assert found == folds(base, novel, seed=3)


def test_unseen_images_are_those_that_re_normalisation_held_out(shapes_store, shapes_dataset):
    store = Store(shapes_store)
    annotations = checked_annotations(store, shapes_dataset)
    unseen = unseen_images(annotations, store, by="all")
    crops = sum(len(range(annotations.image_index.size)[annotations.rows(position)]) for position in unseen.tolist())
    assert 0 < len(unseen) < len(annotations.images)
    assert crops == store.teacher[1]["held_out_crops"]


def case(**changes):
    fields = {
        "image_id": 1,
        "width": 200,
        "height": 200,
        "objects": np.array([[0, 0, 20, 20], [100, 100, 200, 200]], "f4"),
        "classes": np.array([4, 5], "i4"),
        "base_boxes": np.zeros((0, 4), "f4"),
        "proposals": np.array([[0, 0, 20, 20], [100, 100, 200, 160]], "f4"),
        "regions": np.array([[150, 0, 190, 40]] * 10 + [[100, 100, 200, 160]], "f4"),
        "guesses": np.array([4] * 11, "i4"),
    }
    return Case(**fields | changes)


def test_recall_counts_objects_by_overlap_rank_size_and_name():
    found = measure([case()], base_iou=0.3, nms_iou=0.7, seed=0)
    assert (found["images"], found["objects"]) == (1, {"all": 2, "small": 1, "medium": 0, "large": 1})
    regions = found["recall"]["regions"]
    assert regions["all"]["0.5"] == {"10": 0.0, "20": 0.5, "50": 0.5, "all": 0.5}
    assert regions["all"]["0.7"]["all"] == 0.0
    assert (regions["large"]["0.5"]["all"], regions["small"]["0.5"]["all"]) == (1.0, 0.0)
    assert regions["medium"]["0.5"]["all"] is None
    # The large object is covered, under another name.
    assert found["recall"]["named_regions"]["all"]["0.5"]["all"] == 0.0
    assert found["recall"]["proposals"]["all"]["0.5"]["10"] == 1.0
    assert found["on_objects"]["regions"] == 0.0
    assert 0 <= found["recall"]["random_boxes"]["all"]["0.3"]["all"] <= 0.5


def test_an_image_without_regions_and_no_image_are_measured_too():
    found = measure(
        [case(regions=np.zeros((0, 4), "f4"), guesses=np.zeros(0, "i4"))], base_iou=0.3, nms_iou=0.7, seed=0
    )
    assert found["recall"]["regions"]["all"]["0.3"]["all"] == 0.0
    assert found["recall"]["random_boxes"]["all"]["0.3"]["all"] == 0.0
    assert verdict(found, "objects")
    assert verdict(measure([], base_iou=0.3, nms_iou=0.7, seed=0), "objects") == [
        "No objects in the images looked at: nothing to measure."
    ]


def test_the_verdict_says_whether_regions_beat_chance():
    covering = case(regions=case().objects, guesses=case().classes)
    assert any(
        "too few to tell" in line for line in verdict(measure([covering], base_iou=0.3, nms_iou=0.7, seed=0), "objects")
    )
    assert any(
        "more than chance" in line
        for line in verdict(measure([covering] * 20, base_iou=0.3, nms_iou=0.7, seed=0), "objects")
    )
    assert any(
        "do not tell that from chance" in line
        for line in verdict(measure([case()] * 20, base_iou=0.3, nms_iou=0.7, seed=0), "objects")
    )


def test_regions_that_find_less_than_random_boxes_are_said_to():
    # Almost everywhere in so small an image, a box of that size finds the object.
    apart = {
        "width": 120,
        "height": 120,
        "objects": np.array([[20, 20, 100, 100]], "f4"),
        "classes": np.array([4], "i4"),
    }
    corner = case(**apart, regions=np.array([[0, 0, 80, 80]], "f4"), guesses=np.array([4], "i4"))
    said = verdict(measure([corner] * 40, base_iou=0.3, nms_iou=0.7, seed=0), "objects")
    assert any("fewer than random boxes find" in line for line in said)


def test_random_boxes_have_the_sizes_lie_inside_and_keep_away():
    like = torch.tensor([[0.0, 0, 30, 10], [5, 5, 25, 65], [0, 0, 100, 80]])
    avoid = torch.tensor([[0.0, 0, 100, 40]])
    rng = np.random.default_rng(0)
    drawn = random_boxes(like, width=100, height=80, avoid=avoid, avoid_iou=0.05, nms_iou=1, draws=50, rng=rng)
    assert drawn.shape == (50, 3, 4)
    torch.testing.assert_close(drawn[..., 2:] - drawn[..., :2], (like[:, 2:] - like[:, :2]).expand(50, 3, 2))
    assert (drawn >= 0).all()
    assert (drawn[..., 2:] <= torch.tensor([100.0, 80]) + 1e-4).all()
    # Half of all places of the small box are away; the last box has one place only.
    assert (iou(drawn[:, 0], avoid) < 0.05).float().mean() > 0.95
    assert len(torch.unique(drawn[:, 0], dim=0)) == 50


def test_random_boxes_are_spread_as_boxes_after_nms_are():
    like = torch.tensor([[0.0, 0, 40, 40]]).expand(12, 4)
    avoid = torch.tensor([[0.0, 0, 50, 50]])
    drawn, spread = (
        random_boxes(
            like,
            width=150,
            height=150,
            avoid=avoid,
            avoid_iou=0.3,
            nms_iou=nms_iou,
            draws=20,
            rng=np.random.default_rng(0),
        )
        for nms_iou in (1, 0.3)
    )
    assert drawn.shape == spread.shape == (20, 12, 4)

    def close(draws):
        return sum(int((iou(boxes, boxes) > 0.3).tril(-1).any(1).sum()) for boxes in draws)

    assert close(spread) < close(drawn) / 5
    assert (iou(spread.reshape(-1, 4), avoid) < 0.3).all()
    torch.testing.assert_close(spread[:, 0], drawn[:, 0])


def test_chance_finds_more_with_the_nms_of_the_store():
    wide = case(regions=np.array([[0, 0, 100, 100]] * 10, "f4"), guesses=np.array([4] * 10, "i4"))
    free, apart = (measure([wide] * 20, base_iou=0.3, nms_iou=nms_iou, seed=0) for nms_iou in (1, 0.2))
    assert free["boxes"] == apart["boxes"]
    found, found_apart = (one["recall"]["random_boxes"]["large"]["0.3"]["10"] for one in (free, apart))
    assert found_apart > found


def test_first_overlaps_are_the_best_among_the_first():
    overlap = torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.0, 0.9]])
    torch.testing.assert_close(
        first_overlaps(overlap, [1, 2, 9, None]), torch.tensor([[0.1, 0.6, 0.6, 0.6], [0, 0, 0.9, 0.9]])
    )
    assert first_overlaps(torch.zeros(2, 0), [1, None]).tolist() == [[0, 0], [0, 0]]


def test_all_base_objects_are_held_out_once(looked, shapes_store, shapes_dataset):
    document, _, _ = looked
    annotations = checked_annotations(Store(shapes_store), shapes_dataset)
    assert document["held_out"]["objects"]["all"] == len(annotations.box)
    assert document["images"]["looked_at"] == document["held_out"]["images"] == len(np.unique(annotations.image_index))
    assert sorted(sum(document["held_out"]["groups"], [])) == sorted(shapes_dataset.split.base)
    assert document["evaluation"] is None


def test_the_numbers_are_those_of_the_store(looked, shapes_store):
    document, _, _ = looked
    store = Store(shapes_store)
    regions = [store.regions[image] for image in store.image_ids.tolist()]
    assert (
        document["survey"]["regions"]
        == sum(document["survey"]["guesses"].values())
        == sum(map(lambda r: len(r.box), regions))
    )
    assert document["survey"]["images_without"] == np.mean([len(rows.box) == 0 for rows in regions])
    middle = np.median(np.concatenate([rows.confidence for rows in regions]))
    assert document["survey"]["confidence"]["0.5"] == pytest.approx(middle)


COMMAND = re.compile("<pre><code>(.*?)</code></pre>")


def without_command(text):
    return COMMAND.sub("", text)


class Page(HTMLParser):
    """Attributes and tags of a page; fails where tags do not match."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_the_page_is_whole_and_holds_everything(looked, shapes_store):
    document, text, out = looked
    page = Page(text)
    assert not re.search(r"https?:|//|@import|<script", re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", text))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == document["images"]["looked_at"]
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in pictures)
    drawn = [attributes for tag, attributes in page.tags if tag == "g" and attributes["class"].startswith("region")]
    store = Store(shapes_store)
    assert len(drawn) == sum(min(3, len(store.regions[image].box)) for image in document["images"]["ids"])
    assert "novel boxes</dt><dd>not read" in text.replace("\n", "")
    assert json.loads((out / "look.json").read_text()) == document


def test_the_command_on_the_page_makes_the_same_page(shapes_store, shapes_root, tmp_path):
    out = tmp_path / "own folder"
    done = ezsd("cache", "look", shapes_store, "--out", out, "--images", 2, "--no-teacher", "--data-root", shapes_root)
    assert done.returncode == 0, done.stderr
    text = (out / "look.html").read_text()
    (command,) = COMMAND.findall(text)
    words = shlex.split(html.unescape(command))
    shutil.rmtree(out)
    assert ezsd(*words[1:]).returncode == 0
    assert (out / "look.html").read_text() == text


def test_moved_weights_are_in_the_command_of_the_page(looked):
    document, _, _ = looked
    moved = {**document, "options": {**document["options"], "weights": "clip.safetensors"}}
    assert "--weights clip.safetensors" in COMMAND.findall(page_of(moved, [], 3))[0]


def test_a_page_of_many_names_tells_the_file_of_its_own_figures(looked):
    document, _, _ = looked
    guesses = {f"name {number}": 1 for number in range(30)}
    many = {**document, "survey": {**document["survey"], "guesses": guesses}}
    assert "6 more names in look.json" in page_of(many, [], 3)
    assert "6 more names in look-evaluated.json" in page_of({**many, "evaluation": document["held_out"]}, [], 3)


def test_images_are_not_counted_as_used_where_what_a_run_has_learned_from_is_unknown(looked, tmp_path):
    document, text, _ = looked
    run = {**document, "store": {**document["store"], "search": "run"}}
    for said, unsaid in (
        (summary(document, tmp_path), summary(run, tmp_path)),
        (text, page_of(run, [], 3)),
    ):
        assert "images looked at" in unsaid
        assert f"{document['images']['unseen']} of them used by no training" in said
        assert "used by no training" not in unsaid


def test_what_competes_with_held_out_names_is_said_where_any_are(looked):
    document, _, _ = looked
    alone = {**document, "options": {**document["options"], "teacher": False}}
    assert any("with all novel names of the store" in line for line in caveats(document))
    assert not any("with all novel names of the store" in line for line in caveats(alone))


def test_names_of_files_and_classes_are_text(looked):
    document, _, _ = looked
    nasty = """</p><script>alert("x")</script><img src='//evil.example'>"""
    box = Box(name=nasty, x=1, y=1, width=5, height=5)
    picture = Picture(file_name=nasty, address="data:", width=9, height=9, regions=[box], base=[box], novel=[box])
    text = page_of(document, [picture], 3)
    assert [tag for tag, _ in Page(text).tags if tag in ("script", "img")] == ["img"]


def without_novel(shapes_root, shapes_dataset, target, change):
    """A copy of the data with its novel training boxes changed; `change` returns what is left of one."""
    shutil.copytree(shapes_root, target)
    path = target / "annotations/instances_train.json"
    document = json.loads(path.read_text())
    novel = {one["id"] for one in document["categories"] if one["name"] in shapes_dataset.split.novel}
    document["annotations"] = [
        changed
        for one in document["annotations"]
        if (changed := change(one) if one["category_id"] in novel else one) is not None
    ]
    path.write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("change", [lambda one: None, lambda one: {**one, "bbox": "novel"}], ids=["none", "malformed"])
def test_novel_boxes_change_nothing_without_evaluation(
    looked, shapes_store, shapes_root, shapes_dataset, tmp_path, change
):
    _, text, _ = looked
    root = without_novel(shapes_root, shapes_dataset, tmp_path / "data", change)
    _, page = look_at_store(LookRequest(store=shapes_store, out=tmp_path / "out", top=3, data_root=root))
    assert without_command(page.read_text()) == without_command(text)


def test_drawn_images_are_the_first_chosen_whatever_is_measured(shapes_store, tmp_path, monkeypatch):
    monkeypatch.setattr("ezsd.pipeline.look.look.DRAWN", 3)
    few, many = (
        look_at_store(LookRequest(store=shapes_store, out=tmp_path / str(images), images=images, teacher=False))
        for images in (3, 9)
    )
    assert (few[0]["images"]["looked_at"], many[0]["images"]["looked_at"]) == (3, 9)
    few, many = (re.findall("<figcaption>(.*?)</figcaption>", page.read_text()) for _, page in (few, many))
    assert few == many
    assert len(few) == 3


def test_evaluation_reads_novel_boxes_and_says_so(shapes_store, shapes_root, shapes_dataset, tmp_path):
    request = LookRequest(store=shapes_store, out=tmp_path, images=3, top=3, evaluate=True, teacher=False)
    document, page = look_at_store(request)
    assert page.name == "look-evaluated.html"
    text = page.read_text()
    assert "Choose no setting" in text
    assert 'class="truth novel"' in text
    truth = load_evaluation(shapes_root / "annotations/instances_train.json", shapes_dataset.split)
    store, base = Store(shapes_store), len(shapes_dataset.split.base)
    ids = truth.images.id.tolist()
    objects = [truth.box[truth.rows(p)][truth.class_index[truth.rows(p)] >= base] for p in range(len(ids))]
    wanted = recall_at([store.regions[image].box for image in ids], objects, top=(10,))[10]
    assert document["evaluation"]["objects"]["all"] == sum(map(len, objects))
    assert document["evaluation"]["recall"]["regions"]["all"]["0.5"]["10"] == pytest.approx(wanted)
    # Images are chosen without regard to what they show of novel names.
    unread = dataclasses.replace(request, out=tmp_path / "unread", evaluate=False)
    assert document["images"] == look_at_store(unread)[0]["images"]
    assert document["images"]["looked_at"] == 3
    malformed = without_novel(shapes_root, shapes_dataset, tmp_path / "data", lambda one: {**one, "bbox": "novel"})
    with pytest.raises(AnnotationError, match="novel"):
        look_at_store(
            LookRequest(store=shapes_store, out=tmp_path / "b", evaluate=True, teacher=False, data_root=malformed)
        )
    assert not (tmp_path / "b").exists()


def test_base_names_that_a_dataset_file_calls_novel_were_seen_by_no_training(shapes_root, shapes_dataset, tmp_path):
    """The figure without bias that the page advises: of names that were held out of every training too."""
    place = Place(shapes_root, tmp_path / "own")
    base, novel = shapes_dataset.split.base, shapes_dataset.split.novel
    place.replace(json.dumps(base), json.dumps(base[4:]))
    place.replace(json.dumps(novel), json.dumps(base[:4]))
    place.build_half()
    with pytest.raises(StoreIncomplete, match="not finished"):
        look_at_store(LookRequest(store=place.request().out, out=tmp_path / "out"))
    build_cache(place.request())
    document, _ = look_at_store(LookRequest(store=place.request().out, out=tmp_path / "out", evaluate=True))
    truth = load_evaluation(shapes_root / "annotations/instances_train.json", shapes_dataset.split)
    assert document["evaluation"]["objects"]["all"] == (truth.class_index < 4).sum() > 0
    assert not set(novel) & set(Store(place.request().out).text[0])
    assert sorted(sum(document["held_out"]["groups"], [])) == sorted(base[4:])


def test_without_its_teacher_a_store_is_drawn_and_its_proposals_measured(shapes_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(shapes_store, store)
    record = unseal((store / "environment.json").read_bytes(), "environment.json")
    record["config"]["teacher"]["name"] = "plugin:no_such_module_here:factory"
    (store / "environment.json").write_bytes(seal(record))
    refused = ezsd("cache", "look", store, "--out", tmp_path / "a", "--images", 2)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "no_such_module_here" in refused.stderr
    assert not (tmp_path / "a").exists()
    done = ezsd("cache", "look", store, "--out", tmp_path / "b", "--images", 2, "--no-teacher", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["held_out"]["recall"]) == {"proposals", "random_boxes"}
    assert document["images"]["looked_at"] == 2
    assert (tmp_path / "b/look.html").is_file()


def test_a_store_without_regions_is_looked_at(shapes_store, shapes_dataset, with_settings, tmp_path):
    (tmp_path / "boxes.json").write_text("[]")
    config = with_settings(proposals={"boxes": str(tmp_path / "boxes.json")})
    store = tmp_path / "store"
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=store, reuse=shapes_store, workers=1))
    (tmp_path / "boxes.json").unlink()
    document, page = look_at_store(LookRequest(store=store, out=tmp_path / "out", images=2))
    assert (document["survey"]["regions"], document["survey"]["confidence"]) == (0, None)
    assert document["survey"]["images_without"] == 1
    assert document["held_out"]["recall"]["regions"]["all"]["0.3"]["all"] == 0
    assert document["store"]["search"] == "file"
    Page(page.read_text())


def test_what_cannot_be_looked_at_is_one_line(shapes_store, shapes_root, tmp_path):
    (tmp_path / "empty").mkdir()
    moved = tmp_path / "moved"
    shutil.copytree(shapes_store, moved)
    record = unseal((moved / "environment.json").read_bytes(), "environment.json")
    (moved / "environment.json").write_bytes(seal({**record, "data_root": str(tmp_path / "gone")}))
    data = tmp_path / "data"
    shutil.copytree(shapes_root, data)
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    for words, message in (
        ((tmp_path / "empty",), "empty"),
        ((moved,), "give --data-root DIR"),
        ((moved, "--data-root", data, "--no-teacher"), "no such image"),
        ((shapes_store, "--out", tmp_path / "file"), "file is a file; give the name of a folder"),
        ((shapes_store, "--out", tmp_path / "file/deep/out"), f"{tmp_path}/file is a file; give the name of a folder"),
    ):
        done = ezsd("cache", "look", "--out", out, *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not out.exists()
    done = ezsd("cache", "look", moved, "--data-root", shapes_root, "--out", out, "--images", 1)
    assert done.returncode == 0, done.stderr
    assert "held-out base objects" in done.stdout
    assert done.stdout.rstrip().endswith("look.html")
