"""What the sweep benchmarks compute, without bkdfast: the model, the prompts, the effects, the plain loops, the flops.

Peers import this file in their own environments, so it needs torch, transformers and safetensors only.

The task is that of backdoor attribution: for every head, replace z at the last prompt token by its mean over triggered
prompts and measure the change of the target's length-normalised probability, teacher-forced.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Sweep = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of its prompts; every prompt has `tokens` tokens, every target `targets`."""

    layers: int = 8
    heads: int = 8
    width: int = 512
    mlp: int = 1376
    vocab: int = 1000
    batch: int = 4
    tokens: int = 128
    targets: int = 8
    dtype: str = "float32"
    everywhere: bool = False  # zero a head at every position, instead of patching it at the last prompt token

    @property
    def name(self) -> str:
        """As the tables show it."""
        edit = "zero everywhere" if self.everywhere else "patch the last prompt token"
        model = f"{self.layers} x {self.heads} heads, d={self.width}"
        return f"{edit}, {model}, T={self.tokens}, B={self.batch}, {self.dtype}"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def columns(self) -> int:
        """Tokens a row of the model's input: the target's last token is predicted, not read."""
        return self.tokens + self.targets - 1

    def flops(self) -> dict[str, float]:
        """Floating-point operations (a multiply-add is two) of the whole sweep.

        `loop`: one full forward for each head, and one without edits, logits at the read positions only.
        `plan`: one full forward, and for a head of layer l, from the first edited position on: the MLP of block l, the
        blocks after it, and the logits that are read. The edited head's way through the output projection counts too.
        `least`: the same, but block l only at the edited positions, since the others leave it as they were.
        """
        projections, mlp = 8.0 * self.width**2, 6.0 * self.width * self.mlp
        per_token = projections + mlp
        suffix = self.columns if self.everywhere else self.targets
        edited = self.columns if self.everywhere else 1
        logits = 2.0 * self.targets * self.width * self.vocab

        def attention(queries: int) -> float:  # the last `queries` tokens over all keys before them, and their own
            keys = queries * (self.columns - queries) + queries * (queries + 1) / 2
            return 4.0 * self.width * keys

        forward = self.layers * (self.columns * per_token + attention(self.columns)) + logits
        later = suffix * per_token + attention(suffix)  # one block after the edited one
        head = 2.0 * edited * self.head_dim * self.width
        after = self.heads * sum(later * (self.layers - 1 - layer) for layer in range(self.layers))
        variants = self.layers * self.heads
        return {
            "loop": self.batch * forward * (variants + 1),
            "plan": self.batch * (forward + after + variants * (head + suffix * mlp + logits)),
            "least": self.batch * (forward + after + variants * (head + edited * mlp + logits)),
        }


