"""`ModelSpec`: where a model's blocks, heads, projections and norms are. Module paths, no modules.

A spec is data: it can be printed, written by hand for a module that is not from HuggingFace, and made from a config
without loading weights. `describe(model)` makes one for the known families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bkdfast.errors import InvalidArgumentError


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block. All fields are module paths from the root of the model.

    Attributes:
        block: the block itself; its output is the residual stream.
        out_proj: the attention output projection; its input is z, the per-head outputs `[B, T, H * Dh]`.
        down_proj: the MLP's down projection; its input is the neuron activations `[B, T, M]`. None where there is no
            single one (mixture of experts).
        norms: the block's normalisations in the order in which they run.
        heads: number of query heads H.
        head_dim: size Dh of one head's slice of z.
        neurons: size M of the MLP's hidden layer, None where `down_proj` is None.
        input_norm: the norm that reads the block's input before anything else does, None where there is none.
        mlp: the whole MLP, where there is no single down projection (mixture of experts).
    """

    block: str
    out_proj: str
    down_proj: str | None
    norms: tuple[str, ...]
    heads: int
    head_dim: int
    neurons: int | None
    input_norm: str | None = None
    mlp: str | None = None

    @property
    def mlp_output(self) -> str | None:
        """The module whose output is the MLP's."""
        return self.down_proj or self.mlp


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: its blocks in order, and what surrounds them. Module paths are relative to the model's root.

    Attributes:
        family: the HuggingFace `model_type`, or a name of the user's.
        blocks: one `BlockSpec` a layer.
        width: D, the size of the residual stream.
        embedding: token embedding.
        unembedding: output embedding, None for a model without a language-model head.
        final_norm: the norm before the unembedding, None where there is none.
        transposed: the projections store `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
        causal: attention looks back only.
        entry: the module that is called with the tokens and the attention mask, once a forward; `""` is the root. For a
            HuggingFace model it is the base model inside the head: a hook there is traced into the same graph.
    """

    family: str
    blocks: tuple[BlockSpec, ...]
    width: int
    embedding: str | None = None
    unembedding: str | None = None
    final_norm: str | None = None
    transposed: bool = False
    causal: bool = True
    entry: str = ""

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    def outputs(self, site: str) -> list[str]:
        """Of each layer, the module that returns its `"attention"`, `"mlp"` or `"residual"` output.

        Raises:
            InvalidArgumentError: another site, or a layer whose MLP is not known.
        """
        if site not in ("attention", "mlp", "residual"):
            raise InvalidArgumentError(f"site={site!r} is not one of 'attention', 'mlp', 'residual'")
        found = []
        for layer, block in enumerate(self.blocks):
            path = {"attention": block.out_proj, "mlp": block.mlp_output, "residual": block.block}[site]
            if path is None:
                raise InvalidArgumentError(
                    f"layer {layer} of {self.family} has no MLP that is known; pass spec= with mlp="
                )
            found.append(path)
        return found

    def check(self, model: torch.nn.Module) -> ModelSpec:
        """Check every path and size of this spec against `model`; returns the spec itself.

        Raises:
            InvalidArgumentError: a path leads nowhere, or a projection's width is not `heads * head_dim`.
        """
        if not self.blocks:
            raise InvalidArgumentError(f"the spec of family {self.family!r} has no blocks; give at least one BlockSpec")
        submodule(model, self.entry)
        if self.final_norm is not None:
            submodule(model, self.final_norm)
        for layer, block in enumerate(self.blocks):
            for path in (block.block, block.out_proj, block.down_proj, block.input_norm, block.mlp, *block.norms):
                if path is not None:
                    submodule(model, path)
            _check_width(submodule(model, block.out_proj), block.heads * block.head_dim, layer, block)
        return self


def refuse_shared(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Raise where layers share a module: an edit of one would be made in all of them.

    Raises:
        InvalidArgumentError: naming what they share.
    """
    for what in ("block", "out_proj", "down_proj"):
        paths = [path for block in spec.blocks if (path := getattr(block, what)) is not None]
        if len({id(submodule(model, path)) for path in paths}) < len(paths):
            raise InvalidArgumentError(
                f"layers share one {what} module: an edit of one layer would be made in all of them; give each layer a "
                "module of its own (copy.deepcopy)"
            )


def submodule(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """`model.get_submodule(path)`, several times as fast, with an error that says what is there instead."""
    found: torch.nn.Module | None = model
    for step in path.split(".") if path else ():
        if (found := found._modules.get(step)) is None:  # type: ignore[union-attr]
            break
    else:
        return found  # type: ignore[return-value]
    try:
        return model.get_submodule(path)
    except AttributeError:
        steps, found = path.split("."), model
        for i, step in enumerate(steps):
            children = dict(found.named_children())
            if step not in children:
                where = ".".join(steps[:i]) or type(model).__name__
                raise InvalidArgumentError(
                    f"the spec names {path!r}, but {where} has no submodule {step!r}; it has {sorted(children)[:12]}"
                ) from None
            found = children[step]
        raise


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model takes its inputs: with weights offloaded by accelerate, where they are brought when needed."""
    device = next(model.parameters()).device
    for module in model.modules() if device.type == "meta" else ():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if (place := getattr(part, "execution_device", None)) is not None:
                return torch.device(place)
    return device


def in_features(projection: torch.nn.Module) -> int | None:
    """Input width of a projection: `nn.Linear`-likes say it, Conv1D stores `[in, out]`; None where nothing tells."""
    if isinstance(width := getattr(projection, "in_features", None), int):
        return width
    weight = getattr(projection, "weight", None)
    if hasattr(projection, "nf") and isinstance(weight, torch.Tensor):
        return weight.shape[0]
    return None


def _check_width(projection: torch.nn.Module, expected: int, layer: int, block: BlockSpec) -> None:
    found = in_features(projection)
    if found is not None and found != expected:
        raise InvalidArgumentError(
            f"layer {layer}: {block.heads} heads of head_dim {block.head_dim} need a projection with {expected} inputs,"
            f" but {block.out_proj} has {found}; pass the right heads= and head_dim="
        )
