"""Output of `ezsd audit`."""

from __future__ import annotations

import json

from ezsd.pipeline.audit import AuditResult

_NAMED = 10
"""Most boxes listed below a finding; `--json` has more."""


def audit_lines(result: AuditResult) -> list[str]:
    """Each finding with its level and subject, the boxes that it names below it, and the verdict."""
    width = max(len(finding.subject) for finding in result.findings)
    lines = []
    for finding in result.findings:
        lines.append(f"{finding.level:<9}  {finding.subject:<{width}}  {finding.text}")
        lines += [f"{'':<9}  {'':<{width}}  - {named}" for named in finding.named[:_NAMED]]
        more = len(finding.named) - _NAMED
        if more > 0:
            lines.append(f"{'':<9}  {'':<{width}}  - {more} more")
    return [*lines, f"{result.name}, {result.setting}: {result.summary}"]


def audit_json(result: AuditResult) -> str:
    """The result as a JSON document."""
    return json.dumps(result.document(), indent=1)