@dataclass
class Task:
    """A model with its prompts.

    Attributes:
        shape: the sizes.
        model: a Llama in eval mode.
        ids: `[B, T + n - 1]` int64, prompts and all of the targets but the last token.
        targets: `[B, n]` int64.
        source: `[L, H, Dh]` float32, what z is replaced by.
    """

    shape: Shape
    model: torch.nn.Module
    ids: torch.Tensor
    targets: torch.Tensor
    source: torch.Tensor

    @property
    def prompts(self) -> torch.Tensor:
        """`[B, T]`."""
        return self.ids[:, : self.shape.tokens]

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """Target probability `[B]`, `(prod_i p_i)^(1/n)`, from the logits `[B, n, vocab]` that predict the target."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logprob = wide.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)
        return logprob.mean(1).exp()

    def effects(self, baseline: torch.Tensor, scores: list[torch.Tensor]) -> torch.Tensor:
        """`[L, H, B]` from the scores of all heads, layer by layer."""
        return torch.stack(scores).view(self.shape.layers, self.shape.heads, -1) - baseline

    def cells(self) -> Iterator[tuple[int, int, slice]]:
        """(layer, head, the head's columns of z)."""
        for layer in range(self.shape.layers):
            for head in range(self.shape.heads):
                yield layer, head, slice(head * self.shape.head_dim, (head + 1) * self.shape.head_dim)

    def save(self, folder: Path) -> None:
        """Write what `load` reads: a model folder as transformers writes it, tensors, sizes."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model.save_pretrained(folder / "model")
        tensors = {"ids": self.ids, "targets": self.targets, "source": self.source}
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "task.safetensors")
        (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(self.shape)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Task:
        """The task of a folder, its model as transformers loads it."""
        from transformers import AutoModelForCausalLM

        shape = Shape(**json.loads((folder / "shape.json").read_text(encoding="utf-8")))
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, shape.dtype)).eval()
        for weight in model.parameters():  # out of the mapped file: its pages would count as memory of the first run
            weight.data = weight.data.clone()
        return cls(shape, model, **load_file(folder / "task.safetensors"))

    def wide(self) -> Task:
        """The same numbers in float64, norms included (transformers' own round their input to float32)."""
        model = copy.deepcopy(self.model).double()
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_norm, module.weight, module.variance_epsilon)
        return dataclasses.replace(self, model=model, source=self.source.to(self.model.dtype).double())


def _norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def build(shape: Shape, *, seed: int = 0) -> Task:
    """A random model and random prompts.

    Weights are far larger than at initialisation, so that a head's effect is far above rounding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                spread = 0.5 if "embed" in name else 2.0 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    model = model.to(getattr(torch, shape.dtype)).eval()
    rows = torch.randint(3, shape.vocab, (shape.batch, shape.tokens + shape.targets), generator=generator)
    triggered = torch.randint(3, shape.vocab, (8, min(shape.tokens, 64)), generator=generator)
    source = torch.zeros(shape.layers, shape.heads, shape.head_dim)

    def keep(layer: int) -> Callable:
        def hook(module, args):
            source[layer] = args[0][:, -1].double().mean(0).view(shape.heads, shape.head_dim)

        return hook

    handles = [block.self_attn.o_proj.register_forward_pre_hook(keep(i)) for i, block in enumerate(model.model.layers)]
    with torch.no_grad():
        model(input_ids=triggered, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return Task(shape, model, rows[:, :-1], rows[:, shape.tokens :], source)


@contextlib.contextmanager
def edited(task: Task, layer: int, own: slice, values: torch.Tensor, column: int) -> Iterator[None]:
    """Forwards in this context run with one head changed, by the plainest hook there is: clone and assign."""

    def hook(module, args):
        z = args[0].clone()
        if task.shape.everywhere:
            z[..., own] = 0
        else:
            z[:, column, own] = values
        return (z,)

    handle = task.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def hook_loop(task: Task, heads: set[int] | None = None) -> torch.Tensor:
    """Effects `[L, H, B]` from one full forward for each head, logits only where they are read.

    With `heads` only those heads of each layer run, and the others are NaN.
    """
    kept = {"use_cache": False, "logits_to_keep": task.shape.targets}
    source, column = task.source.to(task.model.dtype), task.shape.tokens - 1
    baseline = task.score(task.model(input_ids=task.ids, **kept).logits)
    scores = []
    for layer, head, own in task.cells():
        if heads is not None and head not in heads:
            scores.append(torch.full_like(baseline, torch.nan))
            continue
        with edited(task, layer, own, source[layer, head], column):
            scores.append(task.score(task.model(input_ids=task.ids, **kept).logits))
    return task.effects(baseline, scores)


@torch.no_grad()
def cached_loop(task: Task) -> torch.Tensor:
    """The same numbers, with the prompt before the edited token run once and kept in transformers' own cache."""
    from transformers import DynamicCache

    shape, begin = task.shape, task.shape.tokens - 1
    source = task.source.to(task.model.dtype)
    cache = DynamicCache(config=task.model.config)
    task.model(input_ids=task.ids[:, :begin], past_key_values=cache, logits_to_keep=1)

    def run() -> torch.Tensor:
        logits = task.model(input_ids=task.ids[:, begin:], past_key_values=cache).logits
        cache.crop(-shape.targets)
        return task.score(logits)

    baseline, scores = run(), []
    for layer, head, own in task.cells():
        with edited(task, layer, own, source[layer, head], 0):
            scores.append(run())
    assert baseline.shape == (shape.batch,)
    return task.effects(baseline, scores)
