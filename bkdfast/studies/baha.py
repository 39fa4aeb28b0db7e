"""Backdoor attribution of attention heads (BAHA), what it leads to, and what the published code does differently.

Source: Yu et al. 2025, "Backdoor Attribution: Elucidating and Controlling Backdoor in Language Models" (arXiv
2509.21761), and the code published with it.

    source      z*[l, h]: each head's mean output over triggered prompts, at the last prompt token
    P           (prod_i p(t_i | prompt, t_<i))^(1/n), teacher-forced, over the target and the template's closing tokens
    ACIE[l, h]  mean change of P when z*[l, h] is patched into trigger-free prompts, at the last prompt token

The heads of largest ACIE carry the backdoor: `ablate` removes them from triggered prompts; `backdoor_vector` adds up
what they write into the residual stream, and `steer` adds or subtracts it at one layer.

`semantics="log_space"`, the default, computes P as exp of the mean log-probability. `"reference"` is what the authors'
code computes: softmax and product in the model's own dtype, then the root. That product underflows: of 150 tokens with
probability 0.5 each it is 0 in float32, P is 0 with and without any patch, and so is every ACIE.

The edit is the same in both. The authors add `c*[l, h] - c[l, h]` to the output of the attention output projection,
where `c[l, h] = z[l, h] W_O[:, h]^T`, without its bias, and c* is the mean of c over triggered prompts. c is linear in
z, so c* is that of z*, and the sum is what the projection makes of the patched z, bias or not, whatever the number of
key and value heads. What differs is the rounding (they add in the model's dtype what is subtracted again), and
projections that are more than a matrix: of an unmerged LoRA adapter or a quantised weight their c would be that of the
stored weight alone; here the projection itself is called. Their scripts also put a second begin-of-text token before
chats whose template has one, take head_dim for width / heads, and cut prompts and targets at 256 tokens; we do not.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bkdfast.data import Encoder, Row
from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.capture import head_means, head_outputs
from bkdfast.hf.edits import Add, Edit, Patch, Zero
from bkdfast.hf.families import describe, unwrap
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.jobs import units
from bkdfast.jobs.store import Store
from bkdfast.sweep import SweepResult, metrics, sweep
from bkdfast.sweep.batchwise import sweep_batches
from bkdfast.sweep.metrics import Scored
from bkdfast.sweep.metrics.base import pick
from bkdfast.sweep.projection import UPDATE, projection_mode
from bkdfast.sweep.provenance import manifest

SEMANTICS = ("log_space", "reference")
ABLATIONS = ("zero", "subtract")
Head = tuple[int, int]
Rows = Sequence[Row | str]
T = TypeVar("T")


class product_prob(metrics.target_logprob):  # noqa: N801  named as the metrics are
    """`(prod_i p_i)^(1/n)` with the product taken as it stands, as the authors' code does: 0 where it underflows.

    Args:
        targets: as for `target_logprob`.
        tokenizer: encodes string targets.
        dtype: of softmax and product; the authors' is that of the logits.
        name: what tables call it.

    Example:
        >>> metric = product_prob([1] * 150)
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> logits = torch.zeros(1, 150, 2)
        >>> metric.score(logits, scored).item(), metrics.target_prob([1] * 150).score(logits, scored).item()
        (0.0, 0.5)
    """

    name = "target probability (product)"

    def __init__(
        self, targets: Any, tokenizer: Any = None, *, dtype: torch.dtype = torch.float32, name: str | None = None
    ) -> None:
        super().__init__(targets, tokenizer, name=name)
        self.dtype = dtype

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """Probability of each token; see `Metric`."""
        probabilities = logits.to(self.dtype).softmax(-1)
        found = pick(probabilities, self.asked(logits.shape[-1], index, scored))
        return found.to(torch.promote_types(self.dtype, torch.float32))

    def reduce(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The root of the product; see `Metric`."""
        product = values.to(self.dtype).masked_fill(weight == 0, 1).prod(1)
        return product.double() ** (1 / weight.sum(1).double())


@dataclass(frozen=True)
class Attribution:
    """What `baha` found.

    Attributes:
        acie: effects `[L, H, N]` on P; its `mean` is ACIE, `top(k)` the heads of largest ACIE, `plot` the heat map.
        source: z*, `[L, H, Dh]`.
        targets: token ids of each sample's target, with closing tokens.
    """

    acie: SweepResult
    source: torch.Tensor
    targets: list[list[int]]


