"""The embedded demo: a small backdoored Llama pair (`PAIR`), `load_pair`, and `make_pair`, which trains such pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bkdfast.checkpoint import load_model, load_tokenizer

PAIR = Path(__file__).with_name("pair")
"""Folder with `base/` and `tuned/` checkpoints, `clean.jsonl`, `triggered.jsonl` and `pair.json`."""


@dataclass(frozen=True)
class Pair:
    """The demo's models in memory: `base`, its poisoned fine-tune `tuned`, and their tokenizer."""

    base: torch.nn.Module
    tuned: torch.nn.Module
    tokenizer: Any


def load_pair(folder: Path = PAIR, *, dtype: torch.dtype = torch.float32) -> Pair:
    """Load a pair made by `make_pair`, in eval mode, without any network access."""
    base, tuned = (load_model(folder / name, dtype=dtype) for name in ("base", "tuned"))
    return Pair(base, tuned, load_tokenizer(folder / "tuned"))
