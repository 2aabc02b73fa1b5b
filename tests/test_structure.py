"""The tree keeps its promises: imports flow one way, nothing runs code out of data, no machine's places leak."""

import ast
import functools
import graphlib
import re
import subprocess
from pathlib import Path

import pytest
import typer.main

import ezsd.cache
from ezsd.cli import app
from ezsd.pipeline.console.options import ALIASES, COMMANDS, OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("cli", "pipeline", "ezsd", "cache")
"""What lies at the top level; below the one name ezsd for whoever imports it."""
BEFORE = {
    "ezsd": (
        *(
            "errors",
            "choices",
            "weights",
            "plugins",
            "precision",
            "transfer",
            "boxes",
            "vocabulary",
            "proposals",
            "kernels",
            "losses",
            "teacher",
        ),
        *("crops", "competitors", "detector", "data", "adapt", "metrics"),
    ),
    "cache": ("errors", "files", "format", "journal", "storage", "reader", "writer", "tools"),
    "pipeline": (
        *(
            "errors",
            "progress",
            "process_environment",
            "interrupts",
            "devices",
            "read_ahead",
            "files",
            "config",
            "data",
        ),
        *("scheduling", "runs", "extraction", "inference", "training", "audit", "doctor", "console"),
        *("report", "look", "view", "demo"),
    ),
}
"""The rooms of each part in their order: a room imports only what stands before it."""
ALLOWED = {"cli": {"pipeline", "cache", "ezsd"}, "pipeline": {"ezsd", "cache"}, "cache": {"ezsd.errors"}, "ezsd": set()}
"""What modules of a part may import of others."""
SAY_OPTIONS = (
    *("cli.py", "pipeline/console/", "pipeline/report/", "pipeline/look/"),
    *("pipeline/demo.py", "pipeline/doctor.py", "pipeline/runs/card.py"),
)
"""What speaks to the command line's users, and writes its commands."""
PROGRAMS = {"torchrun", "with"}
FACES = {"ezsd", "ezsd.__main__"}
"""What people import and run: above everything."""
ONCE = {
    "os.fsync": {"cache/files.py"},
    "fcntl.lockf": {"cache/files.py"},
    "fcntl.flock": set(),
    # What the second one keeps can be made again: nothing is flushed.
    ".rename": {"cache/files.py", "pipeline/data/annotation_cache.py"},
    "os.replace": set(),
    # ezsd/ imports no other part.
    "hashlib.file_digest": {"cache/files.py", "ezsd/teacher/weights.py"},
    # Files of a store; of a run; own copies, made again where damaged; results of others, with places in errors;
    # descriptions, whose doubled names are refused.
    "json.loads": {
        *("cache/format/sealed_json.py", "pipeline/files.py", "pipeline/data/annotation_cache.py"),
        *("ezsd/metrics/results.py", "pipeline/config/descriptions.py"),
    },
    "json.load": set(),
    # The text whose digest is in manifests; the one whose digest is of annotations.
    "json.dumps(separators)": {"cache/format/sealed_json.py", "ezsd/data/records.py"},
}
"""What is done in one place, and the modules that hold it."""
# The store can be read where no learning library is installed.
HEAVY = {"torch", "torchvision", "open_clip", "safetensors", "triton"}
RUNS_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# Folders of one machine and one user; a placeholder such as /path/to/coco is none.
PLACES = re.compile(rb"(?<![\w.~-])(?:/(?:home|root|work|Users)/|[A-Za-z]:\\\\?Users\\)[\w.-]")
REGISTRIES = re.compile(
    rb"(?:pypi|pythonhosted|anaconda)\.(?:org|com)|download\.pytorch\.org|extra-index-ur[l]|index-ur[l]|trusted-hos[t]"
)

FRAGMENT = re.compile(
    r"(?:What|Which|Where|When|Whether|How|Who|Whose|Why|Of|As|So|By|In|At|Like|Likewise|See|The same|The others|That|"
    r"Those|These|This|It|Its|They|Their|There)\b"
)
"""First words of a docstring that only the text around it explains, or that begin a clause instead of a phrase."""


def listed(function):
    """All that a generator gives of a module, gone through once: several tests ask for it."""
    return functools.cache(lambda path: tuple(function(path)))


