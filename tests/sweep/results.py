"""Sweep results made of numbers, without a model."""

import torch

from bkdfast.sweep import SweepResult

SHAPES = {
    ("layer", "head"): (3, 4),
    ("layer",): (5,),
    ("set",): (4,),
    ("layer", "position"): (3, 6),
    ("layer", "head", "position"): (3, 4, 2),
    ("set", "position"): (4, 2),
}
SETS = [[], [(3, 1)], [(4, 6), (4, 1)], [(0, 0), (2, 2), (2, 3)]]
COORDS = {
    ("set",): {"set": SETS},
    ("layer", "head", "position"): {"position": ["last_prompt", slice(1, 3)]},
    ("set", "position"): {"set": SETS, "position": [torch.tensor([1, 2]), -1]},
}


def make_result(dims=("layer", "head"), shape=None, coords=None, samples=7, left_out=True):
    g = torch.Generator().manual_seed(0)
    shape = shape or SHAPES[dims]
    effects = torch.randn(*shape, samples, generator=g)
    if left_out:
        effects.view(-1, samples)[1] = torch.nan
    return SweepResult(
        effects,
        torch.rand(samples, generator=g),
        "target probability",
        "Patch",
        1.25,
        {"family": "llama", "largest_error": 1e-7, "variants": 4},
        dims,
        COORDS.get(dims, {}) if coords is None else coords,
        {"weights": {"hash": "ab"}, "seed": 0, "units": [[0, 1], [2]]},
    )
