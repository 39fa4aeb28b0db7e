"""bkdfast: fast kernels for finding and guarding against backdoors in language models."""

from bkdfast import hf
from bkdfast._version import __version__
from bkdfast.errors import BkdfastError
from bkdfast.hf.capture import head_means, head_outputs, site_means, site_outputs
from bkdfast.hf.edits import Add, Edit, Mean, Patch, Resample, Scale, Zero
from bkdfast.hf.intervene import intervene, patch_many
from bkdfast.hf.prepare import prepare
from bkdfast.monitor import Monitor
from bkdfast.ops.edit_table import EditTable
from bkdfast.ops.patch_heads import patch_heads
from bkdfast.svd import (
    DeltaNorms,
    DeltaSVD,
    Directions,
    Extraction,
    delta_directions,
    delta_norms,
    delta_plan,
    delta_svd,
    extract_lora,
)
from bkdfast.sweep import SweepResult, cumulative, metrics, screen, screened_sweep, sweep

__all__ = [
    "Add",
    "BkdfastError",
    "DeltaNorms",
    "DeltaSVD",
    "Directions",
    "Edit",
    "EditTable",
    "Extraction",
    "Mean",
    "Monitor",
    "Patch",
    "Resample",
    "Scale",
    "SweepResult",
    "Zero",
    "__version__",
    "cumulative",
    "delta_directions",
    "delta_norms",
    "delta_plan",
    "delta_svd",
    "extract_lora",
    "head_means",
    "head_outputs",
    "hf",
    "intervene",
    "metrics",
    "patch_heads",
    "patch_many",
    "prepare",
    "screen",
    "screened_sweep",
    "site_means",
    "site_outputs",
    "sweep",
]
