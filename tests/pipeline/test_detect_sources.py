"""Places that `ezsd detect` takes pictures from: URLs, lists, videos, cameras; and those that cannot be read."""

import contextlib
import io
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from PIL import Image

from ezsd.pipeline.console.arguments import find_sources, picture_places
from ezsd.pipeline.data import images
from ezsd.pipeline.data.images import read_pixels, to_image
from ezsd.pipeline.data.sources import Camera, Video
from ezsd.pipeline.data.video import FrameReader, VideoFile
from ezsd.pipeline.errors import ArgumentError, ImageError
from ezsd.pipeline.inference.detect import detect_images
from ezsd.pipeline.inference.detection_files import Output
from ezsd.pipeline.interrupts import Stopped


def detect(run, sources, **options):
    settings = {"threshold": 0.0, "device": "cpu", "drawn": None} | options
    return list(detect_images(sources, run, ["ring", "bar"], **settings))


# Names


def test_a_list_gives_its_files_and_urls(shapes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes_root)
    image = tmp_path / "own.png"
    Image.new("RGB", (8, 8)).save(image)
    listed = f"\ufeff# mine\r\nval/000001.png\n\n  own.png \nhttps://example.com/a.jpg\ngone.png\n{tmp_path}/clip.MP4\n"
    (tmp_path / "list.txt").write_text(listed)
    found = [str(one) for one in find_sources([tmp_path / "list.txt"])]
    # From where one is, else from where the list is; what is nowhere is named when its turn comes.
    expected = ["val/000001.png", str(image), "https://example.com/a.jpg", "gone.png", f"{tmp_path}/clip.MP4"]
    assert found == expected
    assert find_sources([tmp_path / "list.txt"])[-1] == Video(tmp_path / "clip.MP4")
    (tmp_path / "empty.txt").write_text("# none\n")
    with pytest.raises(ArgumentError, match=r"empty.txt: is an empty list"):
        find_sources([tmp_path / "empty.txt"])


