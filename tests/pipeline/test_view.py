"""`ezsd view`: the server by plain requests, in this process, and the page in a real browser where there is one."""

import dataclasses
import http.client
import io
import json
import re
import shutil
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

import ezsd as product
from ezsd.data.annotations import load_evaluation, load_training
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.metrics.error_kinds import KINDS
from ezsd.metrics.judging import Found, Objects, judge
from ezsd.pipeline.data.images import read_image, read_pixels
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference.outlines import outlines
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.view import Viewer, ViewRequest
from ezsd.pipeline.view.boxes import images_with
from ezsd.pipeline.view.masks import POINTS
from ezsd.pipeline.view.server import MAX_UPLOAD
from ezsd.pipeline.view.trial import parse_names
from tests.commandkit import ezsd

NAMES = SHAPES_SPLIT.names


@contextmanager
def served(target, **options):
    with Viewer(ViewRequest(target=Path(target), **options)) as viewer:
        thread = threading.Thread(target=viewer.serve, daemon=True)
        thread.start()
        try:
            yield viewer
        finally:
            viewer.close()
            thread.join()


@pytest.fixture(scope="module")
def run_page(shapes_run):
    with served(shapes_run.folder) as viewer:
        yield viewer


def ask(viewer, path, *, method=None, body=None, headers=None, **query):
    """Status, headers and body of an answer."""
    host, port = re.fullmatch("http://(.*):(.*)/", viewer.address).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    url = f"{path}?{urlencode(query)}" if query else path
    connection.request(method or ("GET" if body is None else "POST"), url, body, headers or {})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def data_of(viewer, path, **options):
    status, _, data = ask(viewer, path, **options)
    assert status == 200, data
    return json.loads(data)


def error_of(viewer, path, **options):
    status, _, data = ask(viewer, path, **options)
    (error,) = json.loads(data).values()
    return status, error


# Which images show an error


def small_part():
    """Two images: a cup and a cat in the first, a cup in the second; a cup found twice, a cat taken for a cup."""
    objects = Objects(
        image=np.array([0, 0, 1]),
        row=np.arange(3),
        xywh=np.array([[0, 0, 10, 10], [50, 50, 10, 10], [0, 0, 10, 10]], float),
        class_index=np.array([0, 1, 0]),
        crowd=np.array([False, False, False]),
        ignored=np.array([False, False, False]),
    )
    found = Found(
        image=np.array([0, 0, 0]),
        row=np.arange(3),
        xywh=np.array([[0, 0, 10, 10], [50, 50, 10, 10], [0, 0, 10, 9]], float),
        class_index=np.array([0, 0, 0]),
        score=np.array([0.9, 0.6, 0.3]),
        judged=np.array([True, True, True]),
        not_exhaustive=np.array([False, False, False]),
    )
    return objects, found, judge(objects, found)


@pytest.mark.parametrize(
    ("class_index", "kind", "threshold", "images"),
    [
        (None, "right", 0.0, [0]),
        (None, "right", 0.95, []),
        (None, "confused", 0.5, [0]),
        (None, "confused", 0.7, []),
        # The class of the object, and of the detection.
        (1, "confused", 0.5, [0]),
        (0, "confused", 0.5, [0]),
        (None, "doubled", 0.3, [0]),
        (None, "doubled", 0.31, []),
        (None, "missed", 0.0, [1]),
        (1, "missed", 0.6, []),
        (1, "missed", 0.61, [0]),
        (0, None, 0.0, [0, 1]),
        (1, None, 0.0, [0]),
    ],
)
def test_images_are_found_by_class_and_kind_of_error(class_index, kind, threshold, images):
    objects, found, errors = small_part()
    errors = None if kind is None else errors
    shown = images_with(class_index, kind, objects=objects, found=found, errors=errors, threshold=threshold)
    assert shown.tolist() == images


def test_a_class_that_nobody_looked_for_is_not_judged():
    objects, found, _ = small_part()
    errors = judge(objects, dataclasses.replace(found, judged=np.array([True, False, True])))
    assert [KINDS[kind] if kind >= 0 else None for kind in errors.kind] == ["right", None, "doubled"]
    assert errors.found_at.tolist() == [0.9, -1, -1]


def test_a_class_without_all_its_boxes_is_ignored_unless_right():
    objects, found, _ = small_part()
    errors = judge(objects, dataclasses.replace(found, not_exhaustive=np.array([True, True, True])))
    assert [KINDS[kind] for kind in errors.kind] == ["right", "ignored", "ignored"]
    assert errors.matched.tolist() == [0, -1, -1]
    assert errors.found_at.tolist() == [0.9, -1, -1]


