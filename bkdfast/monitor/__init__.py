"""Streaming cosine-to-singular-vector monitoring of a running model."""

from bkdfast.monitor.monitor import Monitor
from bkdfast.monitor.ranges import Observations, Ranges, Verdict

__all__ = ["Monitor", "Observations", "Ranges", "Verdict"]
