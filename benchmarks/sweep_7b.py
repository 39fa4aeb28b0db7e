"""All heads of a 7B model on a GPU: `python -m benchmarks.sweep_7b` (part of `bash benchmarks/gpu.sh`).

Llama-2-7B's shape with random weights made on the device, 96 prompts of 256 tokens, a target of 8: the mean z of
triggered prompts patched into every head at the last prompt token, one head after the other, as backdoor attribution
does. Next to it the loop that people write, one full forward a head with a hook that clones and assigns, at batch 96
and at batch 1; of the loop a sample of heads is timed and the rest is reckoned. Effects of the sampled heads are
compared first. Writes benchmarks/results/sweep-7b-<gpu>.json after every step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import bkdfast as bf
from benchmarks.run import RESULTS, machine, slug
from bkdfast.sweep.plan import matmul_rate


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--sample", type=int, default=6, help="heads of the loop that are timed (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    facts = machine(device)
    out = options.out or RESULTS / f"sweep-7b-{slug(facts['name'])}.json"
    found: dict = {"machine": facts, "options": {k: str(v) for k, v in vars(options).items() if k != "out"}}

    def keep(**more: object) -> None:
        found.update(more)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(", ".join(f"{name} {value}" for name, value in more.items()))

    model = build(options, device, dtype)
    ids, target, source = task(options, device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    metric = bf.metrics.target_prob(target.tolist())
    asked = dict(edit=bf.Patch(source), at="last_prompt", metric=metric, progress=False)
    plan = bf.sweep(model, batch, plan=True, **asked)  # type: ignore[arg-type]
    print(plan)
    # Random data: on zeros a matrix product draws less power and runs faster.
    rate = matmul_rate(8192, options.width, dtype, device)
    keep(plan_flops=plan.flops, loop_flops=plan.loop_flops, flop_ratio=plan.loop_flops / plan.flops, matmul_rate=rate)

    places = [(layer, head) for layer in range(options.layers) for head in range(options.heads)]
    sample = random.Random(0).sample(places, min(options.sample, len(places)))
    base = forward(model, ids, target, None, options)
    loop = {place: forward(model, ids, target, (*place, source[place]), options) - base for place in sample}
    ours = bf.sweep(model, batch, heads=sample, **asked)  # type: ignore[arg-type]
    worst = max((ours.effects[place].to(device) - effect).abs().max().item() for place, effect in loop.items())
    largest = max(effect.abs().max().item() for effect in loop.values())
    keep(largest_effect=largest, largest_difference=worst)
    if not worst <= max(0.1 * largest, 1e-6):
        raise SystemExit(f"the loop and the sweep disagree by {worst}, effects are up to {largest}: nothing is timed")

    started = now(device)
    bf.sweep(model, batch, **asked)  # type: ignore[arg-type]
    seconds = now(device) - started
    keep(sweep_seconds=seconds, share_of_matmul_rate=plan.flops / seconds / rate)
    if device.type == "cuda":
        keep(sweep_peak_bytes=torch.cuda.max_memory_allocated(device))
    times = [timed(device, lambda p=place: forward(model, ids, target, (*p, source[p]), options)) for place in sample]
    whole = statistics.median(times) * (len(places) + 1)
    keep(
        loop_seconds=whole, speedup=whole / seconds, share_of_flop_ratio=whole / seconds * plan.flops / plan.loop_flops
    )
    rows = range(min(4, len(ids)))
    times = [
        timed(device, lambda p=place, r=row: forward(model, ids[r : r + 1], target, (*p, source[p]), options))
        for place in sample
        for row in rows
    ]
    whole = statistics.median(times) * (len(places) + 1) * len(ids)
    keep(loop_batch_1_seconds=whole, speedup_over_batch_1=whole / seconds)


def build(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A Llama of the shape, weights drawn on the device, large enough that one head shows."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5, generator=generator)
    return model


def task(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts `[N, T]`, target `[n]`, source `[L, H, Dh]`."""
    generator = torch.Generator(device).manual_seed(1)
    draw = dict(device=device, generator=generator)
    ids = torch.randint(3, options.vocab, (options.prompts, options.tokens), **draw)
    target = torch.randint(3, options.vocab, (options.targets,), **draw)
    shape = options.layers, options.heads, options.width // options.heads
    return ids, target, torch.randn(shape, **draw)


def forward(
    model: torch.nn.Module, ids: torch.Tensor, target: torch.Tensor, edit: tuple | None, options: argparse.Namespace
) -> torch.Tensor:
    """The target's length-normalised probability `[B]` by one full forward, as a loop with hooks computes it."""
    n, last = len(target), ids.shape[1] - 1
    full = torch.cat([ids, target.expand(len(ids), n)[:, :-1]], 1)
    handle = None
    if edit is not None:
        layer, head, value = edit
        own = slice(head * len(value), (head + 1) * len(value))

        def hook(module: torch.nn.Module, args: tuple):
            z = args[0].clone()
            z[:, last, own] = value.to(z)
            return (z,)

        handle = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj").register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=full, logits_to_keep=n, use_cache=False).logits
    if handle is not None:
        handle.remove()
    logprob = logits.float().log_softmax(-1).gather(-1, target.expand(len(ids), n)[..., None]).squeeze(-1)
    return logprob.mean(1).exp()


def timed(device: torch.device, call) -> float:
    """Seconds of one call."""
    started = now(device)
    call()
    return now(device) - started


def now(device: torch.device) -> float:
    """The clock, once the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
