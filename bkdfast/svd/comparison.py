"""What comparisons of two models have in common: results by tensor name, and what was not compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar


class Compared(Protocol):
    """The result of one tensor."""

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs."""


Result = TypeVar("Result", bound=Compared)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Mapping[str, Result]):
    """Results of the compared tensors by their names in the tuned model, and what was not compared.

    Attributes:
        tensors: the results; the object itself is a mapping over them.
        only_in_base: names that the tuned model lacks.
        only_in_tuned: names that the base model lacks.
        skipped: name -> why it was not compared. Names that `include` and `exclude` leave out are not listed.
        tied: name -> the name under which the same storage was compared.
        metadata: labels of both sides, settings, versions.
    """

    tensors: dict[str, Result]
    only_in_base: tuple[str, ...] = ()
    only_in_tuned: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Names of the compared tensors in which no entry differs."""
        return tuple(name for name, result in self.tensors.items() if result.unchanged)
