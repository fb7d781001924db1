"""Every matrix gets the same sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.patterns import check_sparsity


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The rule of nearly all papers. It has no options."""

    name: ClassVar[str] = "uniform"

    def allocate(self, names: Sequence[str], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Sparsity of each matrix, so that the mean weighted by size is ``sparsity``.

        Args:
            sizes: number of weights of each matrix.

        Raises:
            SparsityError: when ``sparsity`` is outside [0, 1).
        """
        check_sparsity(sparsity)
        return dict.fromkeys(names, sparsity)
