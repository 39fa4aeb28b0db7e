"""Hashes of tensors and text: the first 32 hex digits of SHA-256, the same on every device and in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

SAMPLE = 4096
"""Elements of each tensor in the sample."""


def hash_tensors(tensors: Mapping[str, torch.Tensor], *, sampled: bool = False) -> str:
    """Hash of names, dtypes, shapes and values.

    Args:
        tensors: any tensors, on any devices; views of a part are fine.
        sampled: of large tensors, take the sum of their bits, as 64-bit integers, and a fixed sample of `SAMPLE`
            elements, which needs one read on their own device.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if sampled and tensor.numel() > 16 * SAMPLE:
            digest.update(str(_bit_sum(tensor)).encode())
            tensor = _sample(tensor)
        digest.update(_bytes(tensor.cpu()).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:32]


def hash_text(text: str) -> str:
    """First 32 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _bit_sum(tensor: torch.Tensor) -> int:
    """The tensor's bytes as 64-bit integers, added up modulo 2^64: any single change shows, in one read."""
    data = _bytes(tensor)
    if data.storage_offset() % 8:
        data = data.clone()
    words = len(data) // 8 * 8
    return int(data[:words].view(torch.int64).sum()) + int(data[words:].sum())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Elements at fixed places; multiples of the golden ratio never keep to one column of a matrix."""
    flat = tensor.contiguous().reshape(-1)
    at = (torch.arange(1, SAMPLE + 1, dtype=torch.float64) * 0.6180339887498949).frac() * len(flat)
    return flat[at.long().clamp(max=len(flat) - 1).to(flat.device)]