# The server


def test_the_page_allows_nothing_but_its_own_files(run_page):
    for path, kind in (("/", "text/html"), ("/view.js", "text/javascript"), ("/view.css", "text/css")):
        status, headers, data = ask(run_page, path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert b"://" not in data
    assert b"style=" not in ask(run_page, "/")[2]


def test_another_page_and_another_name_of_this_machine_are_refused(run_page):
    """A name of a stranger that leads to 127.0.0.1 makes no page of his ours."""
    port = run_page.address.rsplit(":", 1)[1].rstrip("/")
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert error_of(run_page, "/api/index", headers={"Host": host})[0] == 403
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert error_of(run_page, "/api/index", headers=headers)[0] == 403
        assert error_of(run_page, "/api/given", body=b"x", headers=headers)[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9000"):
        assert ask(run_page, "/api/index", headers={"Host": host, "Origin": f"http://{host}"})[0] == 200


def test_only_this_machine_is_served(run_page):
    assert run_page._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "query", "status", "words"),
    [
        ("/../../../etc/passwd", {}, 404, "nothing here"),
        ("/view.css.j2", {}, 404, "nothing here"),
        ("//[", {}, 404, "nothing here"),
        ("/api/part", {"part": "test"}, 422, "one of val, train"),
        ("/image", {"part": "val", "image": "8"}, 422, "0 to 7"),
        ("/image", {"part": "val", "image": "-1"}, 400, "whole number"),
        ("/api/boxes", {"part": "val"}, 400, "whole number"),
        ("/api/find", {"part": "val", "kind": "odd"}, 400, "expected one of right"),
        ("/api/find", {"part": "val", "threshold": "high"}, 400, "a number"),
        ("/api/find", {"part": "train", "kind": "missed"}, 422, "no errors are known"),
        ("/given", {"key": "0123"}, 422, "forgotten"),
    ],
)
def test_what_is_not_there_is_one_line(run_page, path, query, status, words):
    found, error = error_of(run_page, path, **query)
    assert found == status
    assert words in error
    assert "\n" not in error


def test_a_runs_images_are_shown_with_all_their_objects_and_detections(run_page, shapes_run, shapes_root):
    index = data_of(run_page, "/api/index")
    assert (index["parts"], index["base"], index["novel"]) == (
        ["val", "train"],
        list(SHAPES_SPLIT.base),
        list(SHAPES_SPLIT.novel),
    )
    truth = load_evaluation(shapes_root / "annotations/instances_val.json", SHAPES_SPLIT)
    part = data_of(run_page, "/api/part", part="val")
    assert part["files"] == [one.file_name for one in truth.images]
    detections = json.loads((shapes_run.folder / "detections.json").read_text())
    for position, record in enumerate(truth.images):
        shown = data_of(run_page, "/api/boxes", part="val", image=position)
        rows = truth.rows(position)
        assert sorted(one[4] for one in shown["objects"]) == sorted(truth.class_index[rows].tolist())
        np.testing.assert_allclose(
            sorted(one[:4] for one in shown["objects"]), sorted(truth.box[rows].tolist()), atol=0.01
        )
        of_image = [one for one in detections if one["image_id"] == record.id]
        (run,) = shown["runs"]
        assert [(NAMES[one[4]], one[5]) for one in run["boxes"]] == [
            (one["name"], round(one["score"], 4)) for one in of_image
        ]
        assert {one[6] for one in run["boxes"]} <= set(KINDS)
    status, headers, data = ask(run_page, "/image", part="val", image=2)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(data))), read_pixels(shapes_root / "val" / part["files"][2])
    )
    thumbnail = Image.open(io.BytesIO(ask(run_page, "/thumbnail", part="val", image=2)[2]))
    assert max(thumbnail.size) == 96


def test_images_are_found_by_their_objects(run_page, shapes_root):
    truth = load_evaluation(shapes_root / "annotations/instances_val.json", SHAPES_SPLIT)
    name = NAMES[truth.class_index[0]]
    # No detection is that sure: what is left are the objects.
    found = data_of(run_page, "/api/find", part="val", **{"class": int(truth.class_index[0])}, threshold=1.01)["images"]
    assert found == sorted(set(truth.image_index[truth.class_index == NAMES.index(name)].tolist()))
    missed = data_of(run_page, "/api/find", part="val", kind="missed", threshold=1.01)["images"]
    assert missed == sorted(set(truth.image_index.tolist()))


