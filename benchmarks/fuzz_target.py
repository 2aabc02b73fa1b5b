"""One target of `benchmarks/fuzz.py` under atheris, in a process of its own; it ends when its seconds are over.

A finding is kept and does not end it: its input as FOLDER/findings/SIGNATURE, and what was raised as SIGNATURE.txt.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from pathlib import Path

_INSTRUMENTED = ("ezsd", "PIL", "tomllib", "json")
"""Packages whose branches guide: ezsd, and the parsers in Python below it."""
_LARGEST = 2**22
"""Bytes of an input."""


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="corpus, findings and scene; a second call goes on")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--hang-seconds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    import atheris

    # What was imported before would not guide.
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        from tests.fuzz.guard import Finding
        from tests.fuzz.targets import BY_NAME
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    folder: Path = arguments.folder
    target = BY_NAME[arguments.target](folder / "work")
    corpus, findings = folder / "corpus", folder / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    for number, data in enumerate(target.inputs()):
        (corpus / f"sound-{number:03}").write_bytes(data)

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except Finding as finding:
            kept = findings / finding.signature
            if not kept.exists():
                kept.write_bytes(data)
                kept.with_name(f"{kept.name}.txt").write_text(f"{finding}\n{finding.trace}", "utf-8", "replace")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        # Bytewise now and then: libFuzzer knows what was compared with what.
        changed = atheris.Mutate(data, most) if chance.random() < 0.25 else target.change(bytes(data), chance)
        return bytes(changed)[:most]

    options = {
        "max_total_time": arguments.seconds,
        "timeout": arguments.hang_seconds,
        # By the clock, and so also of a disk that is slow: what takes a processor too long is found in `watched`.
        "report_slow_units": arguments.hang_seconds,
        "rss_limit_mb": 6144,
        "max_len": _LARGEST,
        "seed": arguments.seed,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/ended-",
        "detect_leaks": 0,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
