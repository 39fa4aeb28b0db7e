"""`prepare`: install the hooks once, before compiling; from then on interventions only write tables.

A Python hook inside a compiled model runs at trace time and never again, and one attached afterwards never runs at all.
So each hook calls one in-place op on tensors of fixed shape (the edit table of its layer) and is installed before
`torch.compile`. An empty table edits nothing; in eager mode an idle hook returns at once.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, ModelStateError
from bkdfast.hf.edits import HEADS, NEURONS
from bkdfast.hf.families import describe, unwrap
from bkdfast.hf.lowering import Key, Tables, site_shape
from bkdfast.hf.positions import Positions, refuse_generate_without_cache
from bkdfast.hf.spec import ModelSpec, device_of, submodule
from bkdfast.ops.edit_table import COLUMNS, EditTable
from bkdfast.ops.patch_heads import patch_heads

log = logging.getLogger(__name__)

GENERATE_GRAPH = "_compiled_call"
"""Where HuggingFace's `generate` keeps the forward it compiles by itself for a static cache."""

_PREPARED: weakref.WeakKeyDictionary[torch.nn.Module, Prepared] = weakref.WeakKeyDictionary()


class Prepared:
    """The hooks of one model and the tables they read. Made by `prepare`; `remove()` takes the hooks off again.

    Attributes:
        spec: the model's `ModelSpec`.
        positions: where the tokens of the current call stand.
        tables: the edit table of each (site, layer), of fixed capacity.
        active: some table is not empty.
        explicit: `prepare` was called; False while an engine borrows the model.
        users: engines and contexts that use the hooks now.
        engine: name of an engine that has the model for itself.
        calls: number of forward calls that reached the hooks, `[]` int64 on the model's device.
        expected: rows that the edits are made for, `[]` int64, 0 for any; `misfits` counts the calls with others. An
            eager call with others raises at once; a compiled one can only count.
        observers: called with each forward's `Call` before the model runs.
    """

    def __init__(self, model: torch.nn.Module, spec: ModelSpec, capacity: int, sources: int) -> None:
        self.spec = spec
        self.model = weakref.ref(model)
        self.dtype, self.device = _place(model)
        self.pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
        entry = submodule(model, spec.entry)
        self.positions = Positions(entry.forward, self.device)
        self.calls = torch.zeros((), dtype=torch.int64, device=self.device)
        self.expected, self.misfits = torch.zeros_like(self.calls), torch.zeros_like(self.calls)
        self.active: frozenset[Key] = frozenset()
        self.relative = False
        self.batch: int | None = None
        self.rows = 0
        self.running = False
        self.explicit = False
        self.users = 0
        self.engine: str | None = None
        self.observers: list[Any] = []
        self.enders: list[Any] = []
        self.stack: list[list] = []
        self.tables: dict[Key, EditTable] = {}
        self._handles = [
            entry.register_forward_pre_hook(Hook(self._begin_call), with_kwargs=True),
            entry.register_forward_hook(Hook(self._end_call), always_call=True),
        ]
        for layer, block in enumerate(spec.blocks):
            for site, path in ((HEADS, block.out_proj), (NEURONS, block.down_proj)):
                if path is not None:
                    self.tables[site, layer] = self._empty(site, layer, capacity, sources)
                    projection = submodule(model, path)
                    self._handles.append(projection.register_forward_pre_hook(Hook(self._editor(site, layer))))

    # Hooks. Everything below also runs at trace time under torch.compile.

    def _begin_call(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.compiler.is_compiling() and not self.active and not self.observers:
            self.positions.forget()
            return
        call = self.positions.update(args, kwargs, pad_token_id=self.pad_token_id, relative=self.relative)
        if not torch.compiler.is_compiling():
            if self.relative or self.observers:
                refuse_generate_without_cache(call, kwargs)
            if self.active and torch.is_grad_enabled() and module.training:
                _refuse_checkpointing(module)
        self.calls += 1
        if torch.compiler.is_compiling():
            self.misfits += (self.expected != self.positions.rows) & (self.expected > 0)
        for observer in self.observers:
            observer(call)
        if not torch.compiler.is_compiling():
            self.running = True
            if self.batch is not None and self.batch != self.positions.rows:
                raise InvalidArgumentError(
                    f"the edits are made for a batch of {self.batch} rows, but the model got {self.positions.rows}"
                )
            if self.rows > self.positions.rows:
                raise InvalidArgumentError(
                    f"an edit addresses row {self.rows - 1}, but the model got a batch of {self.positions.rows} rows"
                )

    def _end_call(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            for ender in self.enders:
                ender()
            self.running = False
            self.positions.remember_cache(output)

    def _editor(self, site: str, layer: int):
        key = (site, layer)

        def hook(module: torch.nn.Module, args: tuple):
            if not torch.compiler.is_compiling():
                if key not in self.active:
                    return None
                if not self.running:
                    raise ModelStateError(
                        "a part of the prepared model was called on its own, so positions are not known; call the "
                        "module that was given to prepare() or intervene()"
                    )
            z = args[0]
            # OPT flattens tokens before its MLP.
            view = z if z.dim() == 3 else z.view(self.positions.rows, -1, z.shape[-1])
            new = patch_heads(view, self.tables[key], self.positions.offset.to(z.device))
            return None if new is view else (new.view(z.shape), *args[1:])

        return hook

    # Tables.

    @torch.inference_mode(False)
    def _empty(self, site: str, layer: int, capacity: int, sources: int) -> EditTable:
        width, _ = site_shape(self.spec, site, layer)
        accumulate = torch.float64 if self.dtype == torch.float64 else torch.float32
        block = self.spec.blocks[layer]
        device = self._device_of(block.out_proj if site == HEADS else block.down_proj)
        return EditTable(
            torch.zeros(capacity, COLUMNS, dtype=torch.int32, device=device),
            torch.zeros(capacity, 2, dtype=accumulate, device=device),
            torch.zeros(sources, width, dtype=accumulate, device=device),
        )

    def _device_of(self, path: str | None) -> torch.device:
        """Where a projection computes: with a device map not where the model begins; offloaded weights do not tell."""
        model = self.model()
        weight = next(submodule(model, path).parameters(), None) if model is not None and path is not None else None
        return self.device if weight is None or weight.device.type == "meta" else weight.device

    def write(self, new: Tables) -> None:
        """Make `new` the edits of the model: contents are copied, nothing is traced again while they fit."""
        for key in self.active - new.tables.keys():
            self.tables[key].table.zero_()
        for key, packed in new.tables.items():
            held = self.tables[key]
            count, sources = len(packed.table), len(packed.source)
            if count > len(held.table) or sources > len(held.source):
                capacity, room = (max(_next_power(n), len(t)) for n, t in ((count, held.table), (sources, held.source)))
                log.info("layer %d, %s: capacity grows to %d edits, %d source rows", key[1], key[0], capacity, room)
                held = self.tables[key] = self._empty(*key, capacity, room)
            held.table[:count] = packed.table.to(held.table.device)
            held.table[count:] = 0
            held.coefficients[:count] = packed.coefficients.to(held.table.device)
            held.source[:sources] = packed.source.to(held.table.device)
        self.active = frozenset(new.tables)
        self.batch, self.relative, self.rows = new.batch, new.relative, new.rows
        self.expected.fill_(new.batch or 0)

    def follow_model(self) -> None:
        """Take note of a cast of the model since `prepare`; raises where the tables no longer fit."""
        model = self.model()
        assert model is not None
        dtype, device = _place(model)
        if device != self.device or (dtype == torch.float64) != (self.dtype == torch.float64):
            raise ModelStateError(
                f"the model was prepared as {self.dtype} on {self.device} and is now {dtype} on {device}; call "
                "remove() on the handle that prepare() returned, and prepare it again"
            )
        self.dtype = dtype

    def release(self) -> None:
        """The caller no longer uses the hooks; the last one takes them off, unless `prepare` was called."""
        self.users -= 1
        if not self.users and not self.explicit:
            self.remove()

    def remove(self) -> None:
        """Take the hooks off; the model is as it was before `prepare`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        model = self.model()
        if model is not None:
            _PREPARED.pop(model, None)


class Hook:
    """A hook of ours. In a deep copy of the model it does nothing: its tables and positions are the original's."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Run the hook."""
        return self.function(*args)

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook(_nothing)


def _nothing(*args: Any) -> None:
    pass


def prepare(
    model: torch.nn.Module, *, spec: ModelSpec | None = None, capacity: int = 64, sources: int = 64
) -> Prepared:
    """Install bkdfast's hooks on a model, once, before `torch.compile`.

    Not needed for a model that stays eager: `intervene` and the engines prepare such a model and clean up themselves.

    Args:
        model: a HuggingFace model of a supported family, or any module with `spec`.
        spec: where the heads are, when the family is not known.
        capacity: edits that fit each layer's table. More edits still work, but a compiled model is traced again once.
        sources: source rows that fit each layer's table, likewise.

    Returns:
        The handle; `remove()` takes the hooks off. Preparing twice returns the same one.

    Raises:
        ModelStateError: the model is compiled already; its graph would never run the hooks.
        UnsupportedModelError: see `bkdfast.hf.describe`.

    Example:
        >>> import torch, bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> model = load_pair().tuned
        >>> handle = bf.prepare(model)
        >>> compiled = torch.compile(model, fullgraph=True)  # doctest: +SKIP
        >>> handle.remove()
    """
    inner = unwrap(model)
    if inner not in _PREPARED:
        refuse_compiled(model)
        install(inner, spec, capacity, sources)
        _forget_compiled(inner)
    _PREPARED[inner].explicit = True
    return _PREPARED[inner]


def install(model: torch.nn.Module, spec: ModelSpec | None, capacity: int = 64, sources: int = 64) -> Prepared:
    """Put the hooks on a model that has none."""
    with torch.inference_mode(False):  # its tensors are written to outside inference mode as well
        _PREPARED[model] = Prepared(model, describe(model, spec), capacity, sources)
    return _PREPARED[model]


def _forget_compiled(model: torch.nn.Module) -> None:
    """Drop graphs traced before the hooks were there: dynamo looks them up by code, not by hooks."""
    vars(model).pop(GENERATE_GRAPH, None)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def prepared(model: torch.nn.Module) -> Prepared | None:
    """The handle of a prepared model, None for another."""
    return _PREPARED.get(unwrap(model))


def refuse_compiled(model: torch.nn.Module) -> None:
    """Raise if `model` or a part of it is compiled: hooks attached now would never run."""
    if model is not unwrap(model) or any(
        getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part, "_orig_mod")
        or hasattr(part.forward, "_torchdynamo_orig_callable")
        for part in model.modules()
    ):
        raise ModelStateError(
            "the model is compiled but was not prepared, so hooks added now would silently never run; call "
            "bkdfast.prepare(model) before torch.compile(model)"
        )


def refuse_dropout(model: torch.nn.Module) -> None:
    """Raise if a forward of `model` would drop activations at random."""
    if not model.training:
        return
    for path, part in model.named_modules():
        rates = {"p": getattr(part, "p", 0.0)} if isinstance(part, torch.nn.modules.dropout._DropoutNd) else {}
        rates |= {n: v for n, v in vars(part).items() if "dropout" in n and isinstance(v, float)}
        for name, rate in rates.items():
            if part.training and isinstance(rate, float) and rate > 0:
                raise ModelStateError(
                    f"the model is in train mode and {path or type(part).__name__} has dropout ({name}={rate}); "
                    "results would be random: call model.eval()"
                )


def _refuse_checkpointing(model: torch.nn.Module) -> None:
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ModelStateError(
            "gradient checkpointing runs blocks again in the backward pass, without the edits, so gradients would be "
            "wrong; call model.gradient_checkpointing_disable()"
        )


def _place(model: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """Activation dtype of a model, that of its first floating-point parameter, and where it takes its inputs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, device_of(model)
    raise InvalidArgumentError(f"{type(model).__name__} has no floating-point parameters")


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()
