"""The oracle of the sweep tests: one unpadded sample at a time, one full forward for each variant, a hook that clones
and assigns. It knows nothing of bkdfast: module paths are written out a second time (`tests.hf.plain`), positions are
counted in plain Python, metrics are written down from the whole logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tests.hf import zoo
from tests.hf.plain import PATHS

HEADS, ATTENTION, MLP, RESIDUAL = "heads", "attention", "mlp", "residual"


@dataclass(frozen=True)
class Place:
    """One edited vector: which sample, layer and head (0 at the other sites), which token, the how manieth edited."""

    sample: int
    layer: int
    head: int
    token: int
    index: int
    prompt: int  # tokens of the sample's prompt


@dataclass(frozen=True)
class Change:
    """`x[token] = value(x[token], place)` at the tokens that `at` names, in one head or at one site of a layer."""

    layer: int
    head: int
    at: object
    value: Callable[[torch.Tensor, Place], torch.Tensor]
    site: str = HEADS


@dataclass(frozen=True)
class Measure:
    """A metric: what follows the prompts, and a number from `(logits [T, vocab], unedited ones, tokens, prompt, n)`."""

    targets: Sequence[Sequence[int]] | None
    score: Callable[[torch.Tensor, torch.Tensor, list[int], int, int], torch.Tensor]


def prompts_of(batches) -> list[list[int]]:
    """The token ids of every sample, without padding."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            found.append([token for token, real in zip(ids, mask, strict=True) if real])
    return found


def tokens_of(at, prompt: int, total: int, sample: int) -> list[int]:
    """Tokens that `at` names in a row of `prompt` tokens, `total` with what follows."""
    named = {"all": range(total), "prompt": range(prompt), "generated": range(prompt, total)}
    if isinstance(at, str):
        return [prompt - 1] if at == "last_prompt" else list(named[at])
    if isinstance(at, slice):
        from_the_end = (at.start or 0) < 0 or (at.stop or 0) < 0
        return list(range(prompt if from_the_end else total))[at]
    if isinstance(at, int):
        return [at if at >= 0 else prompt + at]
    return [int(at[sample])]


