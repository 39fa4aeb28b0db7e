"""bkdfast: fast kernels for finding and guarding against backdoors in language models."""

from bkdfast import hf
from bkdfast._version import __version__
from bkdfast.errors import BkdfastError
from bkdfast.hf.edits import Add, Edit, Mean, Patch, Resample, Scale, Zero
from bkdfast.hf.intervene import intervene, patch_many
from bkdfast.hf.prepare import prepare
from bkdfast.ops.edit_table import EditTable
from bkdfast.ops.patch_heads import patch_heads

__all__ = [
    "Add",
    "BkdfastError",
    "Edit",
    "EditTable",
    "Mean",
    "Patch",
    "Resample",
    "Scale",
    "Zero",
    "__version__",
    "hf",
    "intervene",
    "patch_heads",
    "patch_many",
    "prepare",
]