def test_a_number_is_a_camera_unless_a_file_has_that_name(shapes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_sources(["0", "12"]) == [Camera(0), Camera(12)]
    (tmp_path / "0").write_bytes((shapes_root / "val/000001.png").read_bytes())
    assert [str(one) for one in find_sources(["0"])] == ["0"]


def test_places_of_pictures_follow_the_kind_of_the_source(tmp_path):
    sources = [
        tmp_path / "a.jpg",
        Video(tmp_path / "b.webm"),
        Camera(0),
        "https://example.com/x/c.png?size=9",
        "s3://d/e",
    ]
    places = picture_places(sources, tmp_path / "out", alone=False)
    assert [place.name for place in places] == ["a.jpg", "b.mp4", "camera-0.mp4", "c.png", "e.png"]
    with pytest.raises(ArgumentError, match=r"no video format; give it one such as .mp4"):
        picture_places([Video(tmp_path / "b.mp4")], tmp_path / "found.png", alone=True)
    for name in ("found.xbm", "found.msp", "found.blp", "found.pdf"):
        with pytest.raises(ArgumentError, match=r"no picture format; give it one such as .png"):
            picture_places([tmp_path / "a.jpg"], tmp_path / name, alone=True)
    assert picture_places([Video(tmp_path / "b.mp4")], tmp_path / "found.avi", alone=True) == [tmp_path / "found.avi"]


# URLs


class Answers(BaseHTTPRequestHandler):
    """The image as a.png; an endless one; one that stops in the middle until the server is closed."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/gone.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/endless.png":
                for _ in range(1000):
                    self.wfile.write(bytes(2**16))
            self.wfile.write(self.server.image[: 40 if self.path == "/slow.png" else None])
            self.wfile.flush()
            if self.path == "/slow.png":
                self.server.closing.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(shapes_root):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.image = (shapes_root / "val/000001.png").read_bytes()
        server.asked, server.closing = [], threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.closing.set()
        server.shutdown()


def test_an_image_behind_a_url_is_asked_for_once_and_within_limits(site, shapes_root, monkeypatch):
    url = f"{site.address}/a.png"
    assert find_sources([url]) == [url]
    np.testing.assert_array_equal(to_image(url).permute(1, 2, 0), read_pixels(shapes_root / "val/000001.png"))
    assert site.asked == ["/a.png"]
    with pytest.raises(ImageError, match=r"gone.png: cannot be read: FileNotFoundError"):
        to_image(f"{site.address}/gone.png")
    monkeypatch.setattr(images, "MAX_URL_BYTES", 2**20)
    with pytest.raises(
        ImageError, match=r"endless.png: has more than 1,048,576 bytes; download it and make it smaller"
    ):
        to_image(f"{site.address}/endless.png")
    monkeypatch.setattr(images, "URL_SECONDS", 0.2)
    with pytest.raises(ImageError, match=r"slow.png: did not arrive within 0.2 s; download it and give its path"):
        to_image(f"{site.address}/slow.png")


def test_a_url_of_a_video_is_refused():
    with pytest.raises(ArgumentError, match=r"clip.mp4\?a=b: is a video behind a URL.*download it and give its path"):
        find_sources(["https://example.com/clip.mp4?a=b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://[x/a.jpg", "is no URL: Invalid IPv6 URL"),
        ("zip://a.png::file:///etc/x.zip", "expected one URL, found a chain of several with '::'"),
        ("a\0.png", r"expected a path or URL, found a control character in 'a\\x00.png'"),
    ],
)
def test_what_is_no_place_is_one_line_on_the_command_line_and_in_a_list(text, words, tmp_path):
    (tmp_path / "list.txt").write_text(f"a.png\n{text}\n")
    for given in (text, tmp_path / "list.txt"):
        with pytest.raises(ArgumentError, match=words):
            find_sources([given])


def test_a_name_longer_than_any_file_has_is_missing(tmp_path):
    name = f"{'a' * 300}.png"
    with pytest.raises(ImageError, match="no such image"):
        find_sources([name])
    (tmp_path / "list.txt").write_text(name)
    found = find_sources([tmp_path / "list.txt"])
    assert [str(one) for one in found] == [name]
    with pytest.raises(ImageError, match="aaa.png: "):
        to_image(found[0])
    assert picture_places(found, tmp_path / "out", alone=False) == [tmp_path / "out" / name]


def test_a_source_given_twice_is_there_once(shapes_root):
    one, two = (str(shapes_root / f"val/00000{number}.png") for number in (1, 2))
    assert [str(source) for source in find_sources([two, one, two, f"{shapes_root}/val/00000[12].png", "0", "0"])] == [
        two,
        one,
        "camera-0",
    ]


# What cannot be read


def test_one_bad_image_is_named_and_the_rest_goes_on(shapes_run, shapes_root, tmp_path, caplog):
    good = sorted((shapes_root / "val").iterdir())[:3]
    (tmp_path / "bad.png").write_bytes(good[0].read_bytes()[:200])
    sources = [good[0], tmp_path / "bad.png", tmp_path / "gone.png", *good[1:]]
    outputs = [Output("coco", tmp_path / "found.json")]
    seen = []
    stream = detect_images(
        sources, shapes_run, ["ring", "bar"], threshold=0.0, device="cpu", drawn=None, outputs=outputs, batch_size=2
    )
    with pytest.raises(ImageError, match=r"^2 of 5 could not be read and are left out, the first: \S+bad.png: cannot"):
        seen += stream
    alone = detect(shapes_run, good)
    # Other batches round otherwise.
    assert [one.names for one in seen] == [one.names for one in alone]
    assert [one.message for one in caplog.records if "left out" in one.message] == [
        next(one.message for one in caplog.records if "bad.png" in one.message),
        f"{tmp_path}/gone.png: no such image; left out",
    ]
    document = json.loads((tmp_path / "found.json").read_text())
    assert [image["file_name"] for image in document["images"]] == [str(image) for image in good]
    assert len(document["annotations"]) == sum(map(len, alone)) > 0


def test_without_a_readable_image_nothing_is_written(shapes_run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    printed = io.StringIO()
    outputs = [Output("coco", tmp_path / "found.json"), Output("csv", tmp_path / "f.csv"), Output("coco", printed)]
    with pytest.raises(ImageError, match=r"^\S+bad.png: is not an image"):
        detect(shapes_run, [tmp_path / "bad.png"], outputs=outputs)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.png"]
    assert printed.getvalue() == ""


def test_a_signal_ends_after_the_images_at_hand_with_whole_files(shapes_run, shapes_root, tmp_path):
    sources = sorted((shapes_root / "val").iterdir())
    outputs = [Output("coco", tmp_path / "found.json")]
    options = {"threshold": 0.0, "device": "cpu", "drawn": None, "outputs": outputs, "batch_size": 1}
    stream = detect_images(sources, shapes_run, ["ring"], **options)
    next(stream)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        list(stream)
    assert stopped.value.code == 143
    assert stopped.value.kept == "the detections of 1 image are kept; run the same command to detect in all"
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 1
    assert len(list(detect_images(sources[:2], shapes_run, ["ring"], **options))) == 2
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 2


def test_images_are_read_as_they_are_needed(shapes_run, shapes_root, tmp_path):
    """What is held does not grow with the number of images: those that come much later need not be there yet."""
    first = sorted((shapes_root / "val").iterdir())[0]
    sources = [tmp_path / f"{number}.png" for number in range(12)]
    present = 4
    for source in sources[:present]:
        source.write_bytes(first.read_bytes())
    options = {"threshold": 0.0, "device": "cpu", "drawn": None, "batch_size": 1}
    seen = 0
    for _ in detect_images(sources, shapes_run, ["ring"], **options):
        seen += 1
        if seen + present <= len(sources):
            # The one that is three batches ahead.
            sources[seen + present - 1].write_bytes(first.read_bytes())
    assert seen == len(sources)


# Videos


@pytest.fixture(scope="module")
def clip(shapes_root, tmp_path_factory):
    """Five scenes as a video of five frames a second."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    video = VideoFile(path, 5.0)
    for image in sorted((shapes_root / "val").iterdir())[:5]:
        video.write(read_pixels(image))
    video.finish()
    return path


def test_a_video_is_read_as_it_was_written(clip, shapes_root):
    with FrameReader(Video(clip)) as reader:
        assert (reader.rate, reader.frames) == (5.0, 5)
        frames = dict(reader)
    assert list(frames) == [0, 1, 2, 3, 4]
    wanted = read_pixels(sorted((shapes_root / "val").iterdir())[2])
    # JPEG keeps mean colours; with red and blue exchanged they are far off.
    own, exchanged = (
        np.abs((frame - wanted.astype(int)).mean((0, 1))).max() for frame in (frames[2], frames[2][..., ::-1])
    )
    assert own < 2 < exchanged
    with FrameReader(Video(clip), step=2, most=2) as reader:
        assert (reader.rate, reader.frames, [number for number, _ in reader]) == (2.5, 2, [0, 2])


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".mkv"])
def test_a_video_becomes_a_video_with_boxes(shapes_run, clip, tmp_path, ending):
    out = tmp_path / f"new/found{ending}"
    seen = detect(shapes_run, [Video(clip)], drawn=[out], frame_step=2, threshold=0.01, alone=True)
    assert [(one.source, one.frame, one.label) for one in seen] == [
        (str(clip), frame, f"{clip}#{frame:06d}") for frame in (0, 2, 4)
    ]
    assert all(len(one) for one in seen)
    with FrameReader(Video(out)) as reader, FrameReader(Video(clip)) as own:
        assert (reader.rate, reader.frames) == (2.5, 3)
        drawn, plain = next(iter(reader))[1], next(iter(own))[1]
    assert drawn.shape == plain.shape
    assert np.abs(drawn.astype(int) - plain).mean() > 10
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_frames_are_found_as_images_of_the_same_pixels(shapes_run, clip, tmp_path):
    with FrameReader(Video(clip)) as reader:
        pixels = [pixels for _, pixels in reader][:2]
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
    files = detect(shapes_run, [tmp_path / "0.png", tmp_path / "1.png"])
    frames = detect(shapes_run, [Video(clip)], max_frames=2)
    assert [one.objects for one in frames] == [one.objects for one in files]
    assert files[0].objects


