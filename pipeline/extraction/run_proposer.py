"""Proposal network of a finished run, for a build that trains none."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ezsd.adapt import flatten
from ezsd.pipeline.config.schema import ProposerConfig
from ezsd.pipeline.errors import ConfigError, RunError
from ezsd.pipeline.extraction.proposer import make_proposer, proposer_state, values_digest
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.runs.model import require_same_body
from ezsd.pipeline.runs.run import Run
from ezsd.vocabulary import Split, canonical, first_few

log = logging.getLogger("ezsd")

NETWORK = ("backbone", "weights", "fpn_channels", "rpn_sizes", "min_size", "max_size")
"""Settings of [proposer] that a run decides."""
DIGEST = "sha256:"
"""Beginning of a setting that has the digest of a file, or of a run's network, instead of its place."""
_NAMED = 5
"""Most class names in one line."""


def with_run_network(request: BuildRequest) -> BuildRequest:
    """Take the settings of the network of `proposer.run` into [proposer]; a request without a run stays as it is.

    Raises:
        ConfigError: there is no run, or it has learned boxes of novel classes.
        RunError: its training is not finished, or another version made it.
    """
    config = request.config
    if not config.proposals.learned or config.proposer.run is None:
        return request
    run = _open(config.proposer.run)
    run.finished()
    _require_base_boxes(run, request.dataset.split)
    own, weights = run.config, run.spec.get("backbone_weights")
    network = dataclasses.replace(
        config.proposer,
        backbone=own.model.backbone,
        # Its presence alone matters: normalisation is frozen then.
        weights=None if weights is None else f"{DIGEST}{weights}",
        fpn_channels=own.model.fpn_channels,
        rpn_sizes=own.model.rpn_sizes,
        min_size=own.train.min_size,
        max_size=own.train.max_size,
    )
    return dataclasses.replace(request, config=dataclasses.replace(config, proposer=network))


def run_proposer(config: ProposerConfig) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Read the backbone and the proposal network of the last checkpoint of `proposer.run`.

    Args:
        config: with the run's settings, see `with_run_network`.

    Returns:
        State (K,), and attributes for the store: parameter table and steps.

    Raises:
        ConfigError: there is no run.
        RunError: its training is not finished, or another version made it.
    """
    run = _open(str(config.run))
    checkpoint = run.finished()
    proposer = make_proposer(config, pretrained=False)
    require_same_body(run, proposer.backbone)
    state = checkpoint.model()
    try:
        proposer.load_state_dict({name: state[name] for name in proposer.state_dict()})
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"`proposer.run={run.folder}`: its checkpoint has no network of its settings ({reason}); give another run"
        ) from error
    values, table = flatten(proposer_state(proposer))
    return values, {"parameters": table, "steps": checkpoint.step}


def run_digest(config: ProposerConfig) -> str:
    """Sha256 of the values of `run_proposer`, which a store is known by."""
    return values_digest(run_proposer(config)[0])


def _open(folder: str) -> Run:
    if folder.startswith(DIGEST):
        raise ConfigError(
            "the run whose proposal network the store has lost is gone, or has another one now; put it back where the "
            "store's environment.json says, or build the store anew in another folder"
        )
    if not (Path(folder) / "run.json").is_file():
        raise ConfigError(
            f"`proposer.run={folder}`: no run here (run.json is missing); give the folder of a finished `ezsd train`"
        )
    return Run.open(Path(folder))


def _require_base_boxes(run: Run, split: Split) -> None:
    """Raise ConfigError for a run that learned from boxes of novel classes; warn of base classes that are none here."""
    names, count = run.spec["names"], run.spec["base_count"]
    assert isinstance(names, list)
    assert isinstance(count, int)
    base, novel = ({canonical(name) for name in part} for part in (split.base, split.novel))
    learned = [canonical(name) for name in names[:count]]
    leaked = [name for name in learned if name in novel]
    if leaked:
        raise ConfigError(
            f"`proposer.run={run.folder}`: has learned from boxes of {first_few(leaked, _NAMED)}, novel in this split, "
            "and novel boxes must not make a store; give a run that was trained on the same split"
        )
    strange = [name for name in learned if name not in base]
    if strange:
        log.warning(
            "`proposer.run=%s`: has learned from boxes of %s, which are not among the names of this split; make sure "
            "that none of them means a novel class",
            run.folder,
            first_few(strange, _NAMED),
        )
