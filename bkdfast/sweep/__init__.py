"""Sweeps: one number per variant and sample, from as few model flops as the algebra allows."""

from bkdfast.sweep import metrics
from bkdfast.sweep.cumulative import CumulativeCurve, cumulative
from bkdfast.sweep.engine import sweep
from bkdfast.sweep.result import SweepResult
from bkdfast.sweep.screen import Screening, screen
from bkdfast.sweep.screened import ScreenedSweep, screened_sweep

__all__ = [
    "CumulativeCurve",
    "ScreenedSweep",
    "Screening",
    "SweepResult",
    "cumulative",
    "metrics",
    "screen",
    "screened_sweep",
    "sweep",
]