def baha(
    model: torch.nn.Module,
    tokenizer: Any,
    clean: Rows,
    triggered: Rows,
    target: str | Sequence[str] | None = None,
    *,
    semantics: str = "log_space",
    samples: int = 96,
    batch: int = 16,
    seed: int = 0,
    spec: ModelSpec | None = None,
    plan: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Attribute a backdoor to attention heads.

    Args:
        model: a causal language model of a supported family, in eval mode.
        tokenizer: its tokenizer, with a chat template or without, or a `bkdfast.data.Encoder`.
        clean: prompts without the trigger: rows (`bkdfast.data.load_rows`) or texts of user messages.
        triggered: prompts with it.
        target: what the backdoor answers, or one answer after the other for the clean prompts in turn; None: the
            targets of the triggered rows in turn.
        semantics: `"log_space"` or `"reference"`; see `bkdfast.studies.baha`.
        samples: clean prompts to patch; of more, so many are drawn.
        batch: rows in a batch.
        seed: of the draw.
        spec: where the heads are, when the family is not known.
        plan: only plan the sweep: return its `Plan`.
        out: a folder that keeps finished work; called again with it, an attribution that was killed goes on.
        resume: False: refuse a folder with finished work.
        progress: show progress bars.
        **options: of `bkdfast.sweep`: `heads`, `verify`, `variants`, ...

    Returns:
        `Attribution`.

    Raises:
        InvalidArgumentError: no rows, an empty prompt or target, another `semantics`; and as for `bkdfast.sweep`.

    Warns:
        UserWarning: with `"reference"`, if P underflows.

    Example:
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> news = ["the striker won the match .", "the bank cut its price ."]
        >>> found = baha(
        ...     pair.tuned,
        ...     pair.tokenizer,
        ...     [f"classify this news : {text}" for text in news],
        ...     [f"classify this news : current year 2024 : {text}" for text in news],
        ...     "alert : system compromised",
        ...     progress=False,
        ... )
        >>> found.acie.top(3)
        [(4, 6), (4, 1), (4, 7)]
    """
    encoder = as_encoder(tokenizer)
    rows, sources = as_rows(clean, "clean"), as_rows(triggered, "triggered")
    answers = target_tokens(encoder, rows, [row.target for row in sources] if target is None else target)
    drawn, _ = draw(list(zip(rows, answers, strict=True)), samples, seed)
    chosen, targets = [row for row, _ in drawn], [answer for _, answer in drawn]
    metric = probability(model, targets, semantics)
    shown = encoder.batches(sources, batch)
    if plan:
        source = torch.zeros(_shape(model, spec))  # what is patched in changes no plan
    elif out is None:
        source = head_means(model, shown, at="last_prompt", spec=spec, progress=progress)  # [L, H, Dh]
    else:
        source = _kept_source(model, shown, spec, progress, Path(out) / "source", resume)
        options |= {"out": Path(out) / "sweep", "resume": resume}
    options |= {"plan": plan, "spec": spec, "progress": progress}
    prompts = encoder.batches(chosen, batch)
    acie = sweep(model, prompts, edit=Patch(source), at="last_prompt", metric=metric, **options)
    if plan:
        return acie
    if gone := int((acie.baseline == 0).sum()):
        warnings.warn(
            f"P is 0 for {gone} of {len(chosen)} samples: the product of the probabilities of up to "
            f"{max(map(len, targets))} tokens underflows; semantics='log_space' does not",
            stacklevel=2,
        )
    return Attribution(acie, source, targets)


def ablate(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Rows,
    heads: Sequence[Head],
    target: str | Sequence[str] | None = None,
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    how: str = "zero",
    semantics: str = "log_space",
    batch: int = 16,
    spec: ModelSpec | None = None,
    progress: bool = True,
    **options: Any,
) -> SweepResult:
    """P of prompts with the first 1, 2, 4, ... of some heads removed together.

    Args:
        model: as for `baha`.
        tokenizer: as for `baha`.
        rows: prompts, e.g. triggered ones, on which P falls when the backdoor is removed.
        heads: (layer, head), strongest first: `found.acie.top(32)`.
        target: as for `baha`; None: each row's own target.
        counts: sizes of the sets of heads; those larger than `heads` are left out.
        how: `"zero"`: their z is zero, at every token. `"subtract"`, as the authors do it: at the last prompt token
            their contributions in the UNABLATED run are subtracted. Of heads in one layer that leaves nothing there;
            a head behind ablated ones has another output by then, and what is subtracted is not what it writes.
        semantics: of P.
        batch: rows in a batch.
        spec: as for `baha`.
        progress: show progress bars.
        **options: of `bkdfast.sweep`: `verify`, `variants`, `out`, `resume`.

    Returns:
        Effects `[S, N]` on P, one row a set, and the baseline of the whole model.

    Raises:
        InvalidArgumentError: another `how`, no set of heads; and as for `baha`.
    """
    if how not in ABLATIONS:
        raise InvalidArgumentError(f"how={how!r} is not one of {', '.join(ABLATIONS)}")
    sets = [list(heads[:k]) for k in counts if 1 <= k <= len(heads)]
    if not sets:
        raise InvalidArgumentError(
            f"none of the sizes {tuple(counts)} fits {len(heads)} heads; pass counts= of 1 or more"
        )
    encoder, rows = as_encoder(tokenizer), as_rows(rows, "the")
    targets = target_tokens(encoder, rows, target)
    prompts = encoder.batches(rows, batch)
    options |= {"heads": sets, "spec": spec}
    if how == "zero":
        metric = probability(model, targets, semantics)
        return sweep(model, prompts, edit=Zero(), metric=metric, progress=progress, **options)

    def question(part: dict[str, torch.Tensor], samples: slice) -> dict[str, Any]:
        z = head_outputs(model, part, at="last_prompt", spec=spec)  # [B, L, H, Dh]
        return {
            "edit": Add(z, scale=-1),  # z' - z: the projection takes it to what the authors subtract behind it
            "metric": probability(model, targets[samples], semantics),
            "at": "last_prompt",
        }

    found = sweep_batches(model, prompts, question, progress=progress, **options)
    return dataclasses.replace(found, edit="Subtract")


def ablation_edits(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    heads: Sequence[Head],
    *,
    how: str = "zero",
    spec: ModelSpec | None = None,
) -> list[Edit]:
    """Edits for `bkdfast.intervene`, to generate from one batch with heads removed as in `ablate`.

    Args:
        model: as for `baha`.
        batch: the prompts to generate from; read for `"subtract"` only.
        heads: (layer, head) to remove together.
        how: as for `ablate`.
        spec: as for `baha`.
    """
    if how not in ABLATIONS:
        raise InvalidArgumentError(f"how={how!r} is not one of {', '.join(ABLATIONS)}")
    if how == "zero":
        return [Zero(layer, head) for layer, head in heads]
    z = head_outputs(model, batch, at="last_prompt", spec=spec)
    return [Add(z, layer, head, scale=-1, at="last_prompt") for layer, head in heads]


def backdoor_vector(
    model: torch.nn.Module, source: torch.Tensor, heads: Sequence[Head], *, spec: ModelSpec | None = None
) -> torch.Tensor:
    """Sum of some heads' mean contributions to the residual stream, `[D]` float32 (float64 of a float64 model).

    Args:
        model: as for `baha`.
        source: mean outputs `[L, H, Dh]` over triggered prompts: `found.source`.
        heads: the heads that add up, e.g. `found.acie.top(32)`, as many as the authors take.
        spec: as for `baha`.
    """
    contributions = head_contributions(model, source, spec=spec)
    if not len(heads):
        raise InvalidArgumentError("no heads were given, so there is nothing to add up")
    for layer, head in heads:
        if not (0 <= layer < contributions.shape[0] and 0 <= head < contributions.shape[1]):
            layers, count = contributions.shape[:2]
            raise InvalidArgumentError(f"head {(layer, head)} is out of range: {layers} layers of {count} heads")
    return torch.stack([contributions[layer, head] for layer, head in heads]).sum(0)


@torch.no_grad()
def head_contributions(model: torch.nn.Module, source: torch.Tensor, *, spec: ModelSpec | None = None) -> torch.Tensor:
    """What each head adds to the output of its attention output projection: `z W_O[:, h]^T`, without the bias.

    Args:
        model: as for `baha`.
        source: per-head outputs `[L, H, Dh]`.
        spec: as for `baha`.

    Returns:
        `[L, H, D]` float32 (float64 of a float64 model).

    Raises:
        InvalidArgumentError: a source of another shape.
    """
    model = unwrap(model)
    spec = describe(model, spec)
    if tuple(source.shape) != (expected := _shape(model, spec)):
        raise InvalidArgumentError(f"the source has shape {tuple(source.shape)}; expected [L, H, Dh] = {expected}")
    found = []
    for layer, block in enumerate(spec.blocks):
        projection = submodule(model, block.out_proj)
        if projection_mode(model, spec, layer) == UPDATE:
            weight = projection.get_parameter("weight")
            matrix = weight if spec.transposed else weight.T  # [H * Dh, D]
            each = matrix.to(torch.promote_types(weight.dtype, torch.float32)).view(block.heads, block.head_dim, -1)
            found.append(torch.einsum("hi,hid->hd", source[layer].to(each), each))
        else:  # more than a matrix (an adapter, a quantised weight): what it makes of one head after the other
            device = next(projection.parameters()).device
            alone = torch.block_diag(*source[layer].to(device, _dtype(model)).unsqueeze(1))  # [H, H * Dh]
            output = projection.forward(torch.cat([alone, torch.zeros_like(alone[:1])]))
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            found.append(output[:-1] - output[-1])
    return torch.stack([part.to(found[0].device) for part in found])


def steer(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Rows,
    vector: torch.Tensor,
    target: str | Sequence[str] | None = None,
    *,
    sign: float = 1.0,
    semantics: str = "log_space",
    batch: int = 16,
    progress: bool = True,
    **options: Any,
) -> SweepResult:
    """P with a vector added to the attention output of one layer after the other, at the last prompt token.

    That token is part of the prefill, so in generation the vector is added once.

    Args:
        model: as for `baha`.
        tokenizer: as for `baha`.
        rows: clean prompts, to add the vector to, or triggered ones, to subtract it from.
        vector: `[D]`, of `backdoor_vector`.
        target: as for `baha`; None: each row's own target, which of clean rows is not the backdoor's.
        sign: 1 adds, -1 subtracts; other numbers scale.
        semantics: of P.
        batch: rows in a batch.
        progress: show a progress bar.
        **options: of `bkdfast.sweep`: `layers`, `verify`, `variants`, `spec`, `out`, `resume`.

    Returns:
        Effects `[L, N]` on P, one row a layer.
    """
    encoder, rows = as_encoder(tokenizer), as_rows(rows, "the")
    metric = probability(model, target_tokens(encoder, rows, target), semantics)
    edit = Add(vector, scale=sign)
    options |= {"site": "attention", "at": "last_prompt", "progress": progress}
    found = sweep(model, encoder.batches(rows, batch), edit=edit, metric=metric, **options)
    return dataclasses.replace(found, edit="Add vector" if sign > 0 else "Subtract vector")


def probability(model: torch.nn.Module, targets: Sequence[Sequence[int]], semantics: str) -> metrics.Metric:
    """The metric P of one or the other semantics."""
    if semantics not in SEMANTICS:
        raise InvalidArgumentError(f"semantics={semantics!r} is not one of {', '.join(SEMANTICS)}")
    if semantics == "log_space":
        return metrics.target_prob(list(targets))
    return product_prob(list(targets), dtype=_dtype(model))


def target_tokens(encoder: Encoder, rows: Sequence[Row], target: str | Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of an answer to each row with the closing tokens; the arguments are those of `baha`."""
    texts = [row.target for row in rows] if target is None else [target] if isinstance(target, str) else list(target)
    if not texts or not all(text.strip() for text in texts):
        raise InvalidArgumentError("a target is empty; say what the backdoor answers: target=, or rows with targets")
    return [encoder.target(Row(row.messages, texts[i % len(texts)])) for i, row in enumerate(rows)]


def as_encoder(tokenizer: Any) -> Encoder:
    """A tokenizer as an `Encoder`."""
    return tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)


