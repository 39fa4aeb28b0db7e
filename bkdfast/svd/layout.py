"""Which module of the base model owns each weight, what PEFT can do with it, and the adapter folder that it reads."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bkdfast.errors import CheckpointError
from bkdfast.svd.adapter import CONFIG, WEIGHTS
from bkdfast.svd.names import match_names
from bkdfast.svd.source import ModuleSource, WeightSource


@dataclass(frozen=True)
class Layout:
    """The modules of a base model.

    Attributes:
        model: the model, or one of the same structure without weights.
        modules: path -> module, as PEFT sees them; an adapted module is the one inside.
        owner: name of a tensor in the tuned model -> (path of its module, name in it).
        shared: tensor names in the model whose storage has several names -> all of them.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    owner: dict[str, tuple[str, str]]
    shared: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, base: WeightSource, tuned: WeightSource) -> Layout:
        """The layout of the base, from the module itself or from its config.

        Raises:
            CheckpointError: the base is a folder without `config.json`, or transformers cannot build it.
        """
        if isinstance(base, ModuleSource):
            model = base.model
        else:
            from bkdfast.svd.directions import empty_model

            if base.config is None:
                raise CheckpointError(
                    f"{base.label} has no config.json, which says what modules it has; add it, or pass a loaded model"
                )
            model = empty_model(base.config, base)
        modules, names, by_id = {}, {}, dict[int, list[str]]()
        for path, module in model.named_modules():
            if re.search(r"\.(lora_\w+|modules_to_save|original_module)(\.|$)", path):
                continue
            inner = getattr(module, "base_layer", getattr(module, "original_module", module))
            if path.endswith(".base_layer"):
                continue
            modules[path] = inner
            for key, value in (*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False)):
                full = f"{path}.{key}" if path else key
                names[full] = path, key
                by_id.setdefault(id(value), []).append(full)
        owner = {name: names[own] for name, own in match_names(tuned.names, names).items()}
        shared = {name: tuple(group) for group in by_id.values() if len(group) > 1 for name in group}
        return cls(model, modules, owner, shared)

    def obstacle(self, name: str) -> str:
        """Why PEFT cannot put a LoRA on a weight; "" where it can."""
        if name not in self.owner:
            return "not in the base model's modules"
        path, key = self.owner[name]
        module = self.modules[path]
        if f"{path}.{key}" in self.shared:
            return "shared by the embedding and the output head"
        if key != "weight" or not path or _kind(module) not in ("Linear", "Conv1D", "Embedding"):
            return f"{key} of a {type(module).__name__}"
        return ""

    def transposed(self, name: str) -> bool:
        """Whether a weight is stored as `[in, out]`."""
        return _kind(self.modules[self.owner[name][0]]) != "Linear"

    def targets(self, names: Iterable[str]) -> list[str] | str:
        """PEFT's `target_modules` for exactly the modules of these weights: the shortest suffixes, or a pattern."""
        chosen = {self.owner[name][0] for name in names}
        suffixes: set[str] = set()
        for path in sorted(chosen):
            words = path.split(".")
            for start in range(len(words) - 1, -1, -1):
                suffix = ".".join(words[start:])
                hit = {other for other in self.modules if other == suffix or other.endswith(f".{suffix}")}
                if hit <= chosen:
                    suffixes.add(suffix)
                    break
            else:
                return "|".join(re.escape(path) for path in sorted(chosen))
        return sorted(suffixes)

    def saved(self, changed: list[str], adapted: set[str], tuned: WeightSource) -> dict[str, str]:
        """What can be saved whole of the changed weights that have no LoRA: tensor name -> key in the adapter.

        A bias is saved by itself; another weight with its module, which must have no LoRA and no modules with tensors
        inside. A weight with several names is saved under each of them, so that embedding and head both have it.
        """
        paths = {self.owner[name][0] for name in adapted}
        by_module = {f"{path}.{key}": name for name, (path, key) in self.owner.items()}
        keys: dict[str, str] = {}
        for name in changed:
            if name in adapted or name not in self.owner:
                continue
            path, key = self.owner[name]
            if key == "bias" and (path in paths or _kind(self.modules[path]) in ("Linear", "Conv1D")):
                keys[name] = f"{path}.base_layer.bias" if path in paths else f"{path}.bias"
                continue
            module = self.modules[path]
            below = any(inside.startswith(f"{path}.") for inside, _ in self.owner.values())
            if not path or path in paths or below:
                continue
            keys[name] = f"{path}.{key}"
            for other in module.state_dict():
                if (sibling := by_module.get(f"{path}.{other}")) is not None:
                    keys[sibling] = f"{path}.{other}"
        return keys

    @property
    def task(self) -> str | None:
        """PEFT's task type, where it is certain."""
        kind = type(self.model).__name__
        return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _kind(module: nn.Module) -> str:
    """The class of module that PEFT has a LoRA layer for; "" for others."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Embedding):
        return "Embedding"
    return "Conv1D" if type(module).__name__ == "Conv1D" else ""


def write_adapter(
    path: Path,
    layout: Layout,
    factors: dict[str, tuple[Tensor, Tensor]],
    whole: dict[str, str],
    sources: tuple[WeightSource, WeightSource],
    dtype: torch.dtype | None,
) -> None:
    """Write a PEFT adapter folder whole or not at all: a temporary folder beside it, then one rename.

    Args:
        path: the folder; missing or empty.
        layout: of the base.
        factors: weight -> A `[r, in]` and B `[out, r]`; their product is the delta (scaling 1).
        whole: `Layout.saved`.
        sources: base and tuned.
        dtype: of the tensors in `whole`; the tuned model's if None.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        module = layout.owner[name][0]
        if _kind(layout.modules[module]) == "Embedding":
            keys = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        else:
            keys = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        tensors[f"base_model.model.{keys[0]}"], tensors[f"base_model.model.{keys[1]}"] = a, b
    modules: set[str] = set()
    for name, key in whole.items():
        value = sources[1].get(name).cpu()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        own = layout.owner[name]
        biases = key.endswith(".base_layer.bias") or (own[1] == "bias" and _kind(layout.modules[own[0]]) != "")
        groups = [own[0]] if biases else [full.rpartition(".")[0] for full in layout.shared.get(".".join(own), ())]
        for group in groups or [own[0]]:
            place = key if biases else f"{group}.{own[1]}"
            tensors[f"base_model.model.{place}"] = value.clone().contiguous()
            if not biases:
                modules.add(group)
    config = _adapter_config(layout, factors, modules, any(key.endswith("bias") for key in whole.values()), sources[0])
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        os.chmod(temporary / WEIGHTS, 0o644)  # safetensors makes files that only their owner can read
        with open(temporary / WEIGHTS, "rb") as file:
            os.fsync(file.fileno())
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _adapter_config(
    layout: Layout, factors: dict[str, tuple[Tensor, Tensor]], modules: set[str], biases: bool, base: WeightSource
) -> dict[str, Any]:
    ranks = {layout.owner[name][0]: a.shape[0] for name, (a, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    name = getattr(base.config, "_name_or_path", "") if isinstance(base, ModuleSource) else base.label
    return {
        "peft_type": "LORA",
        "task_type": layout.task,
        "base_model_name_or_path": name or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(_kind(layout.modules[path]) == "Conv1D" for path in ranks),
        "target_modules": layout.targets(factors),
        "modules_to_save": sorted(modules) or None,
    }
