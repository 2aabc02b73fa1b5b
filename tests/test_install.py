"""What pip installs: one name, which nothing of a user's own can stand in for."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def run(*words, cwd):
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in words]
    return subprocess.run(words, cwd=cwd, env=here, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from an sdist, as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    wanted = ["ezsd", "cache", "pipeline", "cli.py", "pyproject.toml", "README.md", "LICENSE"]
    for name in run(*listed, *wanted, cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    build = "import sys, setuptools.build_meta as b; print(b.build_{0}(sys.argv[1]))"
    run(sys.executable, "-c", build.format("sdist"), folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    run("tar", "-xf", archive, "-C", folder, cwd=folder)
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-c", build.format("wheel"), folder, cwd=unpacked)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_one_package_and_every_file_of_it(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"ezsd"}
    parts = {"ezsd": ROOT / "ezsd", "ezsd/cache": ROOT / "cache", "ezsd/pipeline": ROOT / "pipeline"}
    wanted = {
        f"{part}/{path.relative_to(folder).as_posix()}"
        for part, folder in parts.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if part == "ezsd" or path.suffix in (".py", ".toml", ".j2", ".html", ".js", ".svg")
    }
    assert names == wanted


def test_a_release_is_described_alike_in_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        described = email.message_from_bytes(archive.read(name))
    assert wheel.name.startswith(f"ezsd-{described['Version']}-")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["authors"]) == (described["Version"], [{"name": described["Author"]}])
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] in (described["Version"], "Unreleased")
    assert described["License-Expression"] == citation["license"]
    assert "zero-shot detection" in described["Keywords"]


def test_an_installed_ezsd_meets_a_users_own_files_of_its_parts_names(wheel, tmp_path):
    """In a fresh environment, whose other packages are those of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    for name in ("cache", "pipeline"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise SystemExit('the user's own')\n")
    for name in ("cli.py", "errors.py", "pipeline.py", "cache.py"):
        (work / name).write_text("raise SystemExit('the user's own')\n")
    where = "import ezsd, ezsd.cli, ezsd.cache, ezsd.pipeline; print(ezsd.__file__)"
    assert run(python, "-c", where, cwd=work).strip() == str(site / "ezsd/__init__.py")
    assert run(python, "-m", "ezsd", "--version", cwd=work).startswith("ezsd 0.")
    assert "cache build" in run(python, "-m", "ezsd", "cache", "build", "-h", cwd=work)
    made = run(python, "-m", "ezsd", "data", "shapes", "--out", "shapes", "--train", 2, "--val", 1, cwd=work)
    assert "2 training" in made
    assert "train" in run(
        python, "-m", "ezsd", "data", "check", "--dataset", "shapes", "--data-root", "shapes", cwd=work
    )
