"""`Case`: one thing that is timed, with everything it is compared with. `benchmarks/cases/<op>.py` make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Outputs = tuple[torch.Tensor, ...]


@dataclass
class Case:
    """One size of one op.

    Attributes:
        op: stem of the op.
        name: shapes and dtype, as the tables show them.
        ours: our versions by backend.
        plain: plain-PyTorch versions by a word on how; the fastest is what ours are compared with.
        outputs: runs a version on fresh state and returns what all versions must agree on.
        tolerance: absolute and relative, of that comparison; one pair for all outputs, or one for each.
        bytes: least bytes to move, counting reads and writes once.
        flops: least floating-point operations (a multiply-add is two).
        goal: the ratio that was aimed at, for the record; None: none.
        rival: the plain version that people write, where that is not the fastest; tables name both.
    """

    op: str
    name: str
    ours: dict[str, Callable[[], object]]
    plain: dict[str, Callable[[], object]]
    outputs: Callable[[Callable[[], object]], Outputs]
    tolerance: tuple[float, float] | list[tuple[float, float]] = (0.0, 0.0)
    bytes: float = 0.0
    flops: float = 0.0
    goal: float | None = None
    rival: str | None = None

    @property
    def versions(self) -> dict[str, Callable[[], object]]:
        """All versions by name, ours first."""
        return {**self.ours, **self.plain}

    def check(self) -> None:
        """Refuse to time what does not agree.

        Raises:
            AssertionError: two versions differ by more than the tolerance.
        """
        assert self.ours, f"{self.op}: no kernel to measure"
        expected: Outputs | None = None
        for name, version in self.versions.items():
            found = self.outputs(version)
            assert found, f"{self.op} {self.name}: nothing to compare"
            if expected is None:
                expected = tuple(tensor.clone() for tensor in found)
                continue
            pairs = self.tolerance if isinstance(self.tolerance, list) else [self.tolerance] * len(found)
            for a, b, (atol, rtol) in zip(found, expected, pairs, strict=True):
                torch.testing.assert_close(
                    a, b, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{self.op} {self.name}, {name}: {text}"
                )


def backends(op, device: torch.device) -> Iterator[str]:
    """The kernels of `op` that can run on `device`."""
    for backend in ("cpp",) if device.type == "cpu" else ("cuda", "triton"):
        if op.backends()[backend] == "available":
            yield backend


def compiled(function: Callable[[], object]) -> Callable[[], object]:
    """`torch.compile` of a version, without CUDA graphs."""
    return torch.compile(function, dynamic=False)


def unit(*shape: int, device: torch.device) -> torch.Tensor:
    """Random unit rows."""
    return torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=-1)