def test_training_images_have_base_objects_alone_unless_it_is_evaluation(shapes_store, shapes_root):
    base = load_training(shapes_root / "annotations/instances_train.json", SHAPES_SPLIT)
    every = load_evaluation(shapes_root / "annotations/instances_train.json", SHAPES_SPLIT)
    assert len(every.box) > len(base.box)
    for evaluate, truth in ((False, base), (True, every)):
        with served(shapes_store, evaluate=evaluate) as viewer:
            index = data_of(viewer, "/api/index")
            assert (index["parts"], index["runs"], index["evaluated"]) == (["train"], [], evaluate)
            shown = [data_of(viewer, "/api/boxes", part="train", image=n) for n in range(len(base.images))]
            assert sum(len(one["objects"]) for one in shown) == len(truth.box)
            assert sum(len(one["proposals"]) for one in shown) > sum(len(one["regions"]) for one in shown) > 0
            assert error_of(viewer, "/api/detect", body=json.dumps({"part": "train", "image": 0}))[0] == 422


def give(viewer, data, name="a.png"):
    return ask(viewer, "/api/given", body=data, headers={}, method="POST", name=name)


def test_a_given_image_is_detected_in_as_ezsd_detect_does(run_page, shapes_run, shapes_root):
    path = shapes_root / "val/000001.png"
    status, _, answer = give(run_page, path.read_bytes(), "odd <b>.png")
    given = json.loads(answer)
    assert (status, given["name"], given["width"], given["height"]) == (200, "odd <b>.png", 128, 128)
    shown = Image.open(io.BytesIO(ask(run_page, "/given", key=given["key"])[2]))
    np.testing.assert_array_equal(np.asarray(shown), read_pixels(path))
    asked = {"key": given["key"], "names": "ring, star\ncross"}
    (run,) = data_of(run_page, "/api/detect", body=json.dumps(asked))["runs"]
    expected = product.load(shapes_run.folder)(path, ["ring", "star", "cross"], threshold=0)
    assert len(expected)
    assert [(one["name"], one["score"]) for one in run["boxes"]] == [
        (one.name, round(one.score, 4)) for one in expected
    ]
    assert {one["name"]: one["base"] for one in run["boxes"]}.items() <= {
        name: name in SHAPES_SPLIT.base for name in ("ring", "star", "cross")
    }.items()
    for one in run["boxes"]:
        names = [name for name, _ in one["competitors"]]
        scores = [score for _, score in one["competitors"]]
        assert len(names) == 5
        assert one["name"] not in names
        assert set(names) <= set(NAMES)
        assert scores == sorted(scores, reverse=True)
    # Where others are asked for, the same names compete, from other places of the table.
    name = run["boxes"][0]["name"]
    (again,) = data_of(run_page, "/api/detect", body=json.dumps({"key": given["key"], "names": f"gear,{name}"}))["runs"]
    first, second = (next(one for one in found["boxes"] if one["name"] == name) for found in (run, again))
    assert first["box"] == pytest.approx(second["box"], abs=0.05)
    assert first["score"] == pytest.approx(second["score"], abs=2e-4)
    both = dict(first["competitors"]).keys() & dict(second["competitors"]).keys()
    # Equal scores may come in another order.
    assert len(both) >= 4
    for other in both:
        assert dict(first["competitors"])[other] == pytest.approx(dict(second["competitors"])[other], abs=2e-4)


def test_a_detection_is_among_the_likeliest_names_of_its_region(shapes_run, shapes_root):
    trained = load_trained(shapes_run, "cpu")
    images = trained.resized([read_image(shapes_root / "val/000002.png")])
    search = trained.search(trained.text[:3])
    ((found,),) = trained.detect_each(images, [search], likeliest=len(trained.names))
    ((plain,),) = trained.detect_each(images, [search])
    assert plain.likeliest is None
    assert len(found.boxes)
    assert torch.equal(found.boxes, plain.boxes)
    own = found.likeliest.labels == found.labels[:, None]
    assert own.sum(1).tolist() == [1] * len(own)
    torch.testing.assert_close(found.likeliest.scores[own], found.scores)
    assert (found.likeliest.scores.sum(1) <= 1 + 1e-5).all()


