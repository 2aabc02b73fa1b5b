"""The documentation: links lead somewhere, the site has every page, pages made from the code are current, code runs."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.commandkit import ezsd
from tests.conftest import QUICK
from tests.docskit import PAGES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
OTHERS = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
]
TEMPLATES = sorted(ROOT.glob(".github/**/*.md"))
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text_of(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Anchors of a page's headings, as code hosts and the site make them."""
    seen = {}
    for title in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield slug if not seen[slug] else f"{slug}-{seen[slug]}"


@pytest.mark.parametrize("page", [*OTHERS, *DOCS, *TEMPLATES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for target in LINK.findall(re.sub(r"`[^`]*`", "", text_of(page))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in set(anchors(found)), target


def test_the_site_has_every_page_and_no_other():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    sections = [next(iter(entry.values())) for entry in site["nav"]]
    pages = [next(iter(page.values())) for section in sections if isinstance(section, list) for page in section] + [
        section for section in sections if isinstance(section, str)
    ]
    joined = re.findall(r'": "(project/\S+\.md)"', (ROOT / "docs/site_hooks.py").read_text(encoding="utf-8"))
    assert sorted(pages) == sorted([*(page.name for page in DOCS), *joined])
    # Nothing is fetched from elsewhere when a page is read.
    assert site["theme"]["font"] is False
    assert site["strict"] is True


def test_the_readme_and_the_first_page_name_every_page():
    for map_, folder in ((ROOT / "README.md", "docs/"), (ROOT / "docs/index.md", "")):
        named = {target.partition("#")[0] for target in LINK.findall(text_of(map_))}
        assert {f"{folder}{page.name}" for page in DOCS} - {f"{folder}index.md"} <= named, map_


@pytest.mark.parametrize("page", PAGES)
def test_a_page_made_from_the_code_is_current(page):
    assert (ROOT / page).read_text(encoding="utf-8") == PAGES[page](), "run `python -m tests.docskit`"


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture(scope="module")
def farm(shapes_root, tmp_path_factory):
    """Drawn photos with YOLO labels, laid out as the quick start says."""
    folder = tmp_path_factory.mktemp("farm")
    for part in ("train", "val"):
        document = json.loads((shapes_root / f"annotations/instances_{part}.json").read_text())
        names = {one["id"]: place for place, one in enumerate(document["categories"])}
        (folder / f"photos/images/{part}").mkdir(parents=True)
        (folder / f"photos/labels/{part}").mkdir(parents=True)
        for image in document["images"]:
            stem, width, height = Path(image["file_name"]).stem, image["width"], image["height"]
            Image.open(shapes_root / part / image["file_name"]).save(folder / f"photos/images/{part}/{stem}.jpg")
            rows = [
                f"{names[one['category_id']]} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"
                for one in document["annotations"]
                if one["image_id"] == image["id"]
                for x, y, w, h in [one["bbox"]]
            ]
            (folder / f"photos/labels/{part}/{stem}.txt").write_text("\n".join(rows))
    (folder / "photos/classes.txt").write_text("\n".join(one["name"] for one in document["categories"]))
    return folder


def test_the_twelve_lines_of_the_quick_start_run(farm):
    """With the tiny teacher and its preset, on drawn images; the first four lines install, and need a network."""
    lines = "".join(blocks("docs/quickstart.md", "sh")).splitlines()
    assert len(lines) == 12
    install, commands = lines[:4], [shlex.split(line) for line in lines[4:]]
    assert [line.split()[0] for line in install] == ["python3", ".", "pip", "python"]
    compile(shlex.split(install[3])[2], "quickstart.md", "exec")
    for words in commands:
        assert words[0] == "ezsd"
        words = [word.replace("goat,sheep", "cross,ring,gear,star,hourglass,tee,chevron") for word in words[1:]]
        if "--backbone-weights" in words:
            at = words.index("--backbone-weights")
            del words[at : at + 2]
            stages = ("model", "train") if words[0] == "train" else ("adapt", "proposals", "build")
            quick = [setting for setting in QUICK if setting.startswith(stages)]
            words += ["--preset", "shapes", *(word for setting in quick for word in ("--set", setting))]
        if words[:2] == ["cache", "build"]:
            at = words.index("--teacher")
            assert words[at : at + 4] == ["--teacher", "ViT-B-32-quickgelu", "--weights", "openai"]
            words[at : at + 4] = ["--teacher", "tiny-shapes", "--scheduler", "sync"]
        done = ezsd(*words, cwd=farm)
        assert done.returncode == 0, f"{words}\n{done.stderr}"
    assert (farm / "look/farm/look.html").is_file()
    assert (farm / "runs/farm/report.html").is_file()
    assert len(list((farm / "found").iterdir())) == 8


def test_the_pages_teacher_builds_a_store(shapes_root, tmp_path):
    (code,) = blocks("docs/plugins.md", "python")
    (tmp_path / "myteacher.py").write_text(code)
    (command,) = blocks("docs/plugins.md", "sh")
    _, _, *words = shlex.split(command)
    words += ["--data-root", shapes_root, "--out", "store", "--scheduler", "sync"]
    words += [word for setting in QUICK if not setting.startswith("adapt") for word in ("--set", setting)]
    done = ezsd(*words, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    assert "store: complete" in done.stdout


def test_the_body_of_the_backbones_page_gives_the_maps_it_says():
    import torch

    (code,) = blocks("docs/backbones.md", "python")
    names = {}
    exec(compile(code, "backbones.md", "exec"), names)
    net = names["Net"]()
    assert [tuple(one.shape[2:]) for one in net(torch.zeros(1, 3, 64, 96))] == [(8, 12), (4, 6)]


def test_the_weights_page_names_the_repositories_and_files_of_the_libraries():
    import open_clip
    import torchvision

    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`/]+/[^`]+)` \|", text, re.MULTILINE)
    assert len(rows) == 7
    for model, tag, repository in rows:
        assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"].strip("/") == repository
    for model, files in re.findall(r"^\| `(\w+)` \| (.*\.pth.*) \|$", text, re.MULTILINE):
        known = {weights.url.rpartition("/")[2] for weights in torchvision.models.get_model_weights(model)}
        assert set(re.findall(r"`([^`]+)`", files)) == known


def test_the_messages_of_the_troubleshooting_page_are_the_programs():
    from tests.test_advice import messages

    said = [" ".join(message.split()) for message in messages()]
    shown = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(shown) == 18
    assert [text for text in shown if not any(text in message for message in said)] == []


def test_the_notebook_runs_and_keeps_no_output(tmp_path, monkeypatch):
    """Its cells in order, as a script; its commands start at once here."""
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)
    monkeypatch.chdir(tmp_path)

    def command(line):
        done = ezsd(*shlex.split(line), cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"

    names = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"), names)
        if number == 0:
            names["command"] = command
    assert len(names["regions"].box) == len(names["guesses"]) > 0
    assert {one.name for one in names["found"]} <= {"ring", "star", "circle"}
    assert (tmp_path / "runs/shapes/eval.json").is_file()
    assert (tmp_path / "found.png").is_file()
