"""Sweeps: one number per variant and sample, from as few model flops as the algebra allows."""

from bkdfast.sweep import metrics
from bkdfast.sweep.engine import sweep
from bkdfast.sweep.result import SweepResult

__all__ = ["SweepResult", "metrics", "sweep"]
