"""Advice about stores is tested: each row meets a message, does what it says, and must get on.

`tests/advice.toml` lists all advice.
"""

import json
import secrets
import shutil
from pathlib import Path

import fsspec
import storekit

from ezsd.cache import Store, StoreError, info, list_stores, repair, verify
from ezsd.cache.format.sealed_json import seal
from ezsd.cache.tools.export import export
from ezsd.cache.tools.transfer import pull, push
from tests.advicekit import Advice, each_of, follow


class Scene:
    """A finished store, a copy to spoil, and free places."""

    def __init__(self, finished: Path, copy: Path, folder: Path) -> None:
        self.finished, self.copy, self.folder = finished, copy, folder
        self.url = f"memory://{secrets.token_hex(4)}"
        self.full = folder / "full"
        self.full.mkdir()
        (self.full / "notes.txt").write_text("mine")
        self.new = folder / "new"

    def spoil(self, name: str) -> None:
        storekit.flip(self.copy / name, 13)

    def other(self) -> Path:
        """A store of other contents."""
        return storekit.build(self.folder / "other", block_images=3, embedding="int8")

    def older(self) -> None:
        mark = json.loads((self.copy / "COMMIT.json").read_text())
        mark.pop("sha256")
        (self.copy / "COMMIT.json").write_bytes(seal({**mark, "format_version": 1}))

    def cut_remote(self) -> None:
        """A store at `url` with a file that was cut."""
        push(self.finished, self.url)
        files, root = _files(self.url)
        files.pipe_file(f"{root}/regions/score/c/0", b"short")

    def remove_remote(self) -> None:
        files, root = _files(self.url)
        files.rm(root, recursive=True)

    def half(self, block: str) -> Path:
        """A store that is being built, with a block of another build."""
        foreign = self.folder / "foreign"
        with storekit.open_writer(foreign, widths=[65, *storekit.WIDTHS[1:]]) as writer:
            storekit.write_per_store(writer)
            for one in writer.pending():
                storekit.write_one(foreign, one)
        with storekit.open_writer(self.new) as writer:
            storekit.write_per_store(writer)
            for one in writer.pending():
                storekit.write_one(self.new, one)
        shutil.rmtree(self.new / "journal" / block)
        shutil.copytree(foreign / "journal" / block, self.new / "journal" / block)
        return self.new


def _files(url):
    return fsspec.url_to_fs(url)


def wholes_again(scene: Scene) -> None:
    with storekit.open_writer(scene.new) as writer:
        writer.read_per_store("teacher")


