"""Probe."""
from ezsd.pipeline.audit import AuditRequest, audit
from ezsd.pipeline.console.audit_messages import audit_lines

def test_probe(shapes_run, shapes_store):
    for target in (shapes_run.folder, shapes_store):
        for setting in ("zad", "ovd-strict"):
            print("\n".join(audit_lines(audit(AuditRequest(target=str(target), setting=setting)))))
            print()
    print((shapes_run.folder / "card.md").read_text())
