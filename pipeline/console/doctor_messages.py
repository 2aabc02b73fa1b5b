"""Output of `ezsd doctor`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from ezsd.errors import quantity
from ezsd.pipeline.doctor import Finding


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Each finding with its level and subject, its cure below it, and the numbers of problems and warnings."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<7}  {finding.subject:<{width}}  {finding.text}")
        if finding.cure:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.cure}")
    return [*lines, f"{_number(findings, 'problem')}, {_number(findings, 'warning')}"]


def _number(findings: Sequence[Finding], level: str) -> str:
    return quantity(sum(finding.level == level for finding in findings), level)


def findings_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)
