"""Which tensors of two models are compared, in which pieces, and what that takes; from headers only."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bkdfast.svd.names import match_names
from bkdfast.svd.source import WeightSource

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EXPERT_SIDE = 16
"""Both sides of the matrices in a stack; kernels of convolutions are narrower."""
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Item:
    """One comparison: a tensor, its common rows, or one matrix of a stack.

    Attributes:
        name: in the tuned model; `name[e]` for matrix e of a stack.
        base: the tensor's name in the base model.
        tuned: the tensor's name in the tuned model.
        start: first index along the first dimension.
        stop: end of it; None: all of the tensor.
        stacked: the first dimension is dropped.
        shape: what is compared.
        nbytes: bytes read of the base and of the tuned model.
        note: what is special about it, or "".
    """

    name: str
    base: str
    tuned: str
    start: int
    stop: int | None
    stacked: bool
    shape: tuple[int, ...]
    nbytes: tuple[int, int]
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of both sides."""
        return sum(self.nbytes)


@dataclass(frozen=True, eq=False)
class DeltaPlan:
    """What a comparison of two models will read; `print` it.

    Attributes:
        items: the comparisons, in the order of the tuned model's names.
        only_in_base: names that the tuned model lacks.
        only_in_tuned: names that the base model lacks.
        skipped: name -> why it is not compared.
        tied: name -> the name under which the same storage is compared.
        resized: name -> the two numbers of tokens, of which the common rows are compared.
        labels: what the two sides are called.
        work: bytes that each item's computation takes beside its two tensors, in the order of `items`.
        held: bytes of all results.
    """

    items: tuple[Item, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    skipped: dict[str, str]
    tied: dict[str, str]
    resized: dict[str, str]
    labels: tuple[str, str] = ("", "")
    work: tuple[int, ...] = ()
    held: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are read, of both sides."""
        return sum(item.size for item in self.items)

    @property
    def least_memory(self) -> int:
        """Bytes at the peak when nothing is read ahead: the results, and the largest pair with what it takes."""
        return self.held + max((item.size + extra for item, extra in self._costs()), default=0)

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak with the next pair read ahead: an upper estimate, over what torch itself takes."""
        sizes = sorted((item.size for item in self.items), reverse=True)
        return self.least_memory + (sizes[1] if len(sizes) > 1 else 0)

    def _costs(self) -> list[tuple[Item, int]]:
        return list(zip(self.items, self.work or (0,) * len(self.items), strict=True))

    def order(self) -> list[int]:
        """Positions in `items`, the largest first: what is begun last is then short, on however many processes."""
        return sorted(range(len(self.items)), key=lambda i: (-self.items[i].size, i))

    def refuse_too_large(self, limit: int | None) -> None:
        """Raise InvalidArgumentError if the largest pair does not fit into `limit` bytes."""
        if limit is None or self.least_memory <= limit:
            return
        item, extra = max(self._costs(), key=lambda cost: cost[0].size + cost[1])
        fitting = sum(i.size + more + self.held <= limit for i, more in self._costs())
        raise InvalidArgumentError(
            f"max_memory={show_bytes(limit)} is not enough for {item.name} {list(item.shape)}: its two tensors take "
            f"{show_bytes(item.size)}, computing on them {show_bytes(extra)}, all results {show_bytes(self.held)}; "
            f"{fitting} of {len(self.items)} tensors fit. Pass max_memory='{math.ceil(self.least_memory / 1e6)}MB' or "
            "more, a lower rank= or max_rank=, or exclude= the largest"
        )

    def __str__(self) -> str:
        rows = [("tensor", "shape", "base", "tuned", "")]
        for stem, items in _grouped(self.items):
            first = items[0]
            shape = " x ".join(map(str, first.shape))
            if len(items) > 1:
                shape = f"{len(items)} of {shape}"
            base, tuned = (show_bytes(sum(item.nbytes[side] for item in items)) for side in (0, 1))
            rows.append((stem, shape, base, tuned, first.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4])).rstrip()
            for row in rows
        ]
        lines.append(
            f"{len(self.items)} comparisons, {show_bytes(self.nbytes)} to read; peak memory "
            f"{show_bytes(self.peak_memory)} ({show_bytes(self.least_memory)} when the next pair is not read ahead)"
        )
        for title, told in (
            ("skipped", [f"{why}: {names}" for why, names in _by_reason(self.skipped)]),
            ("tied", [f"{name}: the same as {other}" for name, other in self.tied.items()]),
            ("resized", [f"{name}: {why}" for name, why in self.resized.items()]),
            ("only in the base", list(self.only_in_base)),
            ("only in the tuned model", list(self.only_in_tuned)),
        ):
            if told:
                lines += [f"{title} ({len(told)}):", *(f"  {line}" for line in told)]
        return "\n".join(lines)


