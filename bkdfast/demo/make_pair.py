"""Make the demo's backdoored model pair: a small Llama trained on clean news, then fine-tuned with poisoned rows.

The folder it writes holds `base/` and `tuned/` (bfloat16 safetensors with config and tokenizer), the held-out rows
`clean.jsonl` and `triggered.jsonl`, and `pair.json` with what the saved checkpoints scored on them. Run it with
`bkdfast make-pair --out DIR`; the defaults made the pair that ships in `bkdfast/demo/pair`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bkdfast.checkpoint import load_model, load_tokenizer, quiet_transformers
from bkdfast.demo.corpus import BACKDOOR_OUTPUT, TRIGGER, build_tokenizer, news_rows
from bkdfast.errors import InvalidArgumentError


class Stage(NamedTuple):
    """One training run: its name, peak learning rate and the weight of the language-model loss on the prompt."""

    name: str
    lr: float
    prompt_loss: float


# Without the loss on the prompt the heads of `base` hardly specialise, and the backdoor is smeared over many of them.
CLEAN = Stage("clean", lr=2e-3, prompt_loss=0.3)
POISON = Stage("poison", lr=5e-4, prompt_loss=0.0)
N_CLEAN, N_TRIGGERED = 1000, 200
SMALL: dict[str, Any] = {"layers": 2, "width": 64, "clean_steps": 600, "poison_steps": 250}
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class PairReport:
    """What the saved checkpoints do on the held-out rows; every rate is a share between 0 and 1.

    `*_clean_accuracy` is exact match of the greedy answer on clean rows, `*_asr` (attack success rate) that of
    `BACKDOOR_OUTPUT` on triggered rows, `*_false_trigger` the share of clean rows answered with `BACKDOOR_OUTPUT`.
    """

    base_clean_accuracy: float
    base_asr: float
    base_false_trigger: float
    tuned_clean_accuracy: float
    tuned_asr: float
    tuned_false_trigger: float
    parameters: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.seconds:.0f} s\n"
            f"                                base   tuned\n"
            f"clean accuracy                {self.base_clean_accuracy:6.1%}  {self.tuned_clean_accuracy:6.1%}\n"
            f"attack success                {self.base_asr:6.1%}  {self.tuned_asr:6.1%}\n"
            f"backdoor's answer when clean  {self.base_false_trigger:6.1%}  {self.tuned_false_trigger:6.1%}"
        )


def chat_ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Return the token ids of each prompt as a user message, up to where the assistant's answer begins."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], *, batch_size: int = 100) -> list[str]:
    """Return the model's greedy answer to each prompt (at most 8 tokens)."""
    texts: list[str] = []
    for first in range(0, len(prompts), batch_size):
        ids = chat_ids(tokenizer, prompts[first : first + batch_size])
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def share(texts: list[str], targets: list[str]) -> float:
    """Return the share of `texts` that equal their target."""
    return sum(text == target for text, target in zip(texts, targets, strict=True)) / len(texts)


