"""Hooks of mkdocs: the project's other pages join the site, and links to files that are no pages become text."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
JOINED = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
"""Pages outside docs/, with their places on the site."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors as code hosts do."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for source, place in JOINED.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to where their pages are on the site."""
    place = page.file.src_uri
    source = next((one for one, joined in JOINED.items() if joined == place), f"docs/{place}")

    def moved(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        on_site = JOINED.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if on_site is None:
            # Files of the project that are no pages; what is not there stays a broken link, which stops the build.
            return text if (ROOT / wanted).exists() else match[0]
        return f"{mark}[{text}]({posixpath.relpath(on_site, posixpath.dirname(place))}{hash_}{anchor})"

    return LINK.sub(moved, markdown)
