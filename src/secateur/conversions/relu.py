"""Feed-forward networks with a ReLU in place of their activation: what is exactly zero need not be computed.

    y = D (relu(G x) * U x), or D relu(U x) without a gate, where SiLU, GELU or the like was

No weight changes: an entry of the config says another activation, and the result is an ordinary checkpoint. What the
model knows suffers until it is trained (``recover``, with the model that it was as its teacher). Then most neurons say
nothing to a token, and experts (``moe``) lose little by leaving them out.

Cost: two forwards through the model, to tell how much of the activity is zero before and after. Sources: Zhang et al.,
"MoEfication: Transformer feed-forward layers are mixtures of experts", 2022 (arXiv 2110.01786), which trains models
that had another activation for a short time with this one; Mirzadeh et al., "ReLU strikes back: exploiting activation
sparsity in large language models", 2023 (arXiv 2310.04564).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Relu:
    """The conversion, which has no options."""

    name: ClassVar[str] = "relu"

    @property
    def statistics(self) -> bool:
        """Whether calibration text is read."""
        return True
