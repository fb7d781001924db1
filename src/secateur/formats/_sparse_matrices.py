"""Which matrices of a model the sparse format can pack, where they lie in the checkpoint, and why others stay plain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.checkpoint.reader import CheckpointReader
from secateur.engine.binding import Binding
from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import build_skeleton, tied_names
from secateur.errors import CheckpointError


@dataclass(frozen=True)
class Candidate:
    """One matrix of the model and the one checkpoint key that makes it; ``obstacle`` says why it cannot be packed."""

    module: str
    key: str
    in_block: bool
    transposed: bool = False
    embedding: bool = False
    obstacle: str = ""


def find_candidates(folder: Path, reader: CheckpointReader, *, embeddings: bool) -> list[Candidate]:
    """The matrices of the blocks, and embedding and head where they are wanted.

    Raises:
        UnsupportedModelError: when the model has no blocks.
        CheckpointError: when the checkpoint lacks weights of it.
    """
    skeleton = build_skeleton(folder)
    binding = Binding(skeleton, reader.keys)
    if binding.missing:
        raise CheckpointError(f"the checkpoint lacks weights of the model, the first is {binding.missing[0]}")
    found = []
    for matrix in find_structure(skeleton).matrices:
        module = skeleton.get_submodule(matrix.module)
        unit = binding.unit_of(matrix.name)
        obstacle = ""
        if matrix.experts:
            obstacle = "stacked experts are one tensor, which their module computes with"
        elif type(module) not in (nn.Linear, Conv1D):
            obstacle = f"a {type(module).__name__} computes in its own way"
        elif unit.converter is not None:
            obstacle = "the checkpoint stores it in another form"
        for key in unit.keys if matrix.experts else unit.keys[:1]:
            name = key.removesuffix(".weight") if matrix.experts else matrix.module
            found.append(Candidate(name, key, True, matrix.transposed, obstacle=obstacle))
    found = list({candidate.key: candidate for candidate in found}.values())
    if embeddings:
        taken = {candidate.key for candidate in found}
        found += [candidate for candidate in _ends(skeleton, binding) if candidate.key not in taken]
    return found


def _ends(skeleton: transformers.PreTrainedModel, binding: Binding) -> list[Candidate]:
    """The embedding of tokens, and the head where it has weights of its own."""
    ties = tied_names(skeleton)
    names = {id(module): name for name, module in skeleton.named_modules()}
    found = []
    embedding = _ask(skeleton, "get_input_embeddings")
    if embedding is not None and binding.bound(f"{names.get(id(embedding))}.weight"):
        name = names[id(embedding)]
        key = binding.unit_of(f"{name}.weight").keys[0]
        users = [target for target, source in ties.items() if source == f"{name}.weight"]
        classes = {type(skeleton.get_submodule(user.rpartition(".")[0])) for user in users}
        obstacle = ""
        if type(embedding) is not nn.Embedding:
            obstacle = f"a {type(embedding).__name__} computes in its own way"
        elif not classes <= {nn.Linear, nn.Embedding} or not all(user.endswith(".weight") for user in users):
            obstacle = "it is tied to a module that is no Linear and no Embedding"
        elif any(binding.bound(user) and binding.unit_of(user).keys[0] != key for user in users):
            obstacle = "the checkpoint stores it twice"
        found.append(Candidate(name, key, False, embedding=True, obstacle=obstacle))
    head = _ask(skeleton, "get_output_embeddings")
    name = names.get(id(head), "")
    if type(head) is nn.Linear and f"{name}.weight" not in ties and binding.bound(f"{name}.weight"):
        found.append(Candidate(name, binding.unit_of(f"{name}.weight").keys[0], False))
    return found


def _ask(model: Any, method: str) -> nn.Module | None:
    try:
        answer = getattr(model, method)()
    except (NotImplementedError, AttributeError):  # a model of images has no embedding of tokens
        return None
    return answer if isinstance(answer, nn.Module) else None