def test_a_video_that_cannot_be_written_is_one_line_and_another_place_takes_it(tmp_path):
    (tmp_path / ".found.partial.mp4").mkdir()
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ArgumentError, match="`out=.*found.mp4`: no video can be written there; choose another place"):
        VideoFile(tmp_path / "found.mp4", 5.0).write(frame)
    other = VideoFile(tmp_path / "other.mp4", 5.0)
    other.write(frame)
    other.finish()
    assert (tmp_path / "other.mp4").stat().st_size


def test_what_is_no_video_is_one_line(shapes_run, clip, tmp_path, caplog):
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(clip.read_bytes()[:64])
    for path, words in (
        (playlist, "is not a video of a container"),
        (cut, "cannot be opened|no frame of it can be read"),
    ):
        with pytest.raises(ImageError, match=f"{path}: ({words})"):
            detect(shapes_run, [Video(path)], drawn=[tmp_path / "out.mp4"])
    assert not (tmp_path / "out.mp4").exists()
    half = tmp_path / "half.avi"
    half.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    seen = detect(shapes_run, [Video(half)])
    assert 0 < len(seen) < 4
    assert f"half.avi: ended after {len(seen)} of the 5 frames that its header states" in caplog.text


def test_a_camera_that_is_not_there_is_one_line(shapes_run):
    if cv2.VideoCapture(77).isOpened():
        pytest.skip("this machine has 78 cameras")
    with pytest.raises(ImageError, match="camera-77: cannot be opened; is a camera connected"):
        detect(shapes_run, [Camera(77)])