def test_competitors_of_an_evaluations_detection_are_asked_for_anew(run_page):
    shown = data_of(run_page, "/api/boxes", part="val", image=0)["runs"][0]["boxes"][0]
    asked = {"part": "val", "image": 0, "run": 0, "box": shown[:4], "name": NAMES[shown[4]]}
    competitors = data_of(run_page, "/api/competitors", body=json.dumps(asked))["competitors"]
    assert len(competitors) == 5
    assert NAMES[shown[4]] not in [name for name, _ in competitors]
    elsewhere = {**asked, "box": [0, 0, 1, 1]}
    assert data_of(run_page, "/api/competitors", body=json.dumps(elsewhere))["competitors"] is None
    for wrong in ({"box": [0, 0, 10**30, 1]}, {"box": [0, 0, 10**400, 1]}, {"box": [0, 0, True, 1]}, {"run": False}):
        assert error_of(run_page, "/api/competitors", body=json.dumps(asked | wrong))[0] == 400


def test_boxes_are_shown_while_all_images_are_judged_and_the_page_is_told_how_far_it_is(shapes_run, monkeypatch):
    begun, end = threading.Event(), threading.Event()

    def slow(objects, found, *, each):
        each(3, 8)
        begun.set()
        assert end.wait(60)
        return judge(objects, found, each=each)

    monkeypatch.setattr("ezsd.pipeline.view.judging.judge", slow)
    with served(shapes_run.folder) as viewer:
        asked = {"part": "val", "kind": "missed", "threshold": 1.01}
        try:
            data_of(viewer, "/api/find", **asked)
            assert begun.wait(60)
            assert data_of(viewer, "/api/find", **asked) == {"judged": 3, "of": 8}
            assert data_of(viewer, "/api/boxes", part="val", image=0)["objects"]
        finally:
            end.set()
        viewer.target.part("val").judging(0).errors()
        assert data_of(viewer, "/api/find", **asked)["images"]


def test_judging_counts_the_images_that_have_detections():
    objects, found, _ = small_part()
    counts = []
    judge(objects, dataclasses.replace(found, image=np.array([0, 0, 1])), each=lambda *count: counts.append(count))
    assert counts == [(1, 2), (2, 2)]


# Masks


def points_of(rings):
    """Points (n, 2) of all rings of an object."""
    return np.array([point.split(",") for ring in rings for point in ring.split()], float).reshape(-1, 2)


def test_objects_and_detections_have_their_outlines(masked_run, outlined_root, tmp_path):
    document = json.loads((outlined_root / "annotations/instances_val.json").read_text())
    detections = json.loads((masked_run.folder / "detections.json").read_text())
    truth = load_evaluation(outlined_root / "annotations/instances_val.json", SHAPES_SPLIT)
    seen = {"polygon": 0, "mask": 0, "detection": 0}
    plain = copy_with_detections(masked_run, tmp_path / "plain", [])
    with served(masked_run.folder, compare=plain) as viewer:
        assert data_of(viewer, "/api/part", part="val")["masks"] is True
        for position in (1, 2):
            record = truth.images[position]
            boxes = data_of(viewer, "/api/boxes", part="val", image=position)
            masks = data_of(viewer, "/api/masks", part="val", image=position)
            annotated = {tuple(one["bbox"]): one for one in document["annotations"] if one["image_id"] == record.id}
            assert len(boxes["objects"]) == len(masks["objects"]) == len(annotated)
            for box, rings in zip(boxes["objects"], masks["objects"], strict=True):
                (one,) = [a for key, a in annotated.items() if np.allclose(key[:2], box[:2], atol=0.02)]
                if isinstance(one["segmentation"], list):
                    np.testing.assert_allclose(points_of(rings).ravel(), one["segmentation"][0], atol=0.06)
                    seen["polygon"] += 1
                else:
                    # Run lengths are of whole pixels, and a diamond's tip is thinner than one.
                    np.testing.assert_allclose(points_of(rings).min(0), box[:2], atol=2)
                    np.testing.assert_allclose(points_of(rings).max(0), box[2:4], atol=2)
                    seen["mask"] += 1
            # The compared run has no masks.
            assert masks["runs"][1] is None
            of_image = [one for one in detections if one["image_id"] == record.id]
            assert len(masks["runs"][0]) == len(boxes["runs"][0]["boxes"]) == len(of_image)
            for one, rings in zip(of_image, masks["runs"][0], strict=True):
                counts = one["segmentation"]["counts"].encode()
                assert rings == outlines(counts, record.height, record.width, points=POINTS)
                seen["detection"] += bool(rings)
    assert min(seen.values()) > 0, seen


def test_novel_outlines_of_training_images_are_looked_at_in_evaluation_alone(shapes_store, outlined_root):
    """Those of the fixture are no outlines."""
    for evaluate in (False, True):
        with served(shapes_store, data_root=outlined_root, evaluate=evaluate) as viewer:
            asked = {"part": "train", "image": 0}
            if evaluate:
                status, error = error_of(viewer, "/api/masks", **asked)
                assert status == 422
                assert re.search(r"annotations\[\d+\].segmentation: expected polygons", error)
            else:
                masks = data_of(viewer, "/api/masks", **asked)["objects"]
                assert len(masks) == len(data_of(viewer, "/api/boxes", **asked)["objects"])
                assert any(masks)