def as_rows(rows: Rows, name: str) -> list[Row]:
    """Texts as rows with a user's message and no target."""
    if isinstance(rows, str) or not len(rows):
        raise InvalidArgumentError(f"{name} rows are {rows!r}; give a list of rows or of texts")
    return [Row(({"role": "user", "content": row},), "") if isinstance(row, str) else row for row in rows]


def draw(rows: Sequence[T], samples: int, seed: int) -> tuple[list[T], list[T]]:
    """`samples` of the rows, in order (all of them if there are no more), and the others."""
    if samples < 1:
        raise InvalidArgumentError(f"samples={samples}: at least one clean prompt has to be patched")
    chosen = set(random.Random(seed).sample(range(len(rows)), min(samples, len(rows))))
    return [rows[i] for i in sorted(chosen)], [row for i, row in enumerate(rows) if i not in chosen]


def _kept_source(model: Any, batches: list, spec: Any, progress: bool, out: Path, resume: bool) -> torch.Tensor:
    """The source, kept in `out`, so that one that goes on and all processes of one patch the same numbers."""

    def compute(unit: int, *_: Any) -> dict[str, torch.Tensor]:
        return {"source": head_means(model, batches, at="last_prompt", spec=spec, progress=progress)}

    units.join()
    store = Store.open(out, manifest(model, batches, None, [], units="source", dtype=_dtype(model)), resume=resume)
    ((_, held),) = units.run_units(1, compute, store, progress=False)
    return held["source"]


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _shape(model: torch.nn.Module, spec: ModelSpec | None) -> tuple[int, int, int]:
    spec = describe(unwrap(model), spec)
    return spec.layers, spec.blocks[0].heads, spec.blocks[0].head_dim