TABLE = [
    Advice(
        situation="a build into a file",
        meet=lambda scene: storekit.build(scene.full / "notes.txt"),
        message="is a file; choose another folder: --out NEW$",
        works=lambda scene: storekit.build(scene.new),
    ),
    Advice(
        situation="a build into a folder of other things",
        meet=lambda scene: storekit.build(scene.full),
        message="holds 'notes.txt' but no store; choose an empty or new folder: --out NEW$",
        works=lambda scene: storekit.build(scene.new),
    ),
    Advice(
        situation="an export into a full folder",
        meet=lambda scene: export(scene.finished, scene.full, format="npz"),
        message="choose a new folder$",
        works=lambda scene: export(scene.finished, scene.new, format="npz"),
    ),
    Advice(
        situation="a pull onto a file",
        meet=lambda scene: pull(scene.finished.as_uri(), scene.full / "notes.txt"),
        message="is a file; choose a new folder$",
        works=lambda scene: pull(scene.finished.as_uri(), scene.new),
    ),
    Advice(
        situation="a pull into a folder of other things",
        meet=lambda scene: pull(scene.finished.as_uri(), scene.full),
        message="choose an empty or new folder$",
        works=lambda scene: pull(scene.finished.as_uri(), scene.new),
    ),
    Advice(
        situation="a pull into another store",
        meet=lambda scene: pull(scene.finished.as_uri(), scene.other()),
        message="holds another store; choose another folder$",
        works=lambda scene: pull(scene.finished.as_uri(), scene.new),
    ),
    Advice(
        situation="a push onto another store: another URL",
        prepare=lambda scene: push(scene.other(), scene.url),
        meet=lambda scene: push(scene.finished, scene.url),
        message="holds another store; choose another URL, or remove that one first$",
        works=lambda scene: push(scene.finished, f"{scene.url}b"),
    ),
    Advice(
        situation="a push onto another store: remove it",
        prepare=lambda scene: push(scene.other(), scene.url),
        meet=lambda scene: push(scene.finished, scene.url),
        message="or remove that one first$",
        cure=lambda scene, _: scene.remove_remote(),
    ),
    Advice(
        situation="a push into a folder of other things",
        meet=lambda scene: push(scene.finished, scene.full.as_uri()),
        message="which is not a file of this store; choose another URL$",
        works=lambda scene: push(scene.finished, scene.new.as_uri()),
    ),
    Advice(
        situation="a damaged copy that is read",
        prepare=lambda scene: scene.cut_remote(),
        meet=lambda scene: Store(scene.url),
        message="push the store again, which sends what is damaged$",
        cure=lambda scene, _: push(scene.finished, scene.url),
    ),
    Advice(
        situation="no store at a URL",
        meet=lambda scene: Store(scene.url),
        message="is not a store .*; `ezsd cache push STORE memory://\\w+` makes one$",
        cure=lambda scene, _: push(scene.finished, scene.url),
    ),
    Advice(
        situation="a damaged store that is sent",
        prepare=lambda scene: scene.spoil("regions/box/c/0/0"),
        meet=lambda scene: push(scene.copy, scene.url),
        message="the store is damaged: `ezsd cache repair` mends it$",
        cure=lambda scene, _: repair(scene.copy, storekit.Images()),
    ),
    Advice(
        situation="a file that did not arrive: pull again",
        prepare=lambda scene: scene.spoil("regions/box/c/0/0"),
        meet=lambda scene: pull(scene.copy.as_uri(), scene.new),
        message="did not arrive as it was committed .*; pull again, and",
        cure=lambda scene, _: scene.spoil("regions/box/c/0/0"),
        works=lambda scene: (pull(scene.copy.as_uri(), scene.new), Store(scene.new)),
    ),
    Advice(
        situation="a store of another format",
        prepare=lambda scene: scene.older(),
        meet=lambda scene: Store(scene.copy),
        message="build the store anew in another folder, or",
        works=lambda scene: Store(storekit.build(scene.new)),
    ),
    Advice(
        situation="a store of other settings",
        meet=lambda scene: Store(scene.finished).require(storekit.manifest(proposals={"nms_iou": 0.5})),
        message="use a store made for these settings \\(`ezsd cache build --out NEW_FOLDER`\\)",
        works=lambda scene: Store(
            storekit.build(scene.new, manifest=storekit.manifest(proposals={"nms_iou": 0.5}))
        ).require(storekit.manifest(proposals={"nms_iou": 0.5})),
    ),
    Advice(
        situation="a folder without a store",
        prepare=lambda scene: scene.new.mkdir(),
        meet=lambda scene: Store(scene.new),
        message="is not a store .*; `ezsd cache build` makes one$",
        cure=lambda scene, _: storekit.build(scene.new),
    ),
    Advice(
        situation="stores of a file",
        meet=lambda scene: list_stores(scene.full / "notes.txt"),
        message="is not a folder; give one that holds stores",
        works=lambda scene: list_stores(scene.finished.parent)[scene.finished],
    ),
    Advice(
        situation="a URL where a folder is asked for",
        prepare=lambda scene: push(scene.finished, scene.url),
        meet=lambda scene: Store(scene.url).path,
        message="is not a local folder; copy it with `ezsd cache pull memory://\\w+ DIR` first$",
        cure=lambda scene, _: pull(scene.url, scene.new),
        works=lambda scene: Store(scene.new).path,
    ),
    Advice(
        situation="a file URL with two slashes",
        meet=lambda scene: Store(f"file:/{scene.finished}"),
        message="write file:///FOLDER, with three slashes and the whole path$",
        works=lambda scene: Store(f"file://{scene.finished}"),
    ),
    Advice(
        situation="a file URL of no folder",
        meet=lambda scene: Store("file:///a%00b"),
        message="names no folder; write file:///FOLDER, with three slashes and the whole path$",
        works=lambda scene: Store(f"file://{scene.finished}"),
    ),
    Advice(
        situation="a link in place of the lock",
        prepare=lambda scene: (scene.copy / ".lock").symlink_to(scene.folder / "made"),
        meet=lambda scene: repair(scene.copy),
        message=r"\.lock: is a link, expected a file of ezsd's own; remove it$",
        cure=lambda scene, _: (scene.copy / ".lock").unlink(),
    ),
    Advice(
        situation="a link out of a store: put what it leads to in its place",
        prepare=lambda scene: (
            (scene.copy / "regions").rename(scene.folder / "away"),
            (scene.copy / "regions").symlink_to(scene.folder / "away"),
        ),
        meet=lambda scene: verify(scene.copy, deep=True),
        message="remove the link, or put what it leads to in its place$",
        cure=lambda scene, _: (
            (scene.copy / "regions").unlink(),
            (scene.folder / "away").rename(scene.copy / "regions"),
        ),
    ),
    Advice(
        situation="a damaged record of the build: remove it",
        prepare=lambda scene: (scene.copy / "environment.json").write_text("{}"),
        meet=lambda scene: Store(scene.copy).environment,
        message="nothing but this record is lost: `ezsd cache repair` or you may remove it$",
        cure=lambda scene, _: (scene.copy / "environment.json").unlink(),
    ),
    Advice(
        situation="a damaged record of the build: repair",
        prepare=lambda scene: (scene.copy / "environment.json").write_text("{}"),
        meet=lambda scene: Store(scene.copy).environment,
        message="`ezsd cache repair` or you may remove it$",
        cure=lambda scene, _: repair(scene.copy),
    ),
    Advice(
        situation="a damaged file that describes a store",
        prepare=lambda scene: scene.spoil("manifest.json"),
        meet=lambda scene: info(scene.copy),
        message="the store is damaged: `ezsd cache repair \\S+` mends it$",
        cure=lambda scene, _: repair(scene.copy, storekit.Images()),
    ),
    Advice(
        situation="a file of a finished store that was cut, when it is built again",
        prepare=lambda scene: (scene.copy / "regions/box/c/0/0").write_bytes(b"short"),
        meet=lambda scene: storekit.build(scene.copy),
        message="the store is damaged: run `ezsd cache repair \\S+`$",
        cure=lambda scene, _: repair(scene.copy, storekit.Images()),
    ),
    Advice(
        situation="a file of a store that was cut, when it is read",
        prepare=lambda scene: (scene.copy / "regions/box/c/0/0").write_bytes(b"short"),
        meet=lambda scene: Store(scene.copy),
        message="`ezsd cache verify --deep` lists all damage, `ezsd cache repair` mends it$",
        cure=lambda scene, _: (_lists(verify(scene.copy, deep=True)), repair(scene.copy, storekit.Images())),
    ),
    Advice(
        situation="a store that was never finished is not repaired",
        prepare=lambda scene: storekit.open_writer(scene.new).close(),
        meet=lambda scene: repair(scene.new),
        message="was never finished, so there is nothing to repair; run `ezsd cache build` again$",
        cure=lambda scene, _: storekit.build(scene.new),
    ),
    Advice(
        situation="a repair from another source",
        prepare=lambda scene: scene.spoil("regions/box/c/0/0"),
        meet=lambda scene: repair(scene.copy, storekit.Images(teacher={"seed": 4})),
        message="make another store than this one .*; give the --data-root it was made from$",
        works=lambda scene: (repair(scene.copy, storekit.Images()), Store(scene.copy)),
    ),
    Advice(
        situation="a teacher of another build",
        prepare=lambda scene: scene.half("whole-teacher"),
        meet=wholes_again,
        message="belongs to another build; remove this folder and run the build again$",
        cure=lambda scene, _: shutil.rmtree(scene.new / "journal/whole-teacher"),
        works=lambda scene: Store(storekit.build(scene.new)),
    ),
]


def _lists(found: list) -> None:
    assert found


@each_of(TABLE)
def test_who_does_what_a_store_says_gets_on(row, finished, copy, tmp_path):
    follow(row, Scene(finished, copy, tmp_path), (StoreError,))
