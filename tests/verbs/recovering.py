"""What the tests of `recover` share: tiny pruned models, a short run, and a comparison of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import secateur
from secateur.progress import Reporter
from secateur.result import RecoverResult
from tests.models import save_tiny

MODES = ("full", "lora", "norms-and-biases", "blocks")
TEXT = "The quick brown fox jumps over the lazy dog, and 12 others follow it; nobody knows why. " * 14
RATES = {"full": 3e-3, "lora": 1e-2, "norms-and-biases": 1e-2, "blocks": 3e-3}


def pruned_model(root: Path, name: str, family: str, *, pattern: str = "unstructured", **changes: Any) -> Path:
    """A pruned model with side files, made once."""
    folder = root / f"{name}-pruned"
    if not folder.exists():
        save_tiny(root / name, family, **changes)
        secateur.prune(
            root / name, folder, method="magnitude", sparsity=0.5, pattern=pattern, evaluate=False, verify=False
        )
        (folder / "notes.txt").write_text("precious")
        (folder / "more").mkdir()
        (folder / "more" / "prompts.json").write_text("[]")
    return folder


def recover_tiny(model: Path, out: Path, root: Path, **changes: Any) -> RecoverResult:
    values = {"sequence_length": 32, "tokens": 640, "evaluate": False, "verify": False, **changes}
    if "data" not in changes:
        values.setdefault("batch_size", 2)
    return secateur.recover(model, out, **{"data": str(root / "text.txt"), **values})


def tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Key -> (file, tensor) of all weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({key: (path.name, file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
    return found


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check_like_the_source(before: Path, after: Path) -> set[str]:
    """Same keys, shards, formats, shapes and places of zeros; the keys whose values changed."""
    old, new = tensors(before), tensors(after)
    assert {key: file for key, (file, _) in new.items()} == {key: file for key, (file, _) in old.items()}
    changed = set()
    for key, (_, weight) in old.items():
        made = new[key][1]
        assert (made.dtype, made.shape) == (weight.dtype, weight.shape), key
        if weight.ndim >= 2 and float((weight == 0).float().mean()) > 0.1:
            assert torch.equal(made == 0, weight == 0), key
            assert not bool(made[weight == 0].signbit().any()), key
        if as_bytes(made) != as_bytes(weight):
            changed.add(key)
    return changed


def loads(folder: Path, architecture: str, key_of_missing: str = "") -> Any:
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def weights_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


class StopAt(Reporter):
    """Ctrl-C after so many steps of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.wanted, self.left, self.now = stage, step, ""

    def stage(self, name: str, total: int) -> None:
        self.now = name

    def advance(self, detail: str = "") -> None:
        if self.now == self.wanted:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


class Stages(Reporter):
    """Keeps the number of steps of each stage."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}

    def stage(self, name: str, total: int) -> None:
        self.totals[name] = total
