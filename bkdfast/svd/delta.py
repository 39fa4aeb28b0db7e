"""`delta_svd`: what fine-tuning wrote into the weights, as leading singular triplets of every weight's delta."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.svd.artifact import versions
from bkdfast.svd.krylov import leading_triplets
from bkdfast.svd.lora import AdapterSource, open_pair
from bkdfast.svd.names import combine_digests, match_names, tensor_digest
from bkdfast.svd.result import DeltaSVD, TensorDelta
from bkdfast.svd.source import WeightSource

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Settings:
    """What `delta_svd` and `delta_directions` share: the arguments of `leading_triplets`, checked.

    Raises:
        InvalidArgumentError: a number is out of its range.
        InvalidTypeError: `rank`, `max_passes` or `seed` is not an integer.
    """

    rank: int = 20
    tolerance: float = 1e-4
    max_passes: int = 12
    seed: int = 0
    device: str | torch.device | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "max_passes", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name} must be an integer, found {value!r}")
        if self.rank < 1:
            raise InvalidArgumentError(f"rank must be at least 1, found {self.rank}")
        if self.max_passes < 2:
            raise InvalidArgumentError(
                f"max_passes must be at least 2, since one pass only sees random vectors; found {self.max_passes}"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InvalidArgumentError(f"tolerance must be positive and finite, found {self.tolerance}")

    def factor(self, name: str, w0: Tensor, w1: Tensor, note: str = "") -> TensorDelta:
        """The `TensorDelta` of one pair of weights."""
        device = self.device if self.device is not None else w1.device
        w0, w1 = w0.to(device), w1.to(device)
        rank, notes = self.rank, [note] if note else []
        if rank > min(w0.shape):
            rank = min(w0.shape)
            notes.append(f"rank clipped to {rank}, the smaller side")
        try:
            found = leading_triplets(
                w0,
                w1,
                rank=rank,
                tolerance=self.tolerance,
                max_passes=self.max_passes,
                seed=_tensor_seed(self.seed, name),
                backend=self.backend,
            )
        except NonFiniteError:
            sides = [side for side, w in (("base", w0), ("tuned", w1)) if not bool(torch.isfinite(w).all())]
            where = f"the {' and '.join(sides)} weights" if sides else "the difference, which overflows"
            raise NonFiniteError(f"{name} has NaN or infinity in {where}; repair it") from None
        if 0 < found.s.shape[0] < rank:
            notes.append(f"numerical rank {found.s.shape[0]}")
        return TensorDelta(
            name=name,
            shape=(w1.shape[0], w1.shape[1]),
            u=found.u,
            s=found.s,
            v=found.v,
            residual=found.residual,
            angle=found.angles.vector,
            subspace=found.angles.subspace,
            dimension=found.angles.dimension,
            frobenius=found.frobenius,
            changed=found.changed,
            passes=found.passes,
            converged=found.converged,
            note="; ".join(notes),
        )


def delta_svd(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int = 20,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> DeltaSVD:
    """Leading singular triplets of `tuned - base` for every 2-D weight, one tensor pair in memory at a time.

    Weights are taken as stored: a Conv1D (GPT-2) stores `[in, out]`, so there u is the input side. Of matrices with a
    row for each token whose vocabularies differ in size, the common rows are compared, with a warning and a note.

    Args:
        base: the model before fine-tuning: an `nn.Module`, or a local folder of safetensors files.
        tuned: the model after it, in either form; sharding and dtype may differ from `base`. Or a LoRA adapter, a PEFT
            folder or a loaded `PeftModel` (its active adapters): the triplets come from its factors, exactly, and no
            base weight is read but those that it replaces as a whole (`modules_to_save`).
        rank: number of triplets per weight; clipped to the smaller side, with a note.
        include: shell pattern or patterns (`fnmatch`, case-sensitive, `*` also crosses dots) of names to compare, e.g.
            `"*.mlp.down_proj.weight"`; all if None.
        exclude: patterns of names to leave out, applied after `include`.
        tolerance: stop when `||delta^T u - s v|| <= tolerance * s` for every triplet, or at the rounding floor.
        max_passes: reads of both matrices at most; what has not converged then is returned with `converged=False`.
        seed: of the random start block; each tensor's is derived from it and the tensor's name.
        device: where to compute; by default where the tuned tensor is.
        backend: of `delta_sketch`, e.g. `"reference"`.
        progress: show a progress bar on stderr.

    Returns:
        `DeltaSVD`, a mapping from names to `TensorDelta`. Results are on the CPU. The same seed, inputs, device and
        library versions give the same bits.

    Raises:
        CheckpointError: a side cannot be read, shapes differ, or no name is in both.
        InvalidArgumentError: an option is out of range, or a pattern of `include` matches nothing.
        InvalidTypeError: an argument has the wrong type.
        NonFiniteError: a delta has NaN or infinity; the message names the tensor.

    Warns:
        UserWarning: names on one side only; resized vocabularies; tensors that did not reach `tolerance`.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> deltas = delta_svd(PAIR / "base", PAIR / "tuned", rank=4, include="*.o_proj.weight", progress=False)
        >>> delta = deltas["model.layers.4.self_attn.o_proj.weight"]
        >>> delta.u.shape, delta.s.shape, delta.v.shape, round(delta.s[0].item(), 2)
        (torch.Size([128, 4]), torch.Size([4]), torch.Size([256, 4]), 0.87)

    Sources: Halko, Martinsson & Tropp 2011; Musco & Musco 2015 (see `bkdfast.svd.krylov`).
    """
    settings = Settings(rank, tolerance, max_passes, seed, device, backend)
    sources = open_pair(base, tuned)
    plan = _plan(*sources, include=_patterns(include, "include"), exclude=_patterns(exclude, "exclude") or [])
    deltas: dict[str, TensorDelta] = {}
    digests: tuple[list[bytes], list[bytes]] = ([], [])
    for name, base_name in tqdm(plan.pairs.items(), "delta SVD", unit="tensor", file=sys.stderr, disable=not progress):
        if isinstance(sources[1], AdapterSource) and (delta := sources[1].factor(name, base_name, settings)):
            deltas[name] = delta
            digests[1].append(sources[1].digest(name))
            continue
        w0, w1 = sources[0].get(base_name), sources[1].get(name)
        digests[0].append(tensor_digest(w0))
        digests[1].append(tensor_digest(w1))
        notes = [] if base_name == name else [f"compared with {base_name} of the base"]
        if name in plan.resized:
            rows = min(w0.shape[0], w1.shape[0])
            notes.append(f"the {rows} common rows of {w0.shape[0]} and {w1.shape[0]}")
            w0, w1 = w0[:rows], w1[:rows]
        deltas[name] = settings.factor(name, w0, w1, "; ".join(notes))
    warn_unconverged(deltas.values(), tolerance)
    metadata = {
        "base": sources[0].label,
        "tuned": sources[1].label,
        "base_hash": combine_digests(digests[0]),
        "tuned_hash": combine_digests(digests[1]),
        "rank": rank,
        "tolerance": tolerance,
        "max_passes": max_passes,
        "seed": seed,
        "versions": versions(),
    }
    return DeltaSVD(deltas, plan.only_in_base, plan.only_in_tuned, plan.skipped, plan.tied, metadata)


def check_shapes(name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
    """Raise CheckpointError when a weight has different shapes on the two sides."""
    if base != tuned:
        raise CheckpointError(
            f"{name} is {base} in the base and {tuned} in the tuned model; use the checkpoint that was tuned"
        )


def warn_unconverged(deltas: Iterable[TensorDelta], tolerance: float) -> None:
    """One warning for all tensors whose triplets did not reach the tolerance."""
    left = [delta for delta in deltas if not delta.converged]
    if left:
        worst = max(left, key=lambda delta: float((delta.residual / delta.s).max()))
        warnings.warn(
            f"{len(left)} tensors did not reach tolerance={tolerance:g}; the largest relative residual is "
            f"{float((worst.residual / worst.s).max()):.1e}, in {worst.name}. Their weakest triplets lie in a dense "
            "part of the spectrum: lower rank=, or raise max_passes= or tolerance=",
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Plan:
    pairs: dict[str, str]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    skipped: dict[str, str]
    tied: dict[str, str]
    resized: tuple[str, ...]


def _plan(base: WeightSource, tuned: WeightSource, include: list[str] | None, exclude: list[str]) -> _Plan:
    """Which tensors to compare, and what becomes of the others. Reads headers only."""
    for pattern in include or ():
        if not any(fnmatchcase(name, pattern) for name in tuned.names):
            raise InvalidArgumentError(
                f"include={pattern!r} matches no tensor; there are {', '.join(tuned.names[:4])}, ..."
            )

    def selected(name: str) -> bool:
        wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)

    found = match_names(tuned.names, base.names)
    if not found:
        raise CheckpointError(
            f"no tensor name is in both models: the base has {', '.join(base.names[:3])}, ..., the tuned model "
            f"{', '.join(tuned.names[:3])}, ..."
        )
    pairs: dict[str, str] = {}
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    resized: dict[str, str] = {}
    seen: dict[tuple[str, str], str] = {}
    for name, base_name in found.items():
        if not selected(name):
            continue
        first = seen.setdefault((base.canonical(base_name), tuned.canonical(name)), name)
        reason = _unsuitable(base, base_name) or _unsuitable(tuned, name)
        if reason:
            skipped[name] = reason
        elif first != name:
            tied[name] = first
        else:
            before, after = base.shape(base_name), tuned.shape(name)
            if before[0] != after[0] and before[1] == after[1] and _are_tokens(base, before[0], tuned, after[0]):
                resized[name] = f"{before[0]} tokens in the base and {after[0]} in the tuned model"
            else:
                check_shapes(name, before, after)
            pairs[name] = base_name
    only_in_tuned = _unmatched(tuned, list(found), list(found), selected, tied)
    only_in_base = _unmatched(base, list(found.values()), list(found), selected, tied)
    for side, names in (("base", only_in_base), ("tuned", only_in_tuned)):
        if names:
            more = ", ..." if len(names) > 3 else ""
            warnings.warn(
                f"{len(names)} tensors are in the {side} model only and not compared: {', '.join(names[:3])}{more}",
                stacklevel=3,
            )
    if resized:
        warnings.warn(
            f"the vocabulary has {next(iter(resized.values()))}; of {', '.join(resized)} only the common rows are "
            "compared",
            stacklevel=3,
        )
    return _Plan(pairs, only_in_base, only_in_tuned, skipped, tied, tuple(resized))


def _are_tokens(base: WeightSource, base_rows: int, tuned: WeightSource, tuned_rows: int) -> bool:
    """Whether these numbers of rows are the sizes of the two vocabularies; False without configs."""
    sizes = []
    for config in (base.config, tuned.config):
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        sizes.append(getattr(config, "vocab_size", None))
    return sizes == [base_rows, tuned_rows]


def _unmatched(
    source: WeightSource, matched: list[str], names: list[str], selected, tied: dict[str, str]
) -> tuple[str, ...]:
    """Names without a counterpart; a second name of a matched tensor goes to `tied` instead."""
    known, owner = set(matched), {source.canonical(own): name for own, name in zip(matched, names, strict=True)}
    alone = []
    for name in source.names:
        if name in known or not selected(name):
            continue
        if source.canonical(name) in owner:
            tied.setdefault(name, owner[source.canonical(name)])
        else:
            alone.append(name)
    return tuple(alone)


def _unsuitable(source: WeightSource, name: str) -> str:
    if len(source.shape(name)) != 2:
        return f"{len(source.shape(name))}-D"
    if source.dtype(name) not in _FLOATS:
        return f"{source.dtype(name) or 'an unknown dtype'}, not a floating-point matrix; dequantise it first"
    return ""


def _patterns(patterns: str | Iterable[str] | None, name: str) -> list[str] | None:
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidTypeError(f"{name} must be a pattern or a list of patterns, found {patterns!r}")
    return patterns


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
