"""Several models of one family: a base and what was fine-tuned from it, opened together and compared."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from secateur.checkpoint.check import check_finite, check_model_folder, hash_folder
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import open_source
from secateur.converting.opened import Opened
from secateur.engine.binding import Binding
from secateur.engine.skeleton import build_skeleton
from secateur.errors import UnsupportedModelError
from secateur.layers.spec import is_converted
from secateur.progress import Reporter


@dataclass
class Member:
    """A fine-tuned model, by the names of the model's tensors."""

    model: str
    binding: Binding
    reader: CheckpointReader
    digest: str

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the model, as it is stored."""
        return self.binding.load([name], self.reader)[name]

    @property
    def provenance(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"model": self.model, "sha256": self.digest}


def open_member(model: str, base: Opened, reporter: Reporter, stack: ExitStack) -> Member:
    """Open a model, and see that it is of the same architecture as the base: every tensor is there in the same shape.

    Raises:
        UnsupportedModelError: naming the first tensor that differs.
    """
    source = open_source(model, reporter=reporter)
    config = check_model_folder(source.folder)
    if is_converted(config):
        raise UnsupportedModelError(f"{model} is a converted model", hint="give the model that it was made from")
    if config.get("model_type") != base.config.get("model_type"):
        raise UnsupportedModelError(
            f"{model} is a {config.get('model_type')}, {base.source.name} a {base.config.get('model_type')}",
            hint="only models that were fine-tuned from the same base can be fused",
        )
    skeleton = build_skeleton(source.folder)
    reader = stack.enter_context(CheckpointReader(source.folder))
    binding = Binding(skeleton, reader.keys)
    own, theirs = base.model.state_dict(), skeleton.state_dict()
    for name in dict.fromkeys([*own, *theirs]):
        shapes = [None if name not in side else tuple(side[name].shape) for side in (own, theirs)]
        if shapes[0] != shapes[1] or base.binding.bound(name) != binding.bound(name):
            first, second = ("missing" if shape is None else str(shape) for shape in shapes)
            raise UnsupportedModelError(
                f"{name} is {first} in {base.source.name} and {second} in {model}"
                + (" (in one of them it is not stored)" if shapes[0] == shapes[1] else ""),
                hint="only models that were fine-tuned from the same base can be fused",
            )
    check_finite(reader, reporter)
    return Member(model, binding, reader, hash_folder(source.folder))


def check_related(base: Opened, member: Member, names: list[str]) -> set[str]:
    """Names of the tensors in which a model differs from the base.

    Raises:
        UnsupportedModelError: when it differs by more than there is: it descends from another model.
    """
    differing: set[str] = set()
    whole = moved = 0.0
    worst, most = "", 0.0
    for name in names:
        ours, theirs = base.binding.load([name], base.reader)[name], member.tensor(name)
        if torch.equal(ours, theirs.to(ours.dtype)):
            continue
        differing.add(name)
        size = float(ours.float().square().sum())
        gone = float((theirs.float() - ours.float()).square().sum())
        whole, moved = whole + size, moved + gone
        if size and gone / size > most:
            worst, most = name, gone / size
    if moved > whole:
        raise UnsupportedModelError(
            f"{member.model} was not fine-tuned from {base.source.name}: {worst} differs by "
            f"{most**0.5:.0%} of its size, all weights by {(moved / whole) ** 0.5 if whole else 1:.0%}",
            hint="give the model that it was fine-tuned from as MODEL",
        )
    return differing
