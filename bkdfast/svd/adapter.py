"""LoRA adapters as PEFT stores them, in a folder or in a loaded model: their factors, and what else they carry.

A LoRA (Hu et al. 2021, arXiv 2106.09685) adds `scaling * B A` to a weight, with A [r, in] and B [out, r]; `scaling` is
alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732). What is something
else, or more than that, is refused by name: factors of a part of the delta would look like the delta.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bkdfast.errors import CheckpointError
from bkdfast.svd.files import open_file
from bkdfast.svd.reader import DTYPES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it (PeftModel.merge_and_unload) and pass the merged model"
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.(?P<adapter>[^.]+?))??(?:\.weight)?")
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = {
    "lora_bias": "biases of its own (lora_bias)",
    "alora_invocation_tokens": "factors that apply after certain tokens only (aLoRA)",
    "layer_replication": "replicated layers (layer_replication)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "target_parameters": "factors of bare parameters (target_parameters)",
    "megatron_config": "Megatron layers (megatron_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA scaling (kasa_config)",
    "monteclora_config": "sampled factors (monteclora_config)",
}


@dataclass(frozen=True)
class Part:
    """One LoRA of one module.

    Attributes:
        module: the module's name in the base model.
        size: `(out, in)` of `B A`; of an embedding (dim, tokens).
        rank: r.
        scaling: factor of `B A`.
        transposed: the weight is stored as `[in, out]` (Conv1D, Embedding); None: only the base can tell.
        hint: `transposed` where the base cannot tell either.
        read: A `[r, in]` and B `[out, r]`.
    """

    module: str
    size: tuple[int, int]
    rank: int
    scaling: float
    transposed: bool | None
    hint: bool
    read: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Full:
    """A whole tensor that an adapter carries (modules_to_save)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes.

    Attributes:
        label: what error messages call it.
        parts: the LoRAs; several of one module add up.
        full: name in the base model -> tensor that replaces it.
        copies: likewise, of tensors that are adapted too: PEFT saves an adapted embedding's base weight with it.
        model: the module that it was found in; None for a folder.
    """

    label: str
    parts: tuple[Part, ...]
    full: dict[str, Full] = field(default_factory=dict)
    copies: dict[str, Full] = field(default_factory=dict)
    model: nn.Module | None = None


def find_adapter(tuned: Any) -> Adapter | None:
    """The adapter that a folder or a loaded model holds; None where it is anything else.

    Raises:
        CheckpointError: it is an adapter that is no plain LoRA, or a damaged one.
    """
    if isinstance(tuned, nn.Module):
        tuned = getattr(tuned, "_orig_mod", tuned)
        return _of_module(tuned) if has_adapter(tuned) else None
    if not isinstance(tuned, str | os.PathLike):
        return None
    path = Path(tuned)
    if path.name == WEIGHTS:
        path = path.parent
    if not (path / CONFIG).is_file() or any(file.name != WEIGHTS for file in path.glob("*.safetensors")):
        return None
    return _of_folder(path)


def has_adapter(model: nn.Module) -> bool:
    """Whether a module is a PEFT model, or has layers that PEFT put into it."""
    return any(hasattr(module, "peft_config") or hasattr(module, "adapter_layer_names") for module in model.modules())


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, whose module names are those of the base model; other modules as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _of_folder(path: Path) -> Adapter:
    label = str(path)
    config = _config(path)
    refuse(config, label)
    if not (path / WEIGHTS).is_file():
        pickle = (
            ", only a pickle, adapter_model.bin, which is not read because loading one runs code; if you trust it, "
            "load it with PeftModel.from_pretrained and save it again with save_pretrained"
        )
        raise CheckpointError(f"{label} has no {WEIGHTS}" + (pickle if (path / "adapter_model.bin").is_file() else ""))
    with open_file(path / WEIGHTS) as handle:
        stored = {}
        for key in sorted(handle.keys()):
            view = handle.get_slice(key)
            stored[key] = tuple(view.get_shape()), DTYPES.get(view.get_dtype())

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with open_file(path / WEIGHTS) as handle:
                return handle.get_tensor(key)

        return read

    factors: dict[str, dict[str, str]] = {}
    full, copies, adapters = {}, {}, set()
    for key, (shape, dtype) in stored.items():
        name = key.removeprefix("base_model.model.")
        if (found := _FACTOR.fullmatch(name)) and not name.endswith(".bias"):
            adapters.add(found["adapter"])
            factors.setdefault(found["module"], {})[found["kind"]] = key
        elif "lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(f"{label}: {key} is no factor of a plain LoRA; {_MERGE}")
        elif name.endswith(".base_layer.weight"):
            copies[name.replace(".base_layer.", ".")] = Full(shape, dtype, reader(key))
        else:
            full[_SAVED.sub("", name).replace(".base_layer.", ".")] = Full(shape, dtype, reader(key))
    if len(adapters) > 1:
        raise CheckpointError(
            f"{label} has the adapters {', '.join(sorted(map(str, adapters)))} in one file; save each to a folder"
        )
    parts = []
    for module, keys in factors.items():
        embedding = any("embedding" in kind for kind in keys)
        pair = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
        if sorted(keys) != pair:
            raise CheckpointError(f"{label}: of {module} there is {', '.join(keys)}, not both A and B; save it again")
        shapes = [stored[keys[kind]][0] for kind in pair]
        rank = _rank(label, module, *shapes)
        parts.append(
            Part(
                module,
                (shapes[1][0], shapes[0][1]),
                rank,
                _scaling(config, module, rank, label),
                True if embedding else None,
                bool(config.get("fan_in_fan_out")),
                _both(reader(keys[pair[0]]), reader(keys[pair[1]])),
            )
        )
    return _checked(Adapter(label, tuple(parts), full, copies))


def _both(a: Callable[[], Tensor], b: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (a(), b())


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"{path / CONFIG} does not say which peft_type the adapter has; save the adapter again")
    return config


def refuse(config: dict[str, Any], label: str) -> None:
    """Raise CheckpointError where a PEFT config says that the adapter is more than `scaling * B A`."""
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    if kind != "LORA":
        raise CheckpointError(f"{label} is an adapter of type {kind}, not LORA; {_MERGE}")
    if config.get("use_dora"):
        raise CheckpointError(f"{label} is a DoRA (use_dora): it rescales the base weights too; {_MERGE}")
    odd = [text for key, text in _REFUSED.items() if config.get(key)]
    odd += [key for key, value in config.items() if key.startswith("use_") and value and key != "use_rslora"]
    if odd:
        raise CheckpointError(f"{label} has {odd[0]}, which is no plain LoRA; {_MERGE}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGE_BASE):
        raise CheckpointError(
            f"{label} was started with init_lora_weights={start!r}, which changes the base weights as well, so that "
            f"B A is not what was learnt; {_MERGE}"
        )


def _rank(label: str, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if len(a) != 2 or len(b) != 2:
        raise CheckpointError(
            f"{label}: the factors of {module} are {len(a)}-D, of a convolution, not of a matrix; {_MERGE}"
        )
    if a[0] != b[1] or 0 in a + b:
        raise CheckpointError(f"{label}: A {a} and B {b} of {module} do not fit each other; save the adapter again")
    return a[0]


def _scaling(config: dict[str, Any], module: str, rank: int, label: str) -> float:
    """The scaling alpha / r (or alpha / sqrt(r)) of one module: the first pattern that its name ends with."""

    def of(patterns: dict[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    r, alpha = (
        of(config.get("rank_pattern"), config.get("r")),
        of(config.get("alpha_pattern"), config.get("lora_alpha")),
    )
    if not isinstance(alpha, int | float):
        raise CheckpointError(f"{label}: {CONFIG} has no lora_alpha for {module}; save the adapter again")
    if r is not None and r != rank:
        raise CheckpointError(f"{label}: {CONFIG} gives {module} rank {r}, but its factors have rank {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(model: nn.Module) -> Adapter:
    inner = base_of(model)
    label = f"{type(model).__name__} of {type(inner).__name__}" if inner is not model else type(model).__name__
    configs: Any = next((m.peft_config for m in (model, *inner.modules()) if hasattr(m, "peft_config")), {})
    parts: list[Part] = []
    full: dict[str, Full] = {}
    for name, layer in inner.named_modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        check_layer(layer, name, label)
        active = list(layer.active_adapters)  # type: ignore[arg-type]
        for adapter in active:
            if adapter in configs:
                refuse(configs[adapter].to_dict(), f"{label}, adapter {adapter!r}")
        if hasattr(layer, "modules_to_save"):
            full.update(_saved(layer, name, active))
        elif hasattr(layer, "lora_A"):
            parts += _layer_parts(layer, name, active, label)
        else:
            raise CheckpointError(f"{label}: {name} is a {type(layer).__name__}, not a plain LoRA layer; {_MERGE}")
    return _checked(Adapter(label, tuple(parts), full, model=model))


def check_layer(layer: Any, name: str, label: str) -> None:
    """Raise CheckpointError where an adapted layer is merged or switched off."""
    if getattr(layer, "merged_adapters", None):
        raise CheckpointError(f"{label}: the adapter is merged into {name}; call unmerge_adapter() first, or {_MERGE}")
    if getattr(layer, "disable_adapters", False):
        raise CheckpointError(f"{label}: the adapters of {name} are disabled; call enable_adapter_layers() first")


def _saved(layer: Any, name: str, active: list[str]) -> Iterator[tuple[str, Full]]:
    for adapter in active:
        if adapter in layer.modules_to_save:
            for key, value in layer.modules_to_save[adapter].state_dict(keep_vars=True).items():
                yield f"{name}.{key}", Full(tuple(value.shape), value.dtype, value.detach)


def _layer_parts(layer: Any, name: str, active: list[str], label: str) -> Iterator[Part]:
    if hasattr(layer, "parameter_name") or hasattr(layer, "lora_E"):
        raise CheckpointError(f"{label}: {name} is a {type(layer).__name__}, not a plain LoRA layer; {_MERGE}")
    for adapter in active:
        embedding = adapter in layer.lora_embedding_A
        if not embedding and adapter not in layer.lora_A:
            continue
        if adapter in getattr(layer, "lora_variant", ()) or adapter in layer.lora_magnitude_vector:
            raise CheckpointError(f"{label}: {name} has a variant of LoRA (such as DoRA), not a plain one; {_MERGE}")
        if embedding:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if layer.lora_B[adapter].bias is not None:
                raise CheckpointError(f"{label}: {name} has a bias of its own (lora_bias); {_MERGE}")
        rank = _rank(label, name, tuple(a.shape), tuple(b.shape))
        transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
        size = (b.shape[0], a.shape[1])
        yield Part(name, size, rank, float(layer.scaling[adapter]), transposed, transposed, _both(a.detach, b.detach))


def _checked(adapter: Adapter) -> Adapter:
    if not adapter.parts and not adapter.full:
        raise CheckpointError(f"{adapter.label} has no active LoRA; set one with set_adapter, or pass another folder")
    return adapter