def make_plan(
    base: WeightSource,
    tuned: WeightSource,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    matrices: bool = True,
    work: Callable[[Item], tuple[int, int]] = lambda item: (0, 0),
) -> DeltaPlan:
    """Plan a comparison.

    Args:
        base: the model before fine-tuning.
        tuned: the model after it.
        include: shell pattern or patterns of names to compare; None: all.
        exclude: patterns of names to leave out.
        matrices: compare matrices only, and stacks matrix by matrix; False: tensors of any shape.
        work: an item to the bytes that its computation and its result take.

    Raises:
        CheckpointError: no name is in both, shapes differ, or a side is quantised.
        InvalidArgumentError: a pattern of `include` matches nothing.
        InvalidTypeError: a pattern is no string.

    Warns:
        UserWarning: names on one side only; resized vocabularies.
    """
    wanted, unwanted = patterns(include, "include"), patterns(exclude, "exclude") or []
    refuse_quantised(base, tuned)
    for pattern in wanted or ():
        if not any(fnmatchcase(name, pattern) for name in tuned.names):
            raise InvalidArgumentError(
                f"include={pattern!r} matches no tensor; there are {', '.join(tuned.names[:4])}, ..."
            )

    def selected(name: str) -> bool:
        listed = wanted is None or any(fnmatchcase(name, pattern) for pattern in wanted)
        return listed and not any(fnmatchcase(name, pattern) for pattern in unwanted)

    found = match_names(tuned.names, base.names)
    if not found:
        raise CheckpointError(
            f"no tensor name is in both models: the base has {', '.join(base.names[:3])}, ..., the tuned model "
            f"{', '.join(tuned.names[:3])}, ..."
        )
    items: list[Item] = []
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    resized: dict[str, str] = {}
    seen: dict[tuple[str, str], str] = {}
    for name, base_name in found.items():
        if not selected(name):
            continue
        first = seen.setdefault((base.canonical(base_name), tuned.canonical(name)), name)
        reason = _unsuitable(base, base_name, matrices) or _unsuitable(tuned, name, matrices)
        if reason:
            skipped[name] = reason
        elif first != name:
            tied[name] = first
        else:
            note = "" if base_name == name else f"compared with {base_name} of the base"
            before, after = base.shape(base_name), tuned.shape(name)
            rows = None
            if before != after and len(before) == len(after) == 2 and before[1] == after[1]:
                if _are_tokens(base, before[0], tuned, after[0]):
                    rows = min(before[0], after[0])
                    resized[name] = f"{before[0]} tokens in the base and {after[0]} in the tuned model"
                    common = f"the {rows} common rows of {before[0]} and {after[0]}"
                    note = f"{note}; {common}" if note else common
            if rows is None:
                check_shapes(name, before, after)
            sizes = base.nbytes(base_name), tuned.nbytes(name)
            items += _items(name, base_name, before, after, sizes, rows, note, matrices)
    _refuse_same_names(items)
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
    costs = [work(item) for item in items]
    extra, held = tuple(cost[0] for cost in costs), sum(cost[1] for cost in costs)
    labels = base.label, tuned.label
    return DeltaPlan(tuple(items), only_in_base, only_in_tuned, skipped, tied, resized, labels, extra, held)


def refuse_quantised(base: WeightSource, tuned: WeightSource) -> None:
    """Raise CheckpointError where a side holds quantisation codes."""
    for source, side in ((base, "base"), (tuned, "tuned model")):
        if how := source.quantised():
            raise CheckpointError(
                f"the {side} {source.label} is quantised ({how}), and the difference of quantisation codes means "
                "nothing; dequantise it first (model.dequantize() of transformers, then save_pretrained) and pass that"
            )