def test_without_outlines_there_are_no_masks(run_page):
    assert data_of(run_page, "/api/part", part="val")["masks"] is False
    masks = data_of(run_page, "/api/masks", part="val", image=0)
    assert masks["runs"] == [None]
    assert not any(masks["objects"])


def test_what_is_no_image_and_names_that_are_none_are_one_line(run_page, shapes_root):
    status, _, answer = give(run_page, b"no image", "notes.txt")
    assert status == 422
    assert "notes.txt: is not an image" in json.loads(answer)["error"]
    key = json.loads(give(run_page, (shapes_root / "val/000001.png").read_bytes())[2])["key"]
    for names, words in (("ring, ring", "ring"), ("ring\nring", "ring"), ("ring;star", "semicolon")):
        status, error = error_of(run_page, "/api/detect", body=json.dumps({"key": key, "names": names}))
        assert status == 422
        assert words in error
    assert error_of(run_page, "/api/detect", body="[1]")[0] == 422
    assert error_of(run_page, "/api/detect", body=json.dumps({"key": key, "names": 3}))[0] == 400


def test_an_upload_that_is_too_large_is_refused_unread(run_page):
    host, port = re.fullmatch("http://(.*):(.*)/", run_page.address).groups()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /api/given HTTP/1.1\r\nHost: {host}\r\nContent-Length: {MAX_UPLOAD + 1}\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.makefile("rb").read()
    assert b" 413 " in answer.splitlines()[0]
    assert b"Connection: close" in answer
    for headers in ({"Transfer-Encoding": "chunked"}, {"Content-Length": "-1"}, {"Content-Length": "9" * 5000}):
        assert error_of(run_page, "/api/given", method="POST", headers=headers)[0] == 411


def test_only_the_last_images_are_remembered(run_page, shapes_root):
    data = (shapes_root / "val/000001.png").read_bytes()
    keys = [json.loads(give(run_page, data)[2])["key"] for _ in range(5)]
    assert error_of(run_page, "/given", key=keys[0]) == (422, "this image is forgotten; give it again")
    assert [ask(run_page, "/given", key=key)[0] for key in keys[1:]] == [200] * 4


def test_names_come_with_commas_or_one_a_line():
    assert parse_names('cat, dog\n\n "tench, Tinca tinca" \r\nred ball,') == (
        "cat",
        "dog",
        "tench, Tinca tinca",
        "red ball",
    )


# The command


def test_a_port_that_is_taken_is_one_line_and_the_advice_works(shapes_store):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ArgumentError, match=f"`port={port}`: is in use; give another `port`, or `port=0`"):
            Viewer(ViewRequest(target=shapes_store), port)
    with Viewer(ViewRequest(target=shapes_store), 0) as viewer:
        assert viewer.address != f"http://127.0.0.1:{port}/"


def test_misuse_is_one_line(shapes_store, shapes_run, tmp_path):
    for words, said in (
        ((tmp_path / "none",), "no such folder"),
        ((shapes_store, "--compare", shapes_run.folder), "goes with a run"),
        ((shapes_run.folder, "--compare", tmp_path), "no run here"),
    ):
        result = ezsd("view", *words, "--no-browser", "--device", "cpu")
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


BROWSER = """
import os, signal, sys, urllib.request
page = urllib.request.urlopen(sys.argv[1], timeout=200).read()
open(sys.argv[2], "wb").write(page)
os.kill(os.getppid(), signal.SIGTERM)
"""
"""A browser that reads the page once it is served, and ends the command."""


def test_the_command_opens_a_browser_prints_the_address_and_ends_with_the_first_signal(shapes_store, tmp_path):
    script, page = tmp_path / "browser.py", tmp_path / "page.html"
    script.write_text(BROWSER)
    browser = {"DISPLAY": ":0", "BROWSER": f"{sys.executable} -I -S {script} %s {page} &"}
    for _ in range(2):
        result = ezsd("view", shapes_store, "--device", "cpu", **browser)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C closes it\)\n", result.stdout)
        assert result.returncode == 143
        assert "the page is closed; run the same command to open it again" in result.stderr
        assert b"<title>ezsd view</title>" in page.read_bytes()
        page.unlink()


# The page in a browser


