"""Every matrix gets the same sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocation._base import Need, Share
from secateur.patterns import check_sparsity


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The rule of nearly all papers. It has no options."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[Need] = "nothing"

    def allocate(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each, so that the mean weighted by size is ``sparsity``.

        Raises:
            SparsityError: when ``sparsity`` is outside [0, 1).
        """
        check_sparsity(sparsity)
        return {share.name: sparsity for share in shares}
