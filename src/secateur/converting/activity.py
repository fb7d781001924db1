"""How much of the activity of feed-forward networks is exactly zero, from the inputs that calibration text makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.converting.opened import Opened
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.device import activation_limit
from secateur.engine.feed_forward import FeedForward
from secateur.engine.forward import NoSink, Stored
from secateur.engine.plan import Plan
from secateur.engine.stream import BlockStream
from secateur.plugins import make_method
from secateur.progress import Reporter

_BELOW = (-8.0, -2.0, -0.5, -1e-3)


def is_zero_below(act: nn.Module) -> bool:
    """Whether an activation is exactly zero wherever its input is negative, as a ReLU is."""
    with torch.no_grad():
        return not bool(act(torch.tensor(_BELOW)).any())


def zero_shares(
    model: transformers.PreTrainedModel, opened: Opened, networks: Sequence[FeedForward],
    batches: Sequence[Mapping[str, Tensor]], scratch: Path, reporter: Reporter,
) -> dict[str, float]:  # fmt: skip
    """Path of a network -> share of its activity that is exactly zero; of those only that some token came to.

    Args:
        model: without weights, for those of ``opened``; its activations may be others.
        scratch: folder for activations that do not fit in memory.
    """
    source = Stored(opened.reader)
    stream = BlockStream(
        model, find_structure(model), Binding(model, opened.reader.keys), source, NoSink(source),
        make_method("magnitude"), Plan(), ActivationStore(activation_limit(opened.recipe.activation_memory), scratch),
        opened.device, opened.compute, opened.recipe.seed, reporter, "looking at activity",
    )  # fmt: skip
    with _counted(model, networks) as counts:
        stream.run(batches)
    return {path: zeros / whole for path, (zeros, whole) in counts.items() if whole}


@contextmanager
def _counted(model: nn.Module, networks: Sequence[FeedForward]) -> Iterator[dict[str, tuple[int, int]]]:
    """While it lasts, zeros and numbers of what enters the last matrix of each network are counted."""
    counts = dict.fromkeys((one.module for one in networks), (0, 0))

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch._C.DisableTorchFunction():
                zeros, whole = counts[path]
                counts[path] = zeros + int((args[0] == 0).sum()), whole + args[0].numel()

        return hook

    handles = [
        model.get_submodule(f"{one.module}.{one.down}").register_forward_pre_hook(watch(one.module)) for one in networks
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
