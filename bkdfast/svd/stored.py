"""Finished tensors of a delta SVD as units of a result store (`bkdfast.jobs`), each with what it was computed from.

A unit keeps the digests of its two tensors and the stamps of the files they were read from. A run that goes on compares
the stamps, which costs nothing; where one differs (the checkpoint was copied, or is another one), it reads the two
tensors again and compares the digests. Results of other inputs are so refused without a read of everything at every
start.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError
from bkdfast.jobs.hashing import hash_text
from bkdfast.jobs.store import Store
from bkdfast.svd.artifact import versions
from bkdfast.svd.lora import AdapterSource
from bkdfast.svd.names import tensor_digest
from bkdfast.svd.plan import DeltaPlan, Item
from bkdfast.svd.result import PARTS, SCALARS, TensorDelta
from bkdfast.svd.source import WeightSource
from bkdfast.svd.stream import load_pair

_FACTS = "facts"


def open_store(
    out: str | os.PathLike[str],
    plan: DeltaPlan,
    order: list[int],
    sources: tuple[WeightSource, WeightSource],
    settings: dict[str, Any],
    device: str,
    *,
    resume: bool,
) -> Store:
    """The store of a delta SVD in a folder; unit i is `plan.items[order[i]]`.

    Raises:
        InvalidArgumentError: the folder holds something else, or the results of other models or settings.
        StoreError: it cannot be written or read.
    """
    sides = {}
    for side, source, names in (
        ("base", sources[0], [item.base for item in plan.items]),
        ("tuned", sources[1], [item.tuned for item in plan.items]),
    ):
        told = [[name, source.shape(name), str(source.dtype(name))] for name in dict.fromkeys(names)]
        sides[side] = {"tensors": len(told), "header": hash_text(json.dumps(told))}
    units = [[item.name, item.base, item.start, item.stop] for item in (plan.items[i] for i in order)]
    manifest = {
        "kind": "delta_svd",
        **sides,
        "settings": settings,
        "units": {"number": len(units), "hash": hash_text(json.dumps(units))},
        "versions": versions(),
        "machine": {"devices": [device]},
    }
    return Store.open(Path(out), manifest, resume=resume)


def refuse_other_inputs(
    store: Store, plan: DeltaPlan, order: list[int], sources: tuple[WeightSource, WeightSource]
) -> None:
    """Compare the finished units' inputs with the present ones.

    Raises:
        InvalidArgumentError: the values of a tensor are not those that its unit was computed from.
    """
    for unit in sorted(store.done()):
        if unit >= len(order):
            continue
        item = plan.items[order[unit]]
        facts = _facts(store.get(unit))
        stamp = stamp_of(item, sources)
        if stamp and facts["stamp"] == stamp:
            continue
        adapter = factored(item, sources)
        digests = adapter.digests(item.tuned) if adapter is not None else _digests(item, sources)
        now = [digest.hex() for digest in digests]
        for side, was, found in zip(("base", "tuned"), facts["digests"], now, strict=True):
            if was != found:
                raise InvalidArgumentError(
                    f"{store.path} has the results of another {side} model: the values of {item.name} are not those "
                    "that it was computed from; pass another out=, or delete the folder to start over"
                )


def _digests(item: Item, sources: tuple[WeightSource, WeightSource]) -> tuple[bytes, bytes]:
    pair = load_pair(*sources, item)
    return tensor_digest(pair.w0), tensor_digest(pair.w1)


def stamp_of(item: Item, sources: tuple[WeightSource, WeightSource]) -> str:
    """What changes with the files that an item is read from; empty where a side is in memory."""
    stamps = sources[0].stamp(item.base), sources[1].stamp(item.tuned)
    return hashlib.sha256(b"".join(stamps)).hexdigest() if all(stamps) else ""


def factored(item: Item, sources: tuple[WeightSource, WeightSource]) -> AdapterSource | None:
    """The adapter that has an item's delta as factors, so that neither tensor is read."""
    adapter = sources[1]
    if isinstance(adapter, AdapterSource) and item.stop is None and adapter.factors(item.tuned):
        return adapter
    return None


def to_unit(delta: TensorDelta, digests: tuple[bytes, ...], stamp: str) -> dict[str, Tensor]:
    """A result as the tensors of a unit."""
    facts = {key: getattr(delta, key) for key in SCALARS}
    facts |= {"digests": [digest.hex() for digest in digests], "stamp": stamp}
    told = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {part: getattr(delta, part) for part in PARTS} | {_FACTS: told}


def from_unit(item: Item, tensors: dict[str, Tensor]) -> tuple[TensorDelta, tuple[bytes, bytes]]:
    """What `to_unit` stored: the result, and the digests of the base and the tuned tensor."""
    facts = _facts(tensors)
    base, tuned = (bytes.fromhex(digest) for digest in facts["digests"])
    parts: dict[str, Any] = {part: tensors[part] for part in PARTS}
    scalars = {key: facts[key] for key in SCALARS}
    shape = parts["u"].shape[0], parts["v"].shape[0]
    return TensorDelta(item.name, shape, **parts, **scalars), (base, tuned)


def _facts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return json.loads(bytes(tensors[_FACTS].numpy()))
