"""Pages of docs/ that are made from the code: `python -m tests.docskit` writes them anew."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from functools import cached_property
from pathlib import Path

import ezsd
from ezsd.detector.settings import DetectorSettings
from ezsd.pipeline.config.schema import Config, load_preset, preset_names
from ezsd.pipeline.inference.detect import Detection, ImageDetections, Model

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pipeline/config/schema.py", "ezsd/detector/settings.py")
MADE = "<!-- Made from the code by `python -m tests.docskit`; do not edit. -->"


def settings_page():
    """docs/all-settings.md: every setting with its values, its value in the presets, and its docstring."""
    meanings = {}
    for source in SOURCES:
        for node in ast.parse((ROOT / source).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                meanings[node.name] = dict(_documented(node.body))
    presets = {name: load_preset(name) for name in sorted(preset_names())}
    lines = ["# All settings", "", MADE, ""]
    lines += [
        "`--set section.key=value` changes one; [settings.md](settings.md) lists those that depend on each other.",
        "Sections `teacher`, `adapt`, `proposals`, `proposer` and `build` belong to the store (`ezsd cache build`),",
        "`model`, `loss` and `train` to the run (`ezsd train`), `eval` to `ezsd eval` and `ezsd detect`. A value is",
        f"that of every preset, or the presets are named: {', '.join(f'`{name}`' for name in presets)}.",
    ]
    for section in dataclasses.fields(Config):
        of = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(of, include_extras=True)
        told = meanings[of.__name__] | (meanings[DetectorSettings.__name__] if issubclass(of, DetectorSettings) else {})
        lines += [
            "",
            f"## {section.name}",
            "",
            of.__doc__,
            "",
            "| setting | values | presets | meaning |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(of):
            values = {name: getattr(getattr(preset, section.name), field.name) for name, preset in presets.items()}
            cells = [f"`{field.name}`", _values(hints[field.name]), _presets(values), told[field.name]]
            lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _documented(body):
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield node.target.id, after.value.value


def _values(hint):
    """A type as a reader would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [_bound(one) for one in arguments[1:]]
        return " ".join([_values(arguments[0]), *filter(None, bounds)])
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(one) for one in arguments)
    if origin is tuple:
        return f"list of {_values(arguments[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "nothing"}
    return names[hint]


def _bound(one):
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{sign} {getattr(one, key)}" for key, sign in signs.items() if getattr(one, key, None) is not None]
    return " and ".join(found)


def _presets(values):
    by_value = {}
    for name, value in values.items():
        by_value.setdefault(_toml(value), []).append(name)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in by_value.items())


def _toml(value):
    if value is None:
        return "none"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def python_page():
    """docs/python.md: the public names with their signatures and docstrings."""
    lines = ["# Python", "", MADE, ""]
    lines += [
        "`import ezsd` loads nothing heavy: each name below is loaded when it is first used. Signatures stay as they",
        "are within a version 0.x; everything else may change. [README](../README.md#from-python) has an example,",
        "[quickstart.ipynb](quickstart.ipynb) is a notebook, and [store-library.md](store-library.md) describes",
        "`ezsd.cache`.",
    ]
    for name in sorted(ezsd.__all__):
        lines += ["", f"## ezsd.{name}", "", *_described(getattr(ezsd, name), f"ezsd.{name}")]
    lines += ["", "## What a call of a model takes", "", *_described(Model.__call__, "model")]
    for kind in (ImageDetections, Detection):
        lines += ["", f"## {kind.__name__}", "", *_prose(kind.__doc__), "", *_attributes(kind)]
    return "\n".join(lines) + "\n"


def _described(thing, name):
    if isinstance(thing, type) and issubclass(thing, Exception):
        return _prose(thing.__doc__)
    said = (
        re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", str(inspect.signature(thing)))
        .replace("(self, ", "(")
        .removesuffix(" -> None")
    )
    lines = [
        "```text",
        *textwrap.wrap(f"{name}{said}", 120, subsequent_indent="    "),
        "```",
        "",
        *_prose(thing.__doc__),
    ]
    if isinstance(thing, type):
        lines += ["", *_attributes(thing)]
    return lines


def _attributes(kind):
    """Lines of a list: public properties and methods, and fields of a data class."""
    told = {}
    if dataclasses.is_dataclass(kind):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        documented = dict(_documented(body))
        told = {field.name: documented.get(field.name, "") for field in dataclasses.fields(kind)}
    for name, member in vars(kind).items():
        if not name.startswith("_") and (isinstance(member, property | cached_property) or inspect.isfunction(member)):
            call = "()" if inspect.isfunction(member) else ""
            told[f"{name}{call}"] = (member.__doc__ or "").split("\n\n")[0]
    found = [f"- `{name}`" + (f": {' '.join(said.split())}" if said else "") for name, said in told.items()]
    return ["**Attributes**", "", *found]


def _prose(docstring):
    """A docstring in Markdown: its sections become lists."""
    lines, in_code = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        in_code ^= line.startswith("```")
        if in_code:
            lines.append(line)
            continue
        header = re.fullmatch(r"(Args|Returns|Raises):", line)
        if header:
            lines += [f"**{header[1]}**", ""]
        elif re.match(r" {4}\w+: ", line):
            name, _, said = line.strip().partition(": ")
            lines.append(f"- `{name}`: {said}")
        elif line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip())
    return lines


PAGES = {"docs/all-settings.md": settings_page, "docs/python.md": python_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (ROOT / page).write_text(make(), encoding="utf-8")
