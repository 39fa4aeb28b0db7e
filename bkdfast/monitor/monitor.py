"""`Monitor`: watch a model's residual stream along directions that fine-tuning wrote, and judge each request."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, InvalidTypeError, ModelStateError, NonFiniteError
from bkdfast.hf.batch import Batch, batches, complete, count
from bkdfast.hf.families import unwrap
from bkdfast.hf.prepare import prepare, prepared, refuse_compiled, refuse_dropout
from bkdfast.hf.spec import ModelSpec
from bkdfast.monitor.ranges import Observations, Ranges, Verdict, judge
from bkdfast.monitor.tap import Tap
from bkdfast.svd import Directions
from bkdfast.svd.artifact import read_artifact, write_artifact
from bkdfast.svd.names import weights_hash

_KIND = "monitor"


class Monitor:
    """Streaming cosine monitor: calibrate on clean traffic, freeze, then judge every request.

    For each request the smallest and largest cosine of its tokens to each direction is kept, prompt and generated
    tokens apart; a request is flagged when one leaves `[low - eps, high + eps]` of clean traffic. Ranges are learned in
    `calibrate` only and never widen from what is served.

    A request is a row of a forward on an empty cache, with all calls on that cache that follow directly: decode steps
    (generated tokens), and calls of several tokens (a next turn; prompt tokens). A row on a cache that was filled
    unseen, or whose request was judged already, opens a request that is `incomplete` unless it is flagged.
    Each beam, and each of `num_return_sequences`, is a row; a beam's tokens may come from any beam of its prompt.

    Args:
        directions: from `delta_directions`.
        eps: slack of the ranges in units of cosine; the published method uses 0.01.
        slots: requests that can be open or waiting for `verdicts()`; if more begin, the oldest are lost, and reported.

    Source: Watch the Weights (arXiv 2508.00161).

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> directions = bf.delta_directions(pair.base, pair.tuned, rank=2, progress=False)
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> monitor = bf.Monitor(directions).calibrate(pair.tuned, batch, progress=False)
        >>> with monitor.attach(pair.tuned):
        ...     _ = pair.tuned(**batch)
        >>> [verdict.status for verdict in monitor.verdicts()]
        ['clean', 'clean']
    """

    def __init__(self, directions: Directions, *, eps: float = 0.01, slots: int = 1024) -> None:
        if not isinstance(directions, Directions):
            raise InvalidTypeError(f"Monitor needs Directions (see delta_directions), got {type(directions).__name__}")
        if not 0 <= eps < 2:
            raise InvalidArgumentError(f"eps={eps} is not a cosine distance in [0, 2)")
        if slots < 1:
            raise InvalidArgumentError(f"slots={slots}: at least one request has to fit")
        self.directions = directions
        self.eps = eps
        self.slots = slots
        self.ranges: Ranges | None = None
        self._tap: Tap | None = None
        self._pending: list[Observations] = []

    def calibrate(
        self,
        model: torch.nn.Module,
        data: Batch | Iterable[Batch],
        *,
        generate: int = 0,
        spec: ModelSpec | None = None,
        check_weights: bool = True,
        progress: bool = True,
    ) -> Monitor:
        """Learn the ranges from clean requests; replaces earlier ranges.

        Args:
            model: the model to be monitored.
            data: clean prompts, one tokenised batch or an iterable of them.
            generate: number of tokens to generate greedily for each prompt, which calibrates the range of generated
                tokens; 0: prompts only, and generated tokens are then reported as not judged.
            spec: where the blocks are, when the family is not known.
            check_weights: refuse directions that were made for other weights.
            progress: show a progress bar.

        Returns:
            The monitor itself.

        Raises:
            InvalidArgumentError: no data.
            NonFiniteError: a clean request has NaN or infinite activations.
        """
        ranges: Ranges | None = None
        with self._drained(), self.attach(model, spec=spec, check_weights=check_weights):
            assert self._tap is not None
            for batch in tqdm(batches(data), desc="calibrate", unit="batch", total=count(data), disable=not progress):
                batch = complete(model, batch, self._tap.state.spec)
                with torch.no_grad():
                    if generate:
                        batch.pop("position_ids", None)
                        model.generate(**batch, max_new_tokens=generate, do_sample=False)  # type: ignore[operator]
                    else:
                        model(**batch)
                seen = self._tap.collect()
                if bad := seen.nonfinite.sum(1).nonzero().flatten().tolist():
                    raise NonFiniteError(
                        f"clean request {seen.first + bad[0]} has NaN or infinite activations; ranges cannot rest on it"
                    )
                ranges = Ranges.of(seen) if ranges is None else ranges.merge(Ranges.of(seen))
        self.ranges = ranges
        return self

    @contextlib.contextmanager
    def attach(
        self, model: torch.nn.Module, *, spec: ModelSpec | None = None, check_weights: bool = True, fuse: bool = True
    ) -> Iterator[Monitor]:
        """Observe every forward of `model` inside this context, plain calls and `generate` alike.

        A model to be compiled is attached first and compiled inside the context; the op then is part of its graph.

        Args:
            model: the tuned model that the directions were made for.
            spec: where the blocks are, when the family is not known.
            check_weights: compare a hash of the projections' weights with the one in the directions (reads them once).
            fuse: observe inside the norms that read the blocks' outputs, which costs least. They round as the model's
                own norms do but sum in another order, so logits can differ in the last digit; False: they do not.

        Raises:
            ModelStateError: the model is compiled already, in train mode with dropout, or this monitor is attached.
            InvalidArgumentError: the directions have other layers, another width, or were made for other weights.
        """
        if self._tap is not None:
            raise ModelStateError("this monitor is attached already; make a second Monitor for a second model")
        refuse_compiled(model)
        refuse_dropout(unwrap(model))
        before = prepared(model)
        stays = before is not None and before.explicit
        state = prepare(model, spec=spec)
        state.explicit = stays
        state.users += 1
        try:
            state.follow_model()
            self._check_fit(model, state.spec, check_weights)
            self._tap = Tap(state, self.directions.vectors, slots=self.slots, fuse=fuse)
            if self.ranges is not None:
                self._tap.judge_with(self.ranges, self.eps)
            calls = int(state.calls)
            yield self
            if int(state.calls) == calls:
                warnings.warn("no forward pass reached the monitor inside this context", stacklevel=3)
        finally:
            tap, self._tap = self._tap, None
            try:
                if tap is not None:
                    tap.remove()
                    self._pending.append(tap.collect())
            finally:
                state.release()

    def _check_fit(self, model: torch.nn.Module, spec: ModelSpec, check_weights: bool) -> None:
        layers, _, width = self.directions.vectors.shape
        if (layers, width) != (spec.layers, spec.width):
            raise InvalidArgumentError(
                f"the directions are for {layers} blocks of width {width}, the model has {spec.layers} of {spec.width}"
            )
        wanted = self.directions.metadata.get("tuned_hash")
        if check_weights and wanted is not None:
            found = weights_hash(unwrap(model), self.directions.metadata["weights"])
            if found != wanted:
                raise InvalidArgumentError(
                    f"the directions were made for other weights (hash {wanted[:12]}, the model's is {found[:12]}); "
                    "make them for this model, or pass check_weights=False if it is the same one merged or quantised"
                )

    def collect(self) -> Observations:
        """Take out what was observed since the last call, without judging it."""
        parts = [part for part in self._pending if len(part) or part.lost]
        self._pending.clear()
        if self._tap is not None:
            parts.append(self._tap.collect())
        layers, count, _ = self.directions.vectors.shape
        if not parts:
            empty = torch.empty(0, 2, layers, count)
            counts = torch.empty(0, 2, dtype=torch.int64)
            return Observations(empty, empty, counts, counts)
        return Observations.join(parts)

    def verdicts(self) -> list[Verdict]:
        """A verdict for each request that began since the last call, in order.

        Raises:
            ModelStateError: the monitor is not calibrated.
        """
        self._calibrated()
        seen = self.collect()
        if seen.lost:
            warnings.warn(
                f"{seen.lost} requests were overwritten before they were judged; call verdicts() more often or make "
                f"the monitor with more than slots={self.slots}",
                stacklevel=2,
            )
        return self.judge(seen)

    def judge(self, seen: Observations) -> list[Verdict]:
        """Verdicts for observations from `collect()`.

        Raises:
            ModelStateError: the monitor is not calibrated.
        """
        return judge(self._calibrated(), seen, self.eps)

    def _calibrated(self) -> Ranges:
        if self.ranges is None:
            raise ModelStateError("the monitor has no ranges yet; call calibrate(model, clean_data) or load one")
        return self.ranges

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write directions and ranges to one safetensors file with JSON metadata, whole or not at all.

        Raises:
            ModelStateError: the monitor is not calibrated.
            CheckpointError: the folder does not exist.
        """
        ranges = self._calibrated()
        tensors = {
            "vectors": self.directions.vectors,
            "strength": self.directions.strength,
            "low": ranges.low,
            "high": ranges.high,
            "requests": ranges.requests,
        }
        metadata = {
            "component": list(self.directions.component),
            "rank": self.directions.rank,
            "metadata": self.directions.metadata,
            "eps": self.eps,
            "slots": self.slots,
        }
        write_artifact(path, _KIND, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Monitor:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """
        tensors, metadata = read_artifact(path, _KIND)
        directions = Directions(
            tensors["vectors"],
            tensors["strength"],
            tuple(metadata["component"]),
            metadata["rank"],
            metadata["metadata"],
        )
        monitor = cls(directions, eps=metadata["eps"], slots=metadata["slots"])
        monitor.ranges = Ranges(tensors["low"], tensors["high"], tensors["requests"])
        return monitor

    @contextlib.contextmanager
    def _drained(self) -> Iterator[None]:
        """Requests of a calibration do not show up in `verdicts()`."""
        before = list(self._pending)
        try:
            yield
        finally:
            self._pending[:] = before

    def __repr__(self) -> str:
        state = "not calibrated" if self.ranges is None else f"calibrated on {int(self.ranges.requests[0])} requests"
        return f"Monitor({self.directions!r}, {state}, eps={self.eps})"
