"""Options of the command line, said where a message names parameters."""

import logging
import re
import typing
from dataclasses import fields
from functools import cache

OPTIONS = frozenset(
    [
        *("accept_store", "activation", "annotations", "backbone_weights", "base", "blocks", "cache", "classes"),
        *("class_threshold", "template"),
        *("compare", "copy", "corners", "dashboard", "data_root", "dataset", "detections", "device", "format", "limit"),
        *("max_detections", "names", "novel", "out", "reuse", "root", "run", "scheduler", "split", "split_file"),
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
_ARGUMENTS = (
    (re.compile("^deep=True$"), "--deep"),
    (re.compile("^NEW_FOLDER, [.]{3}$"), "--out NEW_FOLDER"),
    (re.compile("^[.]{3}$"), ""),
    (re.compile("^STORE, "), "STORE "),
    (re.compile(", DIR$"), " DIR"),
    (re.compile(", source$"), " --data-root DIR"),
)
"""Arguments of such calls, as the command takes them; a path or URL stays."""

# Alone between spaces or punctuation, so that backticks in a quoted name or in a path stay as they are.
_CALL = re.compile(
    rf"(?<![^\s(])`(?P<call>{'|'.join(map(re.escape, COMMANDS))})\((?P<given>[^`]*)\)`(?=[,.:;?)]*(?:\s|$))"
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
    "`ezsd cache repair /a/store`". What else stands in backticks, such as a command, stays.
    """
    return _CALL.sub(_command, _PARAMETER.sub(_option, message))


def _command(found: re.Match[str]) -> str:
    given = found["given"]
    for pattern, said in _ARGUMENTS:
        given = pattern.sub(said, given)
    return f"`{COMMANDS[found['call']]} {given}".rstrip() + "`"


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
    return option if found["value"] is None else f"{option} {found['value']}"


class OptionFormatter(logging.Formatter):
    """Lines of the log as the command line says them."""

    def format(self, record: logging.LogRecord) -> str:
        """The message alone, see `as_options`."""
        return as_options(super().format(record))