class Brute:
    """A model and its samples.

    Args:
        model: the model.
        paths: (blocks, attention output projection in a block, MLP output in a block); or a family of the zoo.
        batches: padded batches of prompts.
        heads: heads of a layer.
        call: how a sample `[1, T]` becomes logits `[T, vocab]`.
    """

    def __init__(self, model, paths, batches, *, heads: int = zoo.HEADS, call=None) -> None:
        self.model, self.heads = model, heads
        if isinstance(paths, str):
            paths = (*PATHS[paths][:2], "mlp" if paths == "mixtral" else PATHS[paths][2])
        blocks, attention, mlp = paths
        self.blocks = list(model.get_submodule(blocks))
        self.modules = {HEADS: attention, ATTENTION: attention, MLP: mlp, RESIDUAL: ""}
        self.prompts = prompts_of(batches)
        self.call = call or (lambda ids: model(input_ids=ids).logits[0])
        self._runs: tuple[object, dict] = (None, {})

    def logits(self, tokens: list[int], changes: Sequence[Change], prompt: int, sample: int) -> torch.Tensor:
        """`[T, vocab]` of one sample with the changes."""
        with torch.no_grad(), self._changed(changes, prompt, len(tokens), sample):
            return self.call(torch.tensor([tokens]))

    def _run(self, variants, v: int | None, tokens: list[int], sample: int) -> torch.Tensor:
        """Logits of a variant (None: unedited), kept for other metrics of the same variants."""
        if self._runs[0] is not variants:
            self._runs = (variants, {})
        key = (v, tuple(tokens), sample)
        if key not in self._runs[1]:
            changes = [] if v is None else variants[v]
            self._runs[1][key] = self.logits(tokens, changes, len(self.prompts[sample]), sample)
        return self._runs[1][key]

    def scores(self, variants: Sequence[Sequence[Change]], measure: Measure) -> tuple[torch.Tensor, torch.Tensor]:
        """The metric of every variant and sample `[V, N]`, and without changes `[N]`; float64."""
        scores = torch.full((len(variants), len(self.prompts)), torch.nan, dtype=torch.float64)
        base = torch.full((len(self.prompts),), torch.nan, dtype=torch.float64)
        for n, ids in enumerate(self.prompts):
            tokens = ids + list(measure.targets[n] if measure.targets else [])
            plain = self._run(variants, None, tokens, n)
            base[n] = measure.score(plain, plain, tokens, len(ids), n)
            for v in range(len(variants)):
                scores[v, n] = measure.score(self._run(variants, v, tokens, n), plain, tokens, len(ids), n)
        return scores, base

    def effects(self, variants: Sequence[Sequence[Change]], measure: Measure) -> torch.Tensor:
        """`[V, N]` float64, metric with the changes minus metric without."""
        scores, base = self.scores(variants, measure)
        return scores - base

    def values(self, site: str, sample: int, follows: Sequence[int] = ()) -> torch.Tensor:
        """`[T, L, W]`, what flows through a site in the unedited run of one sample."""
        found: dict[int, torch.Tensor] = {}
        handles = []
        for layer, block in enumerate(self.blocks):
            module = block.get_submodule(self.modules[site])
            if site == HEADS:
                handles.append(
                    module.register_forward_pre_hook(lambda m, a, layer=layer: found.__setitem__(layer, a[0].clone()))
                )
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, o, layer=layer: found.__setitem__(layer, _first(o).clone())
                    )
                )
        try:
            tokens = [*self.prompts[sample], *follows]
            self.logits(tokens, [], len(self.prompts[sample]), sample)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer].view(len(tokens), -1) for layer in range(len(self.blocks))], 1)

    @contextlib.contextmanager
    def _changed(self, changes: Sequence[Change], prompt: int, total: int, sample: int) -> Iterator[None]:
        def changed(change: Change, x: torch.Tensor) -> torch.Tensor:
            x, shape = x.clone().view(1, total, -1), x.shape  # OPT flattens tokens
            width = x.shape[-1] // self.heads if change.site == HEADS else x.shape[-1]
            own = slice(change.head * width, (change.head + 1) * width)
            for i, token in enumerate(tokens_of(change.at, prompt, total, sample)):
                place = Place(sample, change.layer, change.head, token, i, prompt)
                x[0, token, own] = change.value(x[0, token, own].clone(), place).to(x.dtype)
            return x.view(shape)

        def before(change: Change):
            return lambda module, args: (changed(change, args[0]), *args[1:])

        def after(change: Change):
            def hook(module, args, output):
                new = changed(change, _first(output))
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return hook

        handles = []
        for change in changes:
            module = self.blocks[change.layer].get_submodule(self.modules[change.site])
            if change.site == HEADS:
                handles.append(module.register_forward_pre_hook(before(change)))
            else:
                handles.append(module.register_forward_hook(after(change)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first(output):
    return output[0] if isinstance(output, tuple) else output


# Metrics, from whole logits.


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits.to(wide), -1)


def logprob(targets: Sequence[Sequence[int]]) -> Measure:
    """Mean log-probability of the targets' tokens."""

    def score(logits, base, tokens, prompt, n):
        found = logprobs(logits)
        return sum(found[i - 1, tokens[i]].double() for i in range(prompt, len(tokens))) / (len(tokens) - prompt)

    return Measure(targets, score)


def logit_diff(right: int, wrong: int) -> Measure:
    """Logit of one token minus that of another at the last prompt token."""
    return Measure(None, lambda logits, base, tokens, prompt, n: logits[prompt - 1, right] - logits[prompt - 1, wrong])


def close(found: torch.Tensor, want: torch.Tensor, *, rtol: float = 1e-4, atol: float = 2e-5, least: float = 1e-2):
    """Effects agree, and are far above what is tolerated."""
    assert want[torch.isfinite(want)].abs().max() > least, f"the largest effect is {want.abs().max()}: proves nothing"
    torch.testing.assert_close(found.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)