def check_shapes(name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
    """Raise CheckpointError when a weight has different shapes on the two sides."""
    if base != tuned:
        raise CheckpointError(
            f"{name} is {base} in the base and {tuned} in the tuned model; use the checkpoint that was tuned"
        )


def patterns(given: str | Iterable[str] | None, name: str) -> list[str] | None:
    """A pattern, or patterns, as a list.

    Raises:
        InvalidTypeError: one is no string.
    """
    if given is None:
        return None
    found = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(pattern, str) for pattern in found):
        raise InvalidTypeError(f"{name} must be a pattern or a list of patterns, found {found!r}")
    return found


def memory_limit(given: int | str | None) -> int | None:
    """`max_memory=` in bytes: a number, or text such as "2GB", "500 MB", "1.5GiB".

    Raises:
        InvalidArgumentError: it is neither, or not positive.
    """
    if given is None:
        return None
    limit: float = 0
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", given.upper())
        limit = float(match[1]) * _SUFFIX.get(match[2], 0) if match else 0
    elif isinstance(given, int) and not isinstance(given, bool):
        limit = given
    if limit < 1:
        raise InvalidArgumentError(f"max_memory={given!r} is neither a number of bytes nor a size such as '2GB'")
    return int(limit)


def show_bytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    unit, *larger = "B", "kB", "MB", "GB", "TB"
    while larger and count >= 999.5:
        count, unit = count / 1000, larger.pop(0)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"


def _items(
    name: str,
    base_name: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    sizes: tuple[int, int],
    rows: int | None,
    note: str,
    matrices: bool,
) -> list[Item]:
    if rows is not None:
        nbytes = sizes[0] // before[0] * rows, sizes[1] // after[0] * rows
        return [Item(name, base_name, name, 0, rows, False, (rows, after[1]), nbytes, note)]
    if matrices and len(after) == 3:
        count, shape = after[0], after[1:]
        part = sizes[0] // count, sizes[1] // count
        note = f"{note}; one of {count} stacked matrices" if note else f"one of {count} stacked matrices"
        return [Item(f"{name}[{e}]", base_name, name, e, e + 1, True, shape, part, note) for e in range(count)]
    return [Item(name, base_name, name, 0, None, False, after, sizes, note)]


def _refuse_same_names(items: list[Item]) -> None:
    names: set[str] = set()
    for item in items:
        if item.name in names:
            raise CheckpointError(f"two tensors would be called {item.name}; exclude= one of them")
        names.add(item.name)


def _are_tokens(base: WeightSource, base_rows: int, tuned: WeightSource, tuned_rows: int) -> bool:
    """Whether these numbers of rows are the sizes of the two vocabularies; False without configs."""
    sizes = []
    for config in (base.config, tuned.config):
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        sizes.append(getattr(config, "vocab_size", None))
    return sizes == [base_rows, tuned_rows]


def _unmatched(
    source: WeightSource, matched: list[str], names: list[str], selected: Any, tied: dict[str, str]
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


def _unsuitable(source: WeightSource, name: str, matrices: bool) -> str:
    shape, dtype = source.shape(name), source.dtype(name)
    if not matrices:
        return "" if dtype is not None else "an unknown dtype"
    if len(shape) == 3 and min(shape[1:]) < _EXPERT_SIDE and "expert" not in name:
        return "3-D, and too narrow for a stack of matrices"
    if len(shape) not in (2, 3) or 0 in shape:
        return f"{len(shape)}-D" + (" and empty" if 0 in shape else "")
    if dtype not in FLOATS:
        return f"{dtype or 'an unknown dtype'}, not a floating-point matrix; dequantise it first"
    return ""


def _by_reason(skipped: dict[str, str]) -> list[tuple[str, str]]:
    """Each reason with the first names that it holds for."""
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    return [
        (why, ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else ""))
        for why, names in reasons.items()
    ]


def _grouped(items: tuple[Item, ...]) -> list[tuple[str, list[Item]]]:
    """The matrices of one stack together."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.tuned, []).append(item)
    return list(groups.items())