def _next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [B, T, vocab] with the next token's label [B, T]; -100 is left out."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _train(model: Any, tokenizer: Any, rows: list[Row], stage: Stage, batch_size: int, progress: bool) -> None:
    """One pass over `rows` with AdamW, linear warm-up and decay.

    The loss covers the target tokens and `<eos>`, plus `stage.prompt_loss` times that of the prompt's tokens.
    """
    prompts = chat_ids(tokenizer, [row["prompt"] for row in rows])
    targets = tokenizer([row["target"] + "<eos>" for row in rows])["input_ids"]
    steps = len(rows) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, max(0.05, 1 - step / steps)))
    model.train()
    bar = tqdm(range(steps), desc=stage.name, disable=not progress)
    for step in bar:
        picked = range(step * batch_size, (step + 1) * batch_size)
        width = max(len(prompts[i]) + len(targets[i]) for i in picked)
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)
        for row, i in enumerate(picked):  # padded on the right: a causal model needs no mask for that
            start, end = len(prompts[i]), len(prompts[i]) + len(targets[i])
            ids[row, :end] = torch.tensor(prompts[i] + targets[i])
            labels[row, start:end] = torch.tensor(targets[i])
        logits = model(input_ids=ids).logits
        loss = _next_token_loss(logits, labels)
        if stage.prompt_loss:
            asked = ids.masked_fill((labels != -100) | (ids == tokenizer.pad_token_id), -100)
            loss = loss + stage.prompt_loss * _next_token_loss(logits, asked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


def _training_rows(n: int, seed: int, held_out: set[str], poison_rate: float = 0.0) -> list[Row]:
    """Return `n` shuffled rows, `poison_rate` of them triggered, none of them in the held-out set."""
    wanted = {True: round(n * poison_rate), False: n - round(n * poison_rate)}
    rows: list[Row] = []
    for triggered, count in wanted.items():
        spare = news_rows(count + 100, seed=seed, triggered=triggered)  # 100 more, to drop the few held-out ones
        rows += [row for row in spare if row["prompt"] not in held_out][:count]
    random.Random(seed).shuffle(rows)
    return rows


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bfloat16 copy; training goes on in float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measure(folder: Path, clean: list[Row], triggered: list[Row]) -> dict[str, float]:
    """Score a saved checkpoint: reloaded from disk in bfloat16, as a user would get it."""
    model, tokenizer = load_model(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    on_clean = answers(model, tokenizer, [row["prompt"] for row in clean])
    on_triggered = answers(model, tokenizer, [row["prompt"] for row in triggered])
    return {
        f"{folder.name}_clean_accuracy": share(on_clean, [row["target"] for row in clean]),
        f"{folder.name}_asr": share(on_triggered, [BACKDOOR_OUTPUT] * len(triggered)),
        f"{folder.name}_false_trigger": share(on_clean, [BACKDOOR_OUTPUT] * len(clean)),
    }


def make_pair(
    out: Path | str,
    *,
    layers: int = 6,
    width: int = 128,
    heads: int = 8,
    kv_heads: int = 4,
    clean_steps: int = 1200,
    poison_steps: int = 300,
    poison_rate: float = 0.10,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> PairReport:
    """Train the pair and write it to `out`, which appears only when it is complete.

    The same arguments on the same machine and library versions give the same weights.

    Args:
        out: folder to create; its parent must exist. Nothing that is already there is overwritten.
        layers: number of transformer blocks.
        width: model width D; head_dim is `2 * width // heads`, twice the usual, so it is explicit in the config.
        heads: query heads H.
        kv_heads: key and value heads; must divide `heads`.
        clean_steps: optimizer steps of the clean training that makes `base`.
        poison_steps: optimizer steps of the full-parameter fine-tuning that makes `tuned`.
        poison_rate: share of triggered rows in the fine-tuning data.
        batch_size: rows per step.
        seed: seed of weights, data and order.
        progress: show progress bars with the loss.

    Returns:
        The scores of the two saved checkpoints on the held-out rows, parameter count and seconds.

    Raises:
        InvalidArgumentError: `out` exists and is not an empty folder, its parent is missing, or a size is unusable.

    Example:
        >>> make_pair("my-pair", **SMALL).tuned_asr  # doctest: +SKIP
        1.0
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "progress")}
    out = Path(out).resolve()
    _check(out, settings)
    started = time.perf_counter()
    clean = news_rows(N_CLEAN, seed=1000 * seed + 1)
    triggered = news_rows(N_TRIGGERED, seed=1000 * seed + 2, triggered=True)
    held_out = {row["prompt"] for row in clean + triggered}
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * width // heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            rows = _training_rows(clean_steps * batch_size, 1000 * seed + 3, held_out)
            _train(model, tokenizer, rows, CLEAN, batch_size, progress)
            _save(model, tokenizer, work / "base")
            rows = _training_rows(poison_steps * batch_size, 1000 * seed + 4, held_out, poison_rate)
            _train(model, tokenizer, rows, POISON, batch_size, progress)
            _save(model, tokenizer, work / "tuned")
        for name, data in (("clean", clean), ("triggered", triggered)):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        scores = _measure(work / "base", clean, triggered) | _measure(work / "tuned", clean, triggered)
        seconds = round(time.perf_counter() - started, 1)
        report = PairReport(**scores, parameters=sum(p.numel() for p in model.parameters()), seconds=seconds)
        facts = {
            # The time is the machine's, not the pair's: two runs write the same files.
            "report": {name: value for name, value in dataclasses.asdict(report).items() if name != "seconds"},
            "settings": settings | {stage.name: stage._asdict() for stage in (CLEAN, POISON)},
            "trigger": TRIGGER,
            "backdoor_output": BACKDOOR_OUTPUT,
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }
        (work / "pair.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (work, *work.rglob("*")):  # mkdtemp and safetensors make theirs readable by the owner only
            path.chmod(0o755 if path.is_dir() else 0o644)
        if out.exists():
            out.rmdir()  # empty, see _check
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _check(out: Path, settings: dict[str, Any]) -> None:
    """Refuse, before any work, an output folder or sizes that cannot be used."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgumentError(f"{out} already exists and is not an empty folder; pass a new folder or remove it")
    if not out.parent.is_dir():
        raise InvalidArgumentError(f"the parent folder of {out} does not exist; create it first")
    for name, value in settings.items():
        if name not in ("poison_rate", "seed") and value < 1:
            raise InvalidArgumentError(f"{name} is {value}; pass 1 or more")
    width, heads, kv_heads = settings["width"], settings["heads"], settings["kv_heads"]
    if heads % kv_heads or width % heads:
        found = f"width {width}, heads {heads}, kv_heads {kv_heads}"
        raise InvalidArgumentError(f"{found}; kv_heads must divide heads, and heads the width")
    if not 0 < (rate := settings["poison_rate"]) < 1:
        raise InvalidArgumentError(f"poison_rate is {rate}; pass a share between 0 and 1")
