"""Sparsity patterns: unstructured, or N:M, which keeps N of every M consecutive inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import PatternError, SparsityError


@dataclass(frozen=True)
class Pattern:
    """``keep`` of every ``group`` consecutive input columns stay; ``group == 0`` means unstructured."""

    keep: int = 0
    group: int = 0

    @property
    def unstructured(self) -> bool:
        return self.group == 0

    @property
    def sparsity(self) -> float | None:
        """The sparsity the pattern implies, None when it implies none."""
        return None if self.unstructured else 1 - self.keep / self.group

    def __str__(self) -> str:
        return "unstructured" if self.unstructured else f"{self.keep}:{self.group}"

    def check_divides(self, name: str, in_features: int) -> None:
        """Refuse a matrix whose inputs do not split into groups.

        Raises:
            PatternError: when ``in_features`` is not a multiple of M.
        """
        if not self.unstructured and in_features % self.group:
            raise PatternError(
                f"pattern {self} does not fit {name}: its {in_features} inputs do not divide by {self.group}",
                hint=f"leave it out with --ignore '{name}', or choose an M that divides {in_features}",
            )


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """Read ``unstructured`` or ``N:M``.

    Raises:
        PatternError: for anything else, or unless 0 < N < M.
    """
    if text == "unstructured":
        return UNSTRUCTURED
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise PatternError(f"pattern '{text}' is not known", hint="use 'unstructured' or N:M, for example 2:4")
    keep, group = int(match[1]), int(match[2])
    if not 0 < keep < group:
        raise PatternError(f"pattern '{text}' keeps {keep} of {group}", hint="N:M needs 0 < N < M, for example 2:4")
    return Pattern(keep, group)


def check_sparsity(value: float, where: str = "sparsity") -> float:
    """Refuse anything outside [0, 1).

    Raises:
        SparsityError: also for NaN.
    """
    if not 0 <= value < 1:
        raise SparsityError(f"{where} is {value}, not in [0, 1)", hint="0.5 means that half of the weights become zero")
    return float(value)
