"""Singular vectors of weight deltas, streamed from two models or checkpoints, and the monitor directions they give."""

from bkdfast.svd.delta import delta_plan, delta_svd
from bkdfast.svd.directions import Directions, delta_directions
from bkdfast.svd.extract import Extraction, extract_lora
from bkdfast.svd.names import weights_hash
from bkdfast.svd.norms import DeltaNorms, TensorNorm, delta_norms
from bkdfast.svd.plan import DeltaPlan
from bkdfast.svd.result import DeltaSVD, TensorDelta

__all__ = [
    "DeltaNorms",
    "DeltaPlan",
    "DeltaSVD",
    "Directions",
    "Extraction",
    "TensorDelta",
    "TensorNorm",
    "delta_directions",
    "delta_norms",
    "delta_plan",
    "delta_svd",
    "extract_lora",
    "weights_hash",
]
