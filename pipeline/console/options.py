"""Options of the command line, said where a message names parameters."""

import logging
import re
import shlex
import typing
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

OPTIONS = frozenset(
    [
        *("accept_store", "activation", "annotations", "backbone_weights", "base", "blocks", "cache", "classes"),
        *("class_threshold", "template"),
        *("compare", "copy", "corners", "dashboard", "data_root", "dataset", "detections", "device", "format", "limit"),
        *(
            "max_detections",
            "names",
            "novel",
            "out",
            "port",
            "reuse",
            "root",
            "run",
            "scheduler",
            "split",
            "split_file",
        ),
        *("teacher", "val", "wait_for_workers", "weights", "workers"),
    ]
)
"""Parameters whose options have their names."""

ALIASES = {"path": "out", "source": "data_root"}
"""Options of parameters of `ezsd.cache` that have another name there."""
COMMANDS = {
    "StoreWriter.open": "ezsd cache build",
    **{name: f"ezsd cache {name}" for name in ("info", "pull", "push", "repair", "verify")},
}
"""Commands that do what these calls of `ezsd.cache` do."""
_GIVEN = {"": "", "...": "", "deep=True": "--deep", "NEW_FOLDER, ...": "--out NEW_FOLDER"}
"""Arguments of such calls without a path or URL, as the command takes them."""
_PLACE = re.compile(r"(?P<before>STORE, )?(?P<place>.*?)(?P<after>, DIR|, source)?", re.DOTALL)
"""Arguments with one."""
_AFTER = {", DIR": " DIR", ", source": " --data-root DIR", None: ""}

_WRITER = "the program that wrote the store"
"""Name for what builds and computes again a store of another schema than ezsd's own, which no command does."""

# Alone between spaces or punctuation, so that backticks in a quoted name or in a path stay as they are.
_CALL = re.compile(
    rf"(?<![^\s(])(?P<same>the same )?`(?P<call>{'|'.join(map(re.escape, COMMANDS))})\((?P<given>[^`]*)\)`"
    r"(?=[,.:;?)]*(?:\s|$))"
)
_PARAMETER = re.compile(
    r"(?<![^\s(])`(?:(?P<setting>[a-z]+\.[a-z_0-9]+)(?P<to>=[^`]*)?"
    r"|(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?)`(?=[,.:;?)]*(?:\s|$))"
)


def as_options(message: str) -> str:
    """A message as the command line says it.

    Below the command line a message names a parameter in backticks, alone or with its value, and a setting likewise:
    "`weights=FILE`" becomes "--weights FILE", "`overrides`" becomes "--set", "`train.steps=9`" becomes
    "--set train.steps=9". The store is a library and names its calls: "`repair(/a/store)`" becomes
    "`ezsd cache repair /a/store`". No command builds or computes again a store of another schema than ezsd's own: where
    a message begins with the path of one, "`StoreWriter.open(...)`" becomes "the program that wrote the store". Paths
    are quoted for a shell. What else stands in backticks, such as a command, stays.
    """
    return _CALL.sub(partial(_command, message), _PARAMETER.sub(_option, message))


def _command(message: str, found: re.Match[str]) -> str:
    call, given = found["call"], found["given"]
    # With a path alone, `repair` mends what any store holds twice.
    of_regions = call == "StoreWriter.open" or (call == "repair" and (not given or given.endswith(", source")))
    if of_regions and _is_of_another_schema(message):
        return _WRITER
    return f"{found['same'] or ''}`{f'{COMMANDS[call]} {_arguments(given)}'.rstrip()}`"


def _arguments(given: str) -> str:
    """Arguments of a call as a shell takes them."""
    if given in _GIVEN:
        return _GIVEN[given]
    found = _PLACE.fullmatch(given)
    assert found is not None
    before = "STORE " if found["before"] else ""
    return f"{before}{shlex.quote(found['place'])}{_AFTER[found['after']]}"


def _is_of_another_schema(message: str) -> bool:
    """True if the store, or the file of a store, that a message begins with is of another schema than ezsd's own."""
    from ezsd.cache import records_schema

    places = (Path(message[: colon.start()]) for colon in re.finditer(": ", message))
    return any(records_schema(folder) for place in places for folder in (place, *place.parents))


@cache
def _settings() -> frozenset[str]:
    # Loaded when a message needs it: the command line has to be quick until then.
    from ezsd.pipeline.config.schema import Config

    sections = typing.get_type_hints(Config)
    return frozenset(f"{name}.{entry.name}" for name, section in sections.items() for entry in fields(section))


def _option(found: re.Match[str]) -> str:
    if found["setting"] is not None:
        return f"--set {found['setting']}{found['to'] or ''}" if found["setting"] in _settings() else found[0]
    name = ALIASES.get(found["name"], found["name"])
    if name not in OPTIONS and name != "overrides":
        return found[0]
    option = "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
    return option if found["value"] is None else f"{option} {shlex.quote(found['value'])}"


class OptionFormatter(logging.Formatter):
    """Lines of the log as the command line says them."""

    def format(self, record: logging.LogRecord) -> str:
        """The message alone, see `as_options`."""
        return as_options(super().format(record))