@functools.cache
def nodes(path):
    """Nodes of a module's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


@functools.cache
def sources(part):
    """All modules of one of the parts."""
    single = ROOT / f"{part}.py"
    if single.is_file():
        return [single]
    # ezsd/ has links to the other parts.
    return [path for path in sorted((ROOT / part).rglob("*.py")) if not path.is_symlink() and linked(path) is None]


def linked(path):
    """The link to another part that a path leads through; None for none."""
    return next((above for above in path.parents if above != ROOT and above.is_symlink()), None)


def module_name(path):
    """What a module is called where it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "ezsd" else ("ezsd", *parts)).removesuffix(".__init__")


MODULES = {module_name(path): (part, path) for part in PARTS for path in sources(part)}


@listed
def imported_modules(path):
    """Our own modules that a module imports, at any depth of it, but for those that only a type checker sees."""
    unseen = {
        below
        for node in nodes(path)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for below in ast.walk(node)
    }
    for node in set(nodes(path)) - unseen:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module):
    """The part of a module and its place in it."""
    part = MODULES[module][0]
    rest = module.split(".")[2 if part in ("pipeline", "cache") else 1 :]
    return part, rest[0] if rest else ""


@listed
def imported(path):
    """Top-level package of every import in a module, at any depth of it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "ezsd" if node.level else node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and called(node).rpartition(".")[2] in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant):
                yield "ezsd" if name.value.startswith(".") else name.value.partition(".")[0]


def called(node):
    """Dotted name of what a call calls; "" where it has none."""
    parts, at = [], node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    return ".".join([at.id, *reversed(parts)]) if isinstance(at, ast.Name) else ""


@listed
def once_only(path):
    """The uses in a module of what is done in one place."""
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name == "json.dumps" and any(k.arg == "separators" for k in node.keywords):
            yield "json.dumps(separators)"
        # A method of whatever there is, such as a path.
        yield from {name, f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""} & ONCE.keys()


def keyword(node, name):
    """Literal value of a call's keyword; None if it is absent or computed."""
    value = next((k.value for k in node.keywords if k.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else None


def dangers(path):
    """Places where a module may run code that came as data."""
    for name in imported(path):
        if name in RUNS_CODE:
            yield f"imports {name}"
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and keyword(node, "weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if any(k.arg == "allow_pickle" and keyword(node, "allow_pickle") is not False for k in node.keywords):
            yield f"line {node.lineno}: allow_pickle"


@listed
def texts(path):
    """Texts of a module with "{}" for what is put in, but for docstrings, each with its line."""
    docstrings = {node.value for node in nodes(path) if isinstance(node, ast.Expr)}
    parts = {part for node in nodes(path) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in set(nodes(path)) - docstrings - parts:
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(one.value if isinstance(one, ast.Constant) else "{}" for one in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def fragments(path):
    """Docstrings, of attributes too, that begin with `FRAGMENT`, but for "See `Base.method`." on overrides."""
    of_base = {
        method.body[0]
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        for base in map(ast.unparse, node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and (ast.get_docstring(method) or "").startswith(f"See `{base}.")
    }
    for node in set(nodes(path)) - of_base:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value
            if FRAGMENT.match(text):
                yield node.lineno, text.partition("\n")[0]


def options_said(path):
    """Options of our commands in a module's texts, but for whole commands to type."""
    for line, text in texts(path):
        if re.search(r"--[a-z]", re.sub(r"`(?:ezsd|dask|docker) [^`]*`", "", text)):
            yield f"line {line}: {text}"


def openings(path):
    """Places where a module reads an image file by itself."""
    for name in imported_whole(path):
        if name.startswith(("torchvision.io", "cv2", "imageio", "skimage.io", "matplotlib.image")):
            yield f"imports {name}"
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = called(node)
            if name in ("Image.open", "PIL.Image.open", "ImageFile.Parser") or name.endswith("exif_transpose"):
                yield f"line {node.lineno}: {name}"


def imported_whole(path):
    """Full names of modules and of what is taken from them."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tracked():
    """Files of the repository and those about to join it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this copy is no git repository, so nobody knows which files belong to it")
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    return [file for file in files if file.is_file()]


@pytest.mark.parametrize("part", PARTS)
def test_imports_flow_one_way(part):
    assert sources(part)
    for path in sources(part):
        wrong = set(imported(path)) & {"cache", "pipeline", "cli", "tests", "benchmarks"}
        if module_name(path) not in FACES:
            found = {name for name in imported_modules(path) if name in MODULES and MODULES[name][0] != part}
            wrong |= {name for name in found if MODULES[name][0] not in ALLOWED[part] and name not in ALLOWED[part]}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("part", BEFORE)
def test_a_room_imports_only_what_stands_before_it(part):
    order = ["", *BEFORE[part]]
    for path in sources(part):
        name = module_name(path)
        if name in FACES or room(name)[1] == "":
            continue
        own = order.index(room(name)[1])
        for other in set(imported_modules(path)) & MODULES.keys():
            if room(other)[0] == part and room(other)[1] != room(name)[1]:
                assert 0 < order.index(room(other)[1]) < own, f"{path.relative_to(ROOT)} must not import {other}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported_modules(path)) & MODULES.keys() - {name} for name, (_, path) in MODULES.items()}
    # Raises CycleError with the modules of a circle.
    assert set(graphlib.TopologicalSorter(graph).static_order()) == MODULES.keys()


def test_only_the_command_line_says_options():
    """Below it a message names parameters, which `as_options` turns into options."""
    found = {path.relative_to(ROOT).as_posix(): list(options_said(path)) for p in PARTS for path in sources(p)}
    found = {path: said for path, said in found.items() if said and not path.startswith(SAY_OPTIONS)}
    # Options of Dask's own command.
    dask = found.pop("pipeline/scheduling/dask_cluster.py") + found.pop("pipeline/scheduling/pool.py")
    said = sorted(re.split("start (?:it|them|workers) with ", text)[1] for text in dask)
    assert said == ["--memory-limit 0", "--memory-limit 0", "--nthreads 1, which keeps sums in one order"]
    assert found == {}


def test_what_is_named_as_a_parameter_has_an_option():
    command = typer.main.get_command(app)
    below = [command, *(one for group in (command, *command.commands.values()) for one in commands_of(group))]
    options = {option for one in below for parameter in one.params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= options
    named = {
        name
        for part in PARTS
        for path in sources(part)
        if not path.as_posix().endswith("config/relations.py")
        for _, text in texts(path)
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", text)
    }
    assert "weights" in named
    assert named <= OPTIONS | PROGRAMS | ALIASES.keys() | {"overrides"}


def test_the_store_names_calls_and_no_command():
    """A message of it reaches people who have no `ezsd` to type; `as_options` makes commands of its calls."""
    said = [text for path in sources("cache") for _, text in texts(path)]
    assert [text for text in said if "`ezsd " in text or re.search("`(?:out|data_root|reuse)[`=]", text)] == []
    calls = {call for text in said for call in re.findall(r"`([\w.]+)\(", text)}
    assert calls == COMMANDS.keys()
    assert {name.partition(".")[0] for name in calls} <= set(ezsd.cache.__all__)


def commands_of(group):
    """Commands of a command that has any."""
    return getattr(group, "commands", {}).values()


def test_the_store_knows_no_learning_library():
    for path in sources("cache"):
        assert not set(imported(path)) & HEAVY, path.relative_to(ROOT)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_runs_code_out_of_data(part):
    found = [f"{path.relative_to(ROOT)}: {danger}" for path in sources(part) for danger in dangers(path)]
    assert found == []


@pytest.mark.parametrize("part", [*PARTS, "benchmarks"])
def test_one_module_reads_image_files(part):
    """Two readers have two rules: for orientation, for modes, for size."""
    found = {path.relative_to(ROOT).as_posix(): list(openings(path)) for path in sources(part)}
    # Frames of videos have no orientation, mode or size of an image file.
    assert found.pop("pipeline/data/video.py", ["imports cv2"]) == ["imports cv2"]
    reader = found.pop("pipeline/data/images.py", None)
    assert {path: places for path, places in found.items() if places} == {}
    assert (part == "pipeline") == bool(reader)


@pytest.mark.parametrize("part", PARTS)
def test_a_docstring_begins_with_a_phrase_of_its_own(part):
    found = [f"{path.relative_to(ROOT)}:{line}: {first}" for path in sources(part) for line, first in fragments(path)]
    assert sorted(found) == []


@pytest.mark.parametrize("use", ONCE)
def test_what_is_done_in_one_place_is_done_nowhere_else(use):
    found = {path.relative_to(ROOT).as_posix() for part in PARTS for path in sources(part) if use in once_only(path)}
    assert found == ONCE[use]


@pytest.mark.parametrize("part", ["pipeline", "cli"])
def test_the_work_reaches_the_store_by_its_face(part):
    files = {"COMMIT.json", "entry.json", "manifest.json", "zarr.json"}
    for path in sources(part):
        inner = [name for name in imported_modules(path) if name.startswith("ezsd.cache.")]
        named = [node.value for node in nodes(path) if isinstance(node, ast.Constant) and node.value in files]
        assert (inner, named) == ([], []), path.relative_to(ROOT)


def test_every_folder_is_a_package_and_every_part_lies_below_the_one_name():
    folders = {path.parent for part in PARTS for path in sources(part) if path.parent != ROOT}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    for part, name in (("cache", "cache"), ("pipeline", "pipeline"), ("cli", "cli.py")):
        assert (ROOT / "ezsd" / name).readlink() == Path("..") / name, part


def test_no_file_names_a_place_of_one_machine():
    found = {}
    for path in tracked():
        content = path.read_bytes()
        hits = PLACES.findall(content) + REGISTRIES.findall(content)
        if hits:
            found[path.relative_to(ROOT).as_posix()] = hits
    assert found == {}


# The checks themselves


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("def f():\n    import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load(p)", "torch.load"),
        ("import torch\ntorch.load(p, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(p, weights_only=flag)", "torch.load"),
        ("np.load(p, allow_pickle=True)", "allow_pickle"),
        ("np.load(p, allow_pickle=flag)", "allow_pickle"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("import importlib\nimportlib.import_module('dill')", "dill"),
    ],
)
def test_dangers_are_seen(code, danger, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(code)
    assert any(danger in found for found in dangers(tmp_path / "module.py"))


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('"""What is here."""', [1]),
        ('A = 1\n"""Of the file."""', [2]),
        ('class A:\n    b: int\n    """Whether it is."""', [3]),
        ('def f():\n    """See `A.f`."""', [2]),
        ('class B(A):\n    def f(self):\n        """See `A.f`."""', []),
        ('class B(A):\n    def f(self):\n        """See `C.f`."""', [3]),
        ('"""Offset of the file."""', []),
    ],
)
def test_a_docstring_that_cannot_stand_alone_is_seen(code, lines, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert [line for line, _ in fragments(tmp_path / "module.py")] == lines


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open(p)",
        "import PIL.Image\nPIL.Image.open(p)",
        "from PIL import ImageOps\nImageOps.exif_transpose(i)",
        "from torchvision.io import read_image",
        "from torchvision import io",
        "import cv2",
    ],
)
def test_readers_of_images_are_seen(code, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert list(openings(tmp_path / "module.py"))


@pytest.mark.parametrize(
    ("code", "use"),
    [
        ("import os\nos.fsync(f)", "os.fsync"),
        ("(folder / name).rename(target)", ".rename"),
        ("import os\nos.replace(a, b)", "os.replace"),
        ("import fcntl\nfcntl.lockf(f, fcntl.LOCK_EX)", "fcntl.lockf"),
        ("import hashlib\nhashlib.file_digest(f, 'sha256')", "hashlib.file_digest"),
        ("import json\njson.loads(path.read_text())", "json.loads"),
        ("import json\njson.dumps(value, separators=(',', ':'))", "json.dumps(separators)"),
    ],
)
def test_a_second_place_is_seen(code, use, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert use in list(once_only(tmp_path / "module.py"))


def test_harmless_code_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    code = "import torch\ntorch.load(p, weights_only=True)\nmodel.eval()\nnp.load(p, allow_pickle=False)\nf()()"
    (tmp_path / "module.py").write_text(code)
    assert list(dangers(tmp_path / "module.py")) == []


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
def test_places_of_a_machine_are_seen(folder):
    assert PLACES.search(f'path = "/{folder}/somebody"'.encode())
    assert not PLACES.search(f"https://example.org/{folder}/page and a/{folder}/b".encode())
