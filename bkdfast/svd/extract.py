"""LoRA extraction: the delta of a full fine-tune, truncated weight by weight, as a PEFT adapter.

The truncated SVD `u diag(s) v^T` is the best approximation of a delta in its rank (Eckart & Young 1936); its factors
`B = u sqrt(s)`, `A = sqrt(s) v^T` are a LoRA of scaling 1. The rank is fixed, or each weight gets the smallest that
meets a rule. What a LoRA cannot carry is counted and named, never dropped in silence.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, NonFiniteError, optional
from bkdfast.svd.delta import warn_capped, warn_unconverged
from bkdfast.svd.layout import Layout, write_adapter
from bkdfast.svd.lora import AdapterSource, open_pair
from bkdfast.svd.names import match_names
from bkdfast.svd.norms import sums
from bkdfast.svd.plan import make_plan
from bkdfast.svd.result import DeltaSVD, TensorDelta
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import Settings, Weights
from bkdfast.svd.source import WeightSource

if TYPE_CHECKING:
    import pandas

_RANK = 16


@dataclass(frozen=True)
class Extracted:
    """What became of the delta of one changed weight.

    Attributes:
        name: of the weight, in the tuned model.
        how: `"lora"`, `"saved"` (whole, by modules_to_save or as a bias) or `"lost"`.
        shape: of the weight.
        rank: of its LoRA; 0 without one.
        frobenius: `||delta||_F`.
        energy: share of `||delta||_F^2` that the adapter carries, 0 to 1, before rounding to its dtype.
        note: why it has no LoRA, or why its LoRA does not meet the rule; else "".
    """

    name: str
    how: str
    shape: tuple[int, ...]
    rank: int
    frobenius: float
    energy: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class Extraction:
    """What `extract_lora` wrote.

    Attributes:
        path: the adapter's folder.
        tensors: every changed weight by its name; those that did not change are left out.
        unchanged: number of weights that did not change.
    """

    path: Path
    tensors: dict[str, Extracted]
    unchanged: int

    @property
    def energy(self) -> float:
        """Share of the squared Frobenius norm of all deltas together that the adapter carries, 0 to 1."""
        total = sum(one.frobenius**2 for one in self.tensors.values())
        return sum(one.energy * one.frobenius**2 for one in self.tensors.values()) / total if total else 0.0

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the changed weights of which the adapter has nothing."""
        return tuple(one.name for one in self.tensors.values() if one.how == "lost")

    def share(self, names: Iterable[str]) -> float:
        """Share of the named weights in the squared norm of all deltas together, 0 to 1."""
        total = sum(one.frobenius**2 for one in self.tensors.values())
        return sum(self.tensors[name].frobenius ** 2 for name in names) / total if total else 0.0

    def __repr__(self) -> str:
        ranks = [one.rank for one in self.tensors.values() if one.how == "lora"]
        saved = sum(one.how == "saved" for one in self.tensors.values())
        parts = [f"{len(ranks)} LoRAs of rank {min(ranks)} to {max(ranks)}", f"{self.energy:.1%} of the squared norm"]
        parts += [f"{saved} saved whole"] if saved else []
        parts += [f"{len(self.lost)} lost"] if self.lost else []
        return f"Extraction({', '.join(parts)}; {self.path})"

    def to_pandas(self) -> pandas.DataFrame:
        """One row per changed weight, indexed by name: how, shape, rank, frobenius, energy, note.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pd = optional("pandas", "a data frame", "viz")
        rows = [vars(one) for one in self.tensors.values()]
        return pd.DataFrame(rows, columns=list(Extracted.__dataclass_fields__)).set_index("name")


def extract_lora(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    max_rank: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    save_rest: bool = False,
    deltas: DeltaSVD | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> Extraction:
    """Write a LoRA adapter of `tuned - base` that `PeftModel.from_pretrained(base_model, out)` loads.

    Merged, it makes `base + u diag(s) v^T` of every weight of a Linear, Conv1D or Embedding module, up to rounding.
    Weights that did not change get no LoRA. Where base and tuned share the embedding with the output head, an
    unmerged LoRA of one would miss the other; such weights, biases, norms and stacked experts are left out with a
    warning that says how much of the squared norm they are, or saved whole with `save_rest=True`.

    Args:
        base: the model before fine-tuning: an `nn.Module`, or a local folder with safetensors files and `config.json`.
        tuned: the model after it, in either form, or a LoRA adapter (which is then compressed to a lower rank).
        out: folder to create; it must not exist, or be empty.
        rank: of every LoRA, less where a delta's numerical rank is; 16 if no rule is given.
        energy: instead of `rank`: for each weight the smallest rank that carries this share of `||delta||_F^2`, above 0
            and at most 1.
        tol: instead of `rank`: for each weight the singular values that are at least `tol` times its largest, above 0
            and at most 1.
        max_rank: of any LoRA; by default 128 with `energy` or `tol`.
        include: patterns of names (as in `delta_svd`); a changed weight outside is neither in the adapter nor listed.
        exclude: patterns of names to leave out, applied after `include`.
        save_rest: save what a LoRA cannot carry whole (`modules_to_save`, biases by `bias="all"`).
        deltas: a `DeltaSVD` of the same two models; weights of which it has enough triplets for the rule, or of which
            it was made by the same rule, are not computed again.
        dtype: of the adapter; by default each weight's in the tuned model.
        tolerance: as in `delta_svd`.
        max_passes: as in `delta_svd`.
        seed: as in `delta_svd`.
        device: as in `delta_svd`.
        backend: of `delta_sketch`.
        progress: show a progress bar on stderr.

    Returns:
        `Extraction`: rank and share of the squared norm of every changed weight.

    Raises:
        CheckpointError: a side cannot be read, shapes differ, or the base does not say what modules it has.
        InvalidArgumentError: an option is out of range, no weight that a LoRA can carry differs, or `out` is not empty.
        InvalidTypeError: an argument has the wrong type.
        NonFiniteError: a delta has NaN or infinity; the message names the tensor.
        OSError: `out` cannot be written; nothing is left behind.

    Warns:
        UserWarning: weights that are lost; LoRAs that do not meet the rule; what `delta_svd` warns about.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> found = extract_lora(PAIR / "base", PAIR / "tuned", "adapter", energy=0.9)  # doctest: +SKIP
        >>> found.to_pandas().sort_values("frobenius")  # doctest: +SKIP

    Sources: Hu et al. 2021 (arXiv 2106.09685); Eckart & Young 1936.
    """
    rule = Rule.of(rank, energy, tol, max_rank, default=_RANK)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidTypeError(f"dtype must be a floating-point torch.dtype, found {dtype!r}")
    path = _free(out)
    settings = Settings(rule, tolerance, max_passes, seed, device, backend)
    sources = open_pair(base, tuned)
    layout = Layout.of(*sources)
    plan = make_plan(*sources, include, exclude)
    matrices = [item.tuned for item in plan.items if not item.stacked]
    rest = plan.skipped | {item.tuned: "3-D" for item in plan.items if item.stacked}
    matched = match_names(sources[1].names, sources[0].names)
    found: dict[str, Extracted] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    computed, unchanged, work = [], 0, [*matrices, *rest]
    for name in tqdm(work, "extract LoRA", unit="tensor", file=sys.stderr, disable=not progress):
        reason = rest.get(name, "") or layout.obstacle(name)
        if name in plan.resized:
            reason = "the vocabulary was resized"
        if reason:
            norm = _norm(name, sources, matched[name])
            shape = sources[1].shape(name)
            if norm > 0:
                found[name] = Extracted(name, "lost", shape, 0, norm, 0.0, reason)
            unchanged += norm == 0
            continue
        delta = _factor(name, matched[name], sources, settings, deltas)
        if delta.rank == 0:
            unchanged += 1
            continue
        computed.append(delta)
        captured, note = min(1.0, delta.energy), rule.cap_note if rule.capped(delta) else ""
        found[name] = Extracted(name, "lora", delta.shape, delta.rank, delta.frobenius, captured, note)
        half = delta.s.sqrt()
        left, right = delta.u.double() * half, delta.v.double() * half  # [m, k], [n, k]
        b, a = (right, left.T) if layout.transposed(name) else (left, right.T)
        stored = dtype or sources[1].dtype(name) or torch.float32
        factors[name] = a.to(stored).contiguous(), b.to(stored).contiguous()
    if not factors:
        what = "differ only in what a LoRA cannot carry: " + ", ".join(list(found)[:3]) if found else "are identical"
        raise InvalidArgumentError(f"base and tuned {what}; there is nothing to extract, and {path} was not written")
    warn_unconverged(computed, tolerance)
    warn_capped(computed, rule)
    whole = layout.saved(list(found), set(factors), sources[1]) if save_rest else {}
    for name, one in found.items():
        if one.how == "lost" and name in whole and name not in plan.resized:
            found[name] = replace(one, how="saved", energy=1.0)
    write_adapter(path, layout, factors, whole, sources, dtype)
    result = Extraction(path, found, unchanged)
    _warn_lost(result, save_rest)
    return result


def _free(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidArgumentError(f"{path} exists and is not empty; choose another folder, or remove it")
    above = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InvalidArgumentError(f"cannot write to {path}: {above} is not a folder that can be written to")
    return path


def _norm(name: str, sources: tuple[WeightSource, WeightSource], base_name: str) -> float:
    """`||delta||_F` of a tensor of any dimension, by rows where there are several."""
    w0, w1 = sources[0].get(base_name), sources[1].get(name)
    if w0.dim() and w0.shape[1:] == w1.shape[1:]:  # a resized vocabulary has common rows
        rows = min(len(w0), len(w1))
        w0, w1 = w0[:rows], w1[:rows]
    if w0.shape != w1.shape:
        raise CheckpointError(f"{name} is {tuple(w0.shape)} in the base and {tuple(w1.shape)} in the tuned model")
    if torch.equal(w0, w1.to(w0.device)):
        return 0.0
    if not (w0.is_floating_point() and w1.is_floating_point()):
        raise CheckpointError(
            f"{name} is {w1.dtype} and differs, so that its delta means nothing; dequantise both models"
        )
    squared = sums(w0.to(w1.device), w1, same=False, sketched=False)[1]
    if not math.isfinite(squared):
        raise NonFiniteError(f"{name} has NaN or infinity on one side; repair it")
    return math.sqrt(squared)


def _factor(
    name: str,
    base_name: str,
    sources: tuple[WeightSource, WeightSource],
    settings: Settings,
    deltas: DeltaSVD | None,
) -> TensorDelta:
    """The triplets of one weight that the rule keeps, from `deltas` as far as they go."""
    if deltas is not None and name in deltas:
        given, rule, (m, n) = deltas[name], settings.rule, sources[1].shape(name)
        if given.shape != (m, n):
            raise CheckpointError(f"{name} is {given.shape} in deltas= and {(m, n)} in the models; are they others?")
        limited = given.rank >= min(rule.limit, m, n)
        same = rule.settings.items() <= deltas.metadata.items()
        if given.unchanged or limited or same or rule.needed(given.s, given.frobenius) is not None:
            kept, capped = rule.choose(given.s, given.frobenius, min(m, n) if limited else given.rank)
            return settings.leading(replace(given, note=capped), kept)
    if isinstance(sources[1], AdapterSource) and (exact := sources[1].factor(name, base_name, settings)) is not None:
        return exact
    return settings.factor(Weights(name, sources[0].get(base_name), sources[1].get(name)))


def _warn_lost(result: Extraction, save_rest: bool) -> None:
    if lost := result.lost:
        reasons = sorted({result.tensors[name].note for name in lost})
        hint = "" if save_rest else "; save_rest=True saves what PEFT can save whole"
        warnings.warn(
            f"{len(lost)} changed tensors, {result.share(lost):.2%} of the squared norm of all deltas, are not in the "
            f"adapter ({', '.join(reasons)}): {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}{hint}",
            stacklevel=3,
        )
