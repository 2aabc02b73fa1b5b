"""Settings that a trained run may be looked through with: `--set` of `ezsd eval` and `ezsd detect`."""

from __future__ import annotations

from collections.abc import Sequence

from ezsd.pipeline.config.names import hint
from ezsd.pipeline.config.schema import Config, apply_override, from_tables, setting_of, to_tables
from ezsd.pipeline.errors import ConfigError

TEST_TIME = (
    "model.box_class",
    "model.box_top_k",
    "model.masks",
    "eval.score_threshold",
    "eval.nms_iou",
    "eval.max_detections",
    "train.backend",
)
"""What no weight depends on. `ezsd eval` takes all but eval.max_detections, see its `KEEP`."""


def at_test_time(config: Config, overrides: Sequence[str]) -> Config:
    """A run's configuration with some of `TEST_TIME` changed by `section.key=value`.

    Raises:
        ConfigError: another setting, which training has used, or a value that does not fit.
    """
    tables = to_tables(config)
    for override in overrides:
        key = setting_of(override)
        section, _, name = key.partition(".")
        if section in tables and name not in tables[section]:
            known = list(tables[section])
            raise ConfigError(f"`overrides` {override}: unknown key {name!r}; {hint(section, name, known)}")
        apply_override(tables, override)
        if key not in TEST_TIME:
            raise ConfigError(
                f"`overrides` {override}: {key} cannot be changed once a run is trained; what can is "
                f"{', '.join(TEST_TIME)}"
            )
    return from_tables(tables, where="`overrides`")


def changed_settings(overrides: Sequence[str], config: Config) -> dict[str, object]:
    """The settings that overrides name, with the values that they have now."""
    tables = to_tables(config)
    keys = [setting_of(override) for override in overrides]
    return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in keys}