@pytest.fixture
def opened_view(opened):
    """Open the page of a viewer."""

    def open_page(address):
        page = opened(address)
        page.wait_for_selector(".row")
        return page

    return open_page


def shown_boxes(page, layer):
    """Captions of the boxes of a layer, once the image's boxes are there."""
    return page.eval_on_selector_all(f".pane:first-child .box.{layer}", "all => all.map(one => one.textContent)")


def wait_for_image(page, name):
    page.wait_for_selector(f"#place:has-text({json.dumps(name)})")
    page.wait_for_selector(".box.object")


def set_threshold(page, value):
    page.eval_on_selector(
        "#threshold", "(one, value) => { one.value = value; one.dispatchEvent(new Event('input')); }", str(value)
    )


def copy_with_detections(run, folder, detections):
    """A copy of a run with other detections, [image id, category id, xywh, score] each."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("eval*.json"))
    table = [dict(zip(("image_id", "category_id", "bbox", "score"), one, strict=True)) for one in detections]
    (folder / "detections.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def known_run(shapes_run, shapes_root, tmp_path_factory):
    """A run whose detections are known, and its validation images of two objects or more, as ids.

    The first object of each image is found surely; the second is confused, in images of odd ids with a higher score.
    """
    truth = json.loads((shapes_root / "annotations/instances_val.json").read_text())
    categories = {one["id"] for one in truth["categories"]}
    detections, several = [], []
    for image in (one["id"] for one in truth["images"]):
        objects = [one for one in truth["annotations"] if one["image_id"] == image]
        there = [one["category_id"] for one in objects]
        detections.append([image, there[0], objects[0]["bbox"], 0.9])
        if len(objects) > 1:
            other = min(categories - set(there))
            detections.append([image, other, objects[1]["bbox"], 0.5 if image % 2 else 0.2])
            several.append(image)
    folder = copy_with_detections(shapes_run, tmp_path_factory.mktemp("known") / "known", detections)
    return folder, several


def test_the_page_shows_filters_and_turns_over_images(opened_view, known_run, shapes_run):
    """One test, for starting a page costs most."""
    folder, several = known_run
    odd = [image for image in several if image % 2]
    with served(folder, compare=shapes_run.folder) as viewer:
        page = opened_view(viewer.address)
        wait_for_image(page, "000001.png")
        # Arrow keys, and a click on the list.
        page.keyboard.press("ArrowRight")
        wait_for_image(page, "000002.png")
        page.keyboard.press("ArrowLeft")
        wait_for_image(page, "000001.png")
        page.click(f".row >> nth={odd[-1] - 1}")
        wait_for_image(page, f"{odd[-1]:06d}.png")
        assert page.locator(".pane").count() == 2
        assert page.text_content(".pane:first-child h3") == "known"
        # Detections with their error, and what they leave out.
        assert len(shown_boxes(page, "detection")) == 2
        assert "confused with" in "".join(shown_boxes(page, "detection"))
        missed = [text for text in shown_boxes(page, "object") if text.endswith("missed")]
        assert len(missed) == len(shown_boxes(page, "object")) - 2
        # The threshold moves without a question to the server.
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        set_threshold(page, 0.6)
        assert len(shown_boxes(page, "detection")) == 1
        set_threshold(page, 0.95)
        assert shown_boxes(page, "detection") == []
        assert all(text.endswith("missed") for text in shown_boxes(page, "object"))
        set_threshold(page, 0.3)
        # Layers, by a click and by a key.
        page.click("#layer-object")
        assert shown_boxes(page, "object") == []
        page.keyboard.press("d")
        assert shown_boxes(page, "detection") == []
        page.keyboard.press("d")
        page.keyboard.press("t")
        assert len(shown_boxes(page, "detection")) == 2
        assert asked == []
        # Errors of a kind, and of how sure detections.
        page.select_option("#kind", "confused")
        page.wait_for_selector(f"#count:has-text('{len(odd)} of 8')")
        names = page.eval_on_selector_all(".row", "all => all.map(one => one.title)")
        assert sorted(names) == [f"{image:06d}.png" for image in odd]
        set_threshold(page, 0.1)
        all_of_kind = f"{len(several)} of 8" if len(several) < 8 else "8 images"
        page.wait_for_selector(f"#count:has-text('{all_of_kind}')")
        page.select_option("#kind", "")
        page.wait_for_selector("#count:has-text('8 images')")
        # Zoom by the wheel and by keys, of both runs at once.
        wide = widths(page)
        page.hover(".pane >> nth=0", position={"x": 50, "y": 60})
        page.mouse.wheel(0, -500)
        page.wait_for_selector("#zoom:has-text('2.5×')")
        assert widths(page) == pytest.approx([2.46 * one for one in wide], rel=0.01)
        page.keyboard.press("0")
        assert widths(page) == pytest.approx(wide)
        page.keyboard.press("+")
        assert widths(page) == pytest.approx([1.4 * one for one in wide], rel=0.01)


def test_a_filter_that_fails_and_one_that_is_judged_say_so(opened_view, known_run):
    folder, _ = known_run
    with served(folder) as viewer:
        page = opened_view(viewer.address)
        wait_for_image(page, "000001.png")
        answer = {"json": {"judged": 0, "of": 0}}
        page.route("**/api/find*", lambda route: route.fulfill(**answer))
        page.select_option("#kind", "confused")
        page.wait_for_selector("#count:has-text('Judging all images')")
        answer |= {"json": {"judged": 3, "of": 8}}
        page.wait_for_selector("#count:has-text('Judging: 3 of 8 images')")
        # The images of before can be turned over meanwhile, and the one that is looked at stays.
        page.keyboard.press("ArrowRight")
        wait_for_image(page, "000002.png")
        answer |= {"json": {"images": [0, 1]}}
        page.wait_for_selector("#count:has-text('2 of 8 images')")
        page.wait_for_selector("#place:has-text('2 / 2 000002.png')")
        # So does an image that is tried.
        answer |= {"json": {"judged": 3, "of": 8}}
        page.select_option("#kind", "missed")
        page.wait_for_selector("#count:has-text('Judging: 3 of 8 images')")
        page.click("#tab-try")
        answer |= {"json": {"images": [2]}}
        page.wait_for_selector("#count:has-text('1 of 8 images')", state="attached")
        assert page.text_content("#place") == "000002.png, 128 × 128"
        page.click("#tab-browse")
        page.wait_for_selector("#place:has-text('1 / 1 000003.png')")
        answer |= {"status": 422, "json": {"error": "cannot be judged"}}
        page.select_option("#kind", "confused")
        page.wait_for_selector("#message.wrong:has-text('cannot be judged')")
        page.wait_for_selector("#count:has-text('0 of 8 images')")
        assert page.locator(".row").count() == 0
        page.select_option("#kind", "")
        wait_for_image(page, "000001.png")
        assert page.is_hidden("#message")
        # An answer about the image before comes after the list is empty.
        held = []
        page.route("**/api/boxes*", lambda route: held.append(route))
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#place:has-text('000002.png')")
        page.unroute("**/api/find*")
        page.route("**/api/find*", lambda route: route.fulfill(json={"images": []}))
        page.select_option("#kind", "confused")
        page.wait_for_selector("#count:has-text('0 of 8 images')")
        with page.expect_response("**/api/boxes*"):
            held[0].continue_()
        page.evaluate("() => new Promise(requestAnimationFrame)")
        assert page.locator(".box").count() == 0
        assert page.locator("#boxes button").count() == 0


def test_masks_are_a_layer_of_browsing_and_of_trying(opened_view, masked_run):
    with served(masked_run.folder) as viewer:
        page = opened_view(viewer.address)
        page.wait_for_selector("path.mask.object")
        set_threshold(page, 0)
        assert page.locator("path.mask.detection").count() > 0
        assert page.locator("path.mask.object").count() == len(shown_boxes(page, "object"))
        colours = page.eval_on_selector_all(
            "path.mask:not(.novel)", "all => all.map(one => getComputedStyle(one).fill)"
        )
        assert set(colours) <= {"rgb(46, 204, 113)"}, colours
        # With their boxes, and by themselves.
        page.click("#layer-object")
        assert page.locator("path.mask.object").count() == 0
        page.keyboard.press("m")
        assert page.locator("path.mask").count() == 0
        page.keyboard.press("m")
        page.wait_for_selector("path.mask.detection")
        page.click("#tab-try")
        assert page.is_hidden("label:has(#layer-mask)")
        page.fill("#names", "ring, star")
        page.click("#detect")
        page.wait_for_selector("label:has(#layer-mask):visible")
        page.wait_for_selector("path.mask.detection")
        page.click("#layer-mask")
        assert page.locator("path.mask").count() == 0
        assert shown_boxes(page, "detection")


def test_part_of_a_name_finds_a_class(opened_view, run_page):
    page = opened_view(run_page.address)
    fitting = [name for name in NAMES if "ar" in name]
    assert 1 < len(fitting) < len(NAMES)
    listed = "all => all.filter(one => one.value).map(one => one.textContent)"
    field = page.get_by_label("Find a class")
    field.fill("AR")
    assert page.eval_on_selector_all("#class option", listed) == fitting
    assert page.text_content("#class-count") == f"{len(fitting)} of {len(NAMES)}"
    field.press("Enter")
    page.wait_for_selector("#count:has-text(' of 8 images')")
    assert page.eval_on_selector("#class", "one => one.selectedOptions[0].textContent") == fitting[0]
    # All are there again, and the chosen one stays while another is looked for.
    assert page.eval_on_selector_all("#class option", listed) == list(NAMES)
    field.fill(fitting[1])
    page.select_option("#class", label=fitting[1])
    assert page.eval_on_selector_all("#class option", listed)[:2] == [name for name in NAMES if name in fitting][:2]
    field.press("Escape")
    assert page.input_value("#class-search") == ""
    assert page.eval_on_selector("#class", "one => one.selectedOptions[0].textContent") == fitting[1]
    field.fill("no such class")
    assert page.text_content("#class-count") == f"0 of {len(NAMES)}"


def test_each_image_that_is_browsed_can_be_tried(opened_view, run_page):
    page = opened_view(run_page.address)
    for name in ("000001.png", "000002.png"):
        page.wait_for_selector(f"#place:has-text('{name}')")
        page.click("#tab-try")
        page.wait_for_selector(f"#given:has-text('{name}')")
        page.click("#tab-browse")
        page.keyboard.press("ArrowRight")


def widths(page):
    """Widths of the images of all panes, pixels."""
    return page.eval_on_selector_all(".canvas", "all => all.map(one => one.getBoundingClientRect().width)")


def test_an_image_that_is_dropped_is_detected_in_with_its_competitors(opened_view, run_page, shapes_root):
    page = opened_view(run_page.address)
    page.click("#tab-try")
    page.fill("#names", "ring, star\ncross")
    data = list((shapes_root / "val/000004.png").read_bytes())
    transfer = page.evaluate_handle(
        """data => { const made = new DataTransfer();
        made.items.add(new File([new Uint8Array(data)], "<img src=x>.png", {type: "image/png"})); return made; }""",
        data,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#given:has-text('<img src=x>.png')")
    set_threshold(page, 0)
    page.wait_for_selector(".box.detection")
    captions = shown_boxes(page, "detection")
    assert {text.split()[0] for text in captions} <= {"ring", "star", "cross"}
    page.click("#boxes button >> nth=0")
    rows = page.eval_on_selector_all("#chosen .bars dt", "all => all.map(one => one.textContent)")
    assert rows[0] == page.text_content("#boxes button[aria-pressed=true] .name")
    assert len(rows) == 6
    assert set(rows) <= set(NAMES)
    page.keyboard.press("Escape")
    assert page.is_hidden("#chosen")
    # What is refused is one line, and nothing else changes.
    page.fill("#names", "ring, ring")
    page.click("#detect")
    page.wait_for_selector("#message.wrong:has-text('ring')")
    assert shown_boxes(page, "detection") == captions


def test_a_list_of_2000_images_has_rows_for_those_in_sight_alone(opened_view, shapes_run, shapes_root, tmp_path):
    root = tmp_path / "many"
    shutil.copytree(shapes_root, root)
    path = root / "annotations/instances_val.json"
    document = json.loads(path.read_text())
    (first,) = [one for one in document["images"] if one["id"] == document["images"][0]["id"]]
    hostile = '"><img src=x onerror=document.title="taken">.png'
    shutil.copy(root / "val" / first["file_name"], root / "val" / hostile)
    for number in range(1, 2000 - len(document["images"]) + 1):
        name = f"{number:05d}.png" if number > 1 else hostile
        document["images"].append({**first, "id": 10**6 + number, "file_name": name})
    path.write_text(json.dumps(document))
    with served(copy_with_detections(shapes_run, tmp_path / "run", []), data_root=root) as viewer:
        page = opened_view(viewer.address)
        page.wait_for_selector("#count:has-text('2,000 images')")
        assert 5 < page.locator(".row").count() < 40
        page.eval_on_selector("#list", "one => { one.scrollTop = 1000 * 64; }")
        page.wait_for_selector(".row[style*='translateY(64000px)']")
        assert page.locator(".row").count() < 40
        page.keyboard.press("End")
        page.wait_for_selector("#place:has-text('2,000 / 2,000')")
        assert page.locator(".row").count() < 40
        # The first one behind the benchmark's own.
        page.goto(f"{viewer.address}#val/8")
        page.reload()
        page.wait_for_selector("#place:has-text('onerror')")
        assert page.title() == "run - ezsd view"
