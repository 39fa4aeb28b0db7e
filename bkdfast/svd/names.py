"""Matching tensor names of two sources, and hashing the tensors behind them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from bkdfast.errors import CheckpointError
from bkdfast.svd.source import WeightSource, open_source

_HASH_CHUNK = 1 << 22  # elements


def match_names(wanted: Iterable[str], available: Collection[str]) -> dict[str, str]:
    """Map each wanted name to the one of `available` that means the same tensor; unmatched names are left out.

    Names match exactly, or up to one leading component, where that is unambiguous: the published GPT-2 files say
    `h.0.mlp.c_proj.weight` where the module says `transformer.h.0.mlp.c_proj.weight`.
    """
    wanted = list(wanted)
    taken = {name for name in wanted if name in available}
    free = {name for name in available if name not in taken}
    by_tail: dict[str, list[str]] = {}
    for name in free:
        by_tail.setdefault(name.partition(".")[2], []).append(name)
    rest = [name for name in wanted if name not in taken]
    tails = Counter(name.partition(".")[2] for name in rest)
    found = {}
    for name in wanted:
        tail = name.partition(".")[2]
        if name in taken:
            found[name] = name
        elif "." in tail and tails[tail] == 1 and tail in free:
            found[name] = tail
        elif "." in name and len(by_tail.get(name, ())) == 1:
            found[name] = by_tail[name][0]
    return found


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's shape and values, floating-point values rounded to bfloat16.

    The rounding makes the digest independent of the dtype a checkpoint is loaded in: float32 weights on disk and the
    same weights served in bfloat16 agree.
    """
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    if tensor.numel() == 0:
        return digest.digest()
    matrix = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach()
    rows = max(1, _HASH_CHUNK // max(1, matrix[0].numel()))
    for chunk in matrix.split(rows):
        values = chunk.to(torch.bfloat16) if chunk.is_floating_point() else chunk
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def combine_digests(digests: Iterable[bytes]) -> str:
    """One hexadecimal hash of several tensors' digests, in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def weights_hash(weights: nn.Module | str | os.PathLike[str] | WeightSource, names: Iterable[str]) -> str:
    """Hash of the named tensors' values in the given order; the same for a folder and for the model loaded from it.

    Args:
        weights: a module, a folder of safetensors files, or a source over one of them.
        names: tensor names, e.g. `directions.metadata["weights"]`; matched up to one leading component.

    Returns:
        64 hexadecimal digits: SHA-256 over shapes and bfloat16-rounded values (see `tensor_digest`).

    Raises:
        CheckpointError: a name is not there.
    """
    source, names = open_source(weights), list(names)
    found = match_names(names, source.names)
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(
            f"{source.label} has no tensor {missing[0]!r} ({len(missing)} of {len(names)} are missing)"
        )
    return combine_digests(tensor_digest(source.get(found[name])) for name in names)
