"""`delta_svd`: what fine-tuning wrote into the weights, as leading singular triplets of every weight's delta."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bkdfast.errors import StoreError
from bkdfast.jobs import units
from bkdfast.svd.artifact import versions
from bkdfast.svd.lora import open_pair
from bkdfast.svd.names import combine_digests
from bkdfast.svd.plan import DeltaPlan, Item, make_plan, memory_limit
from bkdfast.svd.result import DeltaSVD, TensorDelta
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import RANK, Settings, Weights
from bkdfast.svd.source import ModuleSource, WeightSource
from bkdfast.svd.stored import factored, from_unit, open_store, refuse_other_inputs, stamp_of, to_unit
from bkdfast.svd.stream import Stream

ARTIFACT = "delta_svd.safetensors"
_BATCH_BYTES = 2 << 30  # of a GPU's memory, for pairs that are computed together


def delta_plan(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    max_rank: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_passes: int = 12,
) -> DeltaPlan:
    """What `delta_svd` would compare and read, and the memory that it takes; reads nothing but headers.

    With `energy` or `tol` the memory is what every weight would take at `max_rank`.
    Arguments, errors and warnings are those of `delta_svd`.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> plan = delta_plan(PAIR / "base", PAIR / "tuned", include="*.self_attn.o_proj.weight")
        >>> len(plan.items), plan.items[0].shape, plan.nbytes
        (6, (128, 256), 786432)
    """
    settings = Settings(Rule.of(rank, energy, tol, max_rank, default=RANK), max_passes=max_passes)
    return make_plan(*open_pair(base, tuned), include, exclude, work=settings.work)


def delta_svd(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    max_rank: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    max_memory: int | str | None = None,
    progress: bool = True,
) -> DeltaSVD:
    """Leading singular triplets of `tuned - base` for every 2-D weight, one tensor pair in memory at a time.

    Weights are taken as stored: a Conv1D (GPT-2) stores `[in, out]`, so there u is the input side; a fused projection
    is the one matrix that it is. Stacked matrices `[E, a, b]` (the experts of a mixture) are compared one by one, as
    `name[0]` to `name[E - 1]`. Of matrices with a row for each token whose vocabularies differ in size, the common rows
    are compared, with a warning and a note. Tensors that are the same byte for byte are found when they are read, and
    nothing is computed for them.

    Checkpoints are read pair by pair, the largest first; a thread reads the next pair while one is computed. Under
    `torchrun` (with `out`) the processes share the tensors, and each returns the whole result, bit for bit that of one
    process. Of two models in one GPU's memory, one process computes weights of one shape together
    (`bkdfast.svd.batched`), in groups that take up to 2 GiB of it; several processes do not, and get the same up to
    rounding.

    Args:
        base: the model before fine-tuning: an `nn.Module`, a local folder of safetensors files, or the hub id of a
            model that was downloaded before (`org/name`, `org/name@revision`).
        tuned: the model after it, in any of these forms; sharding and dtype may differ from `base`. Or a LoRA adapter,
            a PEFT folder or a loaded `PeftModel` (its active adapters): the triplets come from its factors, exactly,
            and no base weight is read but those that it replaces as a whole (`modules_to_save`).
        rank: number of triplets per weight; clipped to the smaller side, with a note. 20 if no rule is given.
        energy: instead of `rank`: for each weight the fewest triplets that hold this share of `||delta||_F^2`, above 0
            and at most 1. Where the delta's numerical rank is met first, all triplets, with a note.
        tol: instead of `rank`: for each weight the triplets whose singular value is at least `tol` times its largest,
            above 0 and at most 1.
        max_rank: most triplets of any weight; by default 128 with `energy` or `tol`. A weight that needs more gets
            these, with a note.
        include: shell pattern or patterns (`fnmatch`, case-sensitive, `*` also crosses dots) of names to compare, e.g.
            `"*.mlp.down_proj.weight"`; all if None.
        exclude: patterns of names to leave out, applied after `include`.
        tolerance: stop when `||delta^T u - s v|| <= tolerance * s` for every triplet, or at the rounding floor, and the
            angles of those with a gap behind them are certified to `tolerance`. Triplets below the rounding of the
            tuned weights' format are returned as they are found.
        max_passes: reads of both matrices at most; what has not converged then is returned with `converged=False`. With
            `energy` or `tol`, for each rank that is tried: 16, 32, 64, ..., until one is enough.
        seed: of the random start block; each tensor's is derived from it and the tensor's name.
        device: where to compute; by default where the tuned tensor is.
        backend: of `delta_sketch`, e.g. `"reference"`.
        out: folder that keeps finished tensors, so that a run that was killed goes on where it stopped, and at the end
            the result as `delta_svd.safetensors`, for `DeltaSVD.load`; None: nothing is kept.
        resume: go on with what is finished in `out`; False: refuse a folder that has some.
        max_memory: bytes, or text such as "2GB", that weights, results and work may take, over what torch itself
            takes. The next pair is read ahead only while both fit.
        progress: show a progress bar, in bytes of both sides, on stderr.

    Returns:
        `DeltaSVD`, a mapping from names to `TensorDelta`. Results are on the CPU. The same seed, inputs, device and
        library versions give the same bits.

    Raises:
        CheckpointError: a side cannot be read or is quantised, shapes differ, or no name is in both.
        InvalidArgumentError: an option is out of range, more than one of `rank`, `energy` and `tol` is given, a pattern
            of `include` matches nothing, the largest pair does not fit into `max_memory`, or `out` has the results of
            other models or settings.
        InvalidTypeError: an argument has the wrong type.
        NonFiniteError: a delta has NaN or infinity; the message names the tensor.
        StoreError: `out` cannot be written, or another run is using it.

    Warns:
        UserWarning: names on one side only; resized vocabularies; tensors that did not reach `tolerance`, or that
            reached `max_rank` before `energy` or `tol`.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> deltas = delta_svd(PAIR / "base", PAIR / "tuned", rank=4, include="*.o_proj.weight", progress=False)
        >>> delta = deltas["model.layers.4.self_attn.o_proj.weight"]
        >>> delta.u.shape, delta.s.shape, delta.v.shape, round(delta.s[0].item(), 2)
        (torch.Size([128, 4]), torch.Size([4]), torch.Size([256, 4]), 0.87)
        >>> deltas = delta_svd(PAIR / "base", PAIR / "tuned", energy=0.9, include="*.o_proj.weight", progress=False)
        >>> [delta.rank for delta in deltas.values()]
        [17, 14, 13, 12, 8, 6]

    Sources: Halko, Martinsson & Tropp 2011; Musco & Musco 2015 (see `bkdfast.svd.krylov`).
    """
    rule = Rule.of(rank, energy, tol, max_rank, default=RANK)
    settings = Settings(rule, tolerance, max_passes, seed, device, backend)
    limit = memory_limit(max_memory)
    sources = open_pair(base, tuned)
    found = make_plan(*sources, include, exclude, work=settings.work)
    found.refuse_too_large(limit)
    units.join()
    order, done = found.order(), set[int]()
    store = None
    if out is not None:
        told = {**rule.settings, "tolerance": tolerance, "max_passes": max_passes, "seed": seed, "backend": backend}
        where = str(device) if device is not None else "as the tuned weights"
        store = open_store(out, found, order, sources, told, where, resume=resume)
        refuse_other_inputs(store, found, order, sources)
        done = store.done()
    sizes = [float(found.items[position].size) for position in order]
    # Of several processes none knows which unit it draws next; they read while others compute.
    read = [unit for unit in range(len(order)) if unit not in done and not factored(found.items[order[unit]], sources)]
    left = [] if units.place()[1] > 1 else [order[unit] for unit in read]
    together = _batches([found.items[position] for position in order], sources, settings)
    ready: dict[int, dict[str, Tensor]] = {}
    deltas: dict[str, TensorDelta] = {}
    digests: dict[str, tuple[bytes, bytes]] = {}
    with Stream(*sources, found, left, limit=limit) as stream:

        def compute(unit: int, advance: object) -> dict[str, Tensor]:
            item = found.items[order[unit]]
            adapter = factored(item, sources)
            if adapter is not None and (exact := adapter.factor(item.tuned, item.base, settings)) is not None:
                return to_unit(exact, adapter.digests(item.tuned), "")
            if unit not in ready:
                pairs = {u: (found.items[order[u]], stream.take(order[u])) for u in together.get(unit, (unit,))}
                made = settings.factor_all([Weights(i.name, p.w0, p.w1, i.note, p.same) for i, p in pairs.values()])
                for (u, (i, p)), delta in zip(pairs.items(), made, strict=True):
                    if u not in done:
                        ready[u] = to_unit(delta, p.digests, stamp_of(i, sources))
            return ready.pop(unit)

        run = units.run_units(
            len(order),
            compute,
            store,
            costs=sizes,
            progress=progress,
            description="delta SVD",
            labels=[found.items[position].name for position in order],
        )
        for unit, tensors in run:
            item = found.items[order[unit]]
            deltas[item.name], digests[item.name] = from_unit(item, tensors)
    deltas = {item.name: deltas[item.name] for item in found.items}
    warn_unconverged(deltas.values(), tolerance)
    warn_capped(deltas.values(), rule)
    metadata = {
        "base": sources[0].label,
        "tuned": sources[1].label,
        "base_hash": combine_digests(digests[name][0] for name in deltas),
        "tuned_hash": combine_digests(digests[name][1] for name in deltas),
        **rule.settings,
        "tolerance": tolerance,
        "max_passes": max_passes,
        "seed": seed,
        "versions": versions(),
    }
    result = DeltaSVD(deltas, found.only_in_base, found.only_in_tuned, found.skipped, found.tied, metadata)
    if store is not None:
        try:
            result.save(store.path / ARTIFACT)
        except OSError as error:
            raise StoreError(
                f"cannot write {store.path / ARTIFACT}: {error.strerror or error}; finished units are kept; mend that "
                "and run again"
            ) from error
    return result


def warn_unconverged(deltas: Iterable[TensorDelta], tolerance: float) -> None:
    """One warning for all tensors whose triplets did not reach the tolerance."""
    left = [delta for delta in deltas if not delta.converged]
    if left:
        worst = max(left, key=lambda delta: float((delta.residual / delta.s).max()))
        warnings.warn(
            f"{len(left)} tensors did not reach tolerance={tolerance:g}; the largest relative residual is "
            f"{float((worst.residual / worst.s).max()):.1e}, in {worst.name}. Their weakest triplets lie in a dense "
            "part of the spectrum: ask for fewer, or raise max_passes= or tolerance=",
            stacklevel=3,
        )


def warn_capped(deltas: Iterable[TensorDelta], rule: Rule) -> None:
    """One warning for all tensors of which the rule asks for more triplets than `max_rank`."""
    short = [delta for delta in deltas if rule.capped(delta)]
    if short:
        worst = min(short, key=lambda delta: delta.energy)
        warnings.warn(
            f"{len(short)} tensors reached the cap before the rule was met ({rule}); the worst, {worst.name}, keeps "
            f"{worst.energy:.1%} of its squared norm. Raise max_rank=, or ask for less",
            stacklevel=3,
        )


def _batches(
    items: Sequence[Item], sources: tuple[WeightSource, WeightSource], settings: Settings
) -> dict[int, list[int]]:
    """Units that are computed together, by each of them: pairs of one kind that are in one GPU's memory already.

    They do not depend on what is finished, so that a run that goes on computes what one run would have.
    """
    wanted = None if settings.device is None else torch.empty(0, device=settings.device).device  # cuda is cuda:0
    groups: dict[tuple, list[list[int]]] = {}
    for unit, item in enumerate(items):
        sides = [_on_gpu(source, name) for source, name in zip(sources, (item.base, item.tuned), strict=True)]
        if units.place()[1] > 1 or sides[0] is None or sides[0] != sides[1] or wanted not in (None, sides[0]):
            continue
        parts = groups.setdefault((item.shape, *sides, sources[0].dtype(item.base), sources[1].dtype(item.tuned)), [[]])
        if len(parts[-1]) >= max(1, _BATCH_BYTES // settings.batch_work(item)):
            parts.append([])
        parts[-1].append(unit)
    return {unit: part for parts in groups.values() for part in parts for unit in part}


def _on_gpu(source: WeightSource, name: str) -> torch.device | None:
    """The GPU that has a tensor, if one has."""
    place = source.get(name).device if isinstance(source, ModuleSource) else None
    return place if place is not None and place.type == "cuda" else None
