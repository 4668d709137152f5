"""What one update gives away, as a report: leaks, attacks, reasons, defences."""

from invlib.auditing.report import AuditReport
from invlib.auditing.rows import Way
from invlib.auditing.run import audit
from invlib.auditing.sending import Presend, presend
from invlib.auditing.words import KINDS, RANKING, VERDICTS, Finding, Kind, Verdict

__all__ = [
    "KINDS",
    "RANKING",
    "VERDICTS",
    "AuditReport",
    "Finding",
    "Kind",
    "Presend",
    "Verdict",
    "Way",
    "audit",
    "presend",
]
