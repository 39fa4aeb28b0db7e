"""The steps of the audit in plain PyTorch, as one would write them without this library: for comparison only.

Each has a `compare_*` that says in words how far its result is from the engine's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bkdfast.checkpoint import load_model
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.monitor import Observations
from bkdfast.svd import Directions
from bkdfast.sweep import SweepResult


def directions(base: str | Path, tuned: str | Path, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load both models, subtract, full SVD: (vectors `[L, K, D]`, singular values `[L, K]`)."""
    from bkdfast.hf.families import describe

    before, after = load_model(base), load_model(tuned)
    spec = describe(after)
    vectors, values = [], []
    for block in spec.blocks:
        rows, strength = [], []
        for path in (block.out_proj, block.down_proj):
            if path is None:
                continue
            delta = after.get_parameter(f"{path}.weight") - before.get_parameter(f"{path}.weight")
            u, s, _ = torch.linalg.svd((delta.T if spec.transposed else delta).detach(), full_matrices=False)
            rows.append(u[:, :rank].T)
            strength.append(s[:rank])
        vectors.append(torch.cat(rows))
        values.append(torch.cat(strength))
    return torch.stack(vectors), torch.stack(values)


def compare_directions(ours: Directions, other: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Relative error of the singular values, and of the vectors where their gap to the next is not tiny."""
    vectors, values = other
    error = ((ours.strength - values).abs() / values.amax(-1, keepdim=True)).max().item()
    cosine = (ours.vectors * vectors).sum(-1).abs().clamp(max=1)
    return f"singular values within {error:.0e}, cosines of the vectors at least {cosine.min().item():.4f}"


def attribution(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[dict],
    triggered: Sequence[dict],
    targets: Sequence[Sequence[int]],
    progress: bool,
) -> torch.Tensor:
    """One full forward with a hook for every head: effects `[L, H, N]`."""
    from bkdfast.hf.batch import complete
    from bkdfast.sweep.metrics import target_prob

    metric = target_prob(list(targets))
    sums: list = [0.0] * spec.layers
    count = 0
    for batch in triggered:
        batch = complete(model, batch, spec)
        last = prompt_ends(batch)[1]
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int, kept: dict = kept):
            def hook(module, args):
                kept[layer] = args[0].detach()

            return hook

        handles = [
            submodule(model, block.out_proj).register_forward_pre_hook(keep(layer))
            for layer, block in enumerate(spec.blocks)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        rows = torch.arange(len(last), device=last.device)
        sums = [total + kept[layer][rows, last].double().sum(0) for layer, total in enumerate(sums)]
        count += len(last)
    means = [(total / count).float() for total in sums]

    effects, first = [], 0
    bar = tqdm(
        total=len(batches) * sum(block.heads for block in spec.blocks),
        desc="plain hooks",
        unit="forward",
        disable=not progress,
    )
    with bar:
        for batch in batches:
            scored = metric.extend(batch, first)
            inputs = complete(model, scored.batch, spec)
            last = prompt_ends(batch)[1].to(inputs["input_ids"].device)
            rows = torch.arange(len(last), device=last.device)
            first += len(last)

            def score(inputs=inputs, scored=scored, rows=rows) -> torch.Tensor:
                with torch.no_grad():
                    logits = model(**inputs).logits
                return metric.score(logits[rows[:, None], scored.read.to(rows.device)].cpu(), scored)

            base = score()
            part = torch.empty(spec.layers, spec.blocks[0].heads, len(last))
            for layer, block in enumerate(spec.blocks):
                for head in range(block.heads):
                    own = slice(head * block.head_dim, (head + 1) * block.head_dim)

                    def patch(module, args, layer=layer, own=own, last=last, rows=rows):
                        z = args[0].clone()
                        z[rows, last, own] = means[layer][own].to(z)
                        return (z,)

                    handle = submodule(model, block.out_proj).register_forward_pre_hook(patch)
                    part[layer, head] = score() - base
                    handle.remove()
                    bar.update()
            effects.append(part)
    return torch.cat(effects, -1)


def compare_attribution(ours: SweepResult, other: torch.Tensor) -> str:
    """Largest difference of any cell, next to the largest effect."""
    error = (ours.effects - other).abs().max().item()
    return f"effects {_within(error)} (largest effect {other.abs().max().item():.2f})"


@contextlib.contextmanager
def zeroed(model: torch.nn.Module, spec: ModelSpec, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Zero heads at every position with one clone-and-assign hook a layer."""
    handles = []
    for layer in sorted({layer for layer, _ in heads}):
        block = spec.blocks[layer]
        mine = [head for at_layer, head in heads if at_layer == layer]

        def hook(module, args, block=block, mine=mine):
            z = args[0].clone()
            for head in mine:
                z[..., head * block.head_dim : (head + 1) * block.head_dim] = 0
            return (z,)

        handles.append(submodule(model, block.out_proj).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: torch.nn.Module, spec: ModelSpec, vectors: torch.Tensor, batches: Sequence[dict]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hooks and `cosine_similarity`: smallest and largest cosine of each prompt, `[R, L, K]` each."""
    low, high = [], []
    device = next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        real = batch["attention_mask"].bool()[:, :, None]
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int, found: dict = found):
            def hook(module, args, output):
                stream = output[0] if isinstance(output, tuple) else output
                found[layer] = torch.nn.functional.cosine_similarity(
                    stream[:, :, None].float(), vectors[layer].to(device), dim=-1
                )

            return hook

        handles = [
            submodule(model, block.block).register_forward_hook(keep(layer)) for layer, block in enumerate(spec.blocks)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        cosines = [found[layer] for layer in range(spec.layers)]
        low.append(torch.stack([c.where(real, torch.inf).amin(1) for c in cosines], 1).cpu())
        high.append(torch.stack([c.where(real, -torch.inf).amax(1) for c in cosines], 1).cpu())
    return torch.cat(low), torch.cat(high)


def compare_observations(ours: Observations, other: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Largest difference of any extreme."""
    error = max((ours.low[:, 0] - other[0]).abs().max().item(), (ours.high[:, 0] - other[1]).abs().max().item())
    return f"cosines {_within(error)}"


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "identical"
