"""Audit of a run or a store: boxes and names that entered each stage, and the proof that no novel box did."""

from ezsd.pipeline.audit.audit import AuditRequest, AuditResult, audit
from ezsd.pipeline.audit.findings import Finding, NamedBox, Setting

__all__ = ["AuditRequest", "AuditResult", "Finding", "NamedBox", "Setting", "audit"]
