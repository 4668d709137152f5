"""The audit: what a client's updates give away, and why."""

from invlib.auditing.presend import Presend, Way

__all__ = ["Presend", "Way"]
